from datetime import timedelta
from typing import Any

import pytest

from controller.dashboard.page import Tile, Window, device_lines, function_lines, tiles
from tests.fakes.dashboard import (
    NOW,
    FakeHouse,
    function,
    replica,
)

MIB = 1 << 20


async def report(house: FakeHouse | None = None, by: str = "function") -> dict[str, Any]:
    source = house or FakeHouse()
    return await source.cost(since=NOW - timedelta(hours=24), until=NOW, by=by)


def line(view: dict[str, Any], cost: dict[str, Any] | None = None) -> Any:
    (only,) = function_lines([view], {} if cost is None else {view["name"]: cost})
    return only


def test_function_line_sums_the_memory_of_all_replicas() -> None:
    view = function(
        "smol",
        "ready",
        replicas=[replica("ready", weights=100 * MIB, kv_cache=50 * MIB), replica("ready")],
    )
    assert line(view).memory == "150 MiB"
    assert line(view).replicas == "2 ready"


def test_function_line_tells_what_parking_gave_back() -> None:
    told = line(function("smol", "parked", replicas=[replica("parked", freed=512 * MIB)]))
    assert (told.memory, told.memory_note) == ("0 B", "512 MiB given back")


def test_function_line_tells_why_memory_was_kept() -> None:
    kept = replica("parked", freed=MIB, kept=3 * MIB)
    assert line(function("smol", "parked", replicas=[kept])).memory == "3.0 MiB"
    kept["memory"]["kept_reason"] = "the allocator keeps it"
    assert line(function("smol", "parked", replicas=[kept])).memory_note == (
        "1.0 MiB given back, 3.0 MiB kept; the allocator keeps it"
    )


def test_function_without_replicas_or_costs_shows_none() -> None:
    told = line(function("smol", "stopped"))
    assert (told.replicas, told.memory, told.active, told.cost) == ("none", "0 B", "—", "—")


def test_replica_without_memory_figures_counts_nothing() -> None:
    starting = replica("starting") | {"memory": None}
    assert line(function("smol", "stopped", replicas=[starting])).memory == "0 B"


async def test_function_line_has_its_costs() -> None:
    cost = {row["group"]: row for row in (await report())["rows"]}["smollm2"]
    told = line(function("smollm2", "ready"), cost)
    assert (told.active, told.idle, told.cost) == ("24 m 00 s", "2 h 06 m", "$6.38")


@pytest.mark.parametrize("tier", ["ready", "parked", "standby", "stopped"])
def test_every_tier_has_its_own_glyph(tier: str) -> None:
    glyphs = {
        one: line(function("smol", one)).glyph for one in ("ready", "parked", "standby", "stopped")
    }
    assert list(glyphs.values()).count(glyphs[tier]) == 1
    assert "?" not in glyphs.values()


@pytest.mark.parametrize(
    ("changes", "text", "percent"),
    [
        ({}, "", None),
        ({"snapshot_state": "building"}, "building the snapshot", None),
        (
            {
                "snapshot_state": "building",
                "build": {"phase": "download", "done_bytes": 1, "total_bytes": 4},
            },
            "building the snapshot: download",
            25,
        ),
        (
            {
                "snapshot_state": "building",
                "build": {"phase": "download", "done_bytes": 1, "total_bytes": 0},
            },
            "building the snapshot: download",
            None,
        ),
    ],
)
def test_snapshot_that_is_being_built_shows_how_far_it_is(
    changes: dict[str, Any], text: str, percent: int | None
) -> None:
    told = line(function("smol", "stopped", **changes))
    assert (told.building, told.percent) == (text, percent)


async def test_tiles_compare_with_always_on() -> None:
    spent, saved, active, requests, typical = tiles(
        (await report())["total"], FakeHouse().starts, Window.DAY
    )
    assert (spent.value, spent.note) == ("$19.68", "52 % of it idle")
    assert saved == Tile(
        label="Saved", value="$160.32", note="always on would cost $180.00", is_good=True
    )
    assert (active.value, requests.value, requests.note) == (
        "3 h 37 m",
        "3,612",
        "1,218,000 tokens",
    )
    assert (typical.value, typical.note) == ("691 ms", "median of the last 3")


async def test_tiles_of_an_empty_node_say_so() -> None:
    house = FakeHouse()
    house.hours = {}
    spent, saved, _, _, typical = tiles((await report(house))["total"], [], Window.WEEK)
    assert (spent.value, spent.note) == ("$0", "in the last 7 days")
    assert not saved.is_good
    assert (typical.value, typical.note) == ("—", "none yet")


def test_device_line_shows_memory_in_use() -> None:
    (told,) = device_lines(
        [{"id": "GPU-1", "kind": "gpu", "memory_bytes": 8 << 30, "used_bytes": 2 << 30}]
    )
    assert (told.kind, told.used, told.percent) == ("GPU", "2.0 GiB of 8.0 GiB", 25)


def test_device_whose_use_is_not_known_shows_its_size() -> None:
    (told,) = device_lines(
        [{"id": "GPU-1", "kind": "gpu", "memory_bytes": 8 << 30, "used_bytes": None}]
    )
    assert (told.used, told.percent) == ("8.0 GiB", None)


def test_windows_have_their_lengths() -> None:
    assert [window.duration for window in Window] == [
        timedelta(hours=1),
        timedelta(days=1),
        timedelta(days=7),
        timedelta(days=30),
    ]
