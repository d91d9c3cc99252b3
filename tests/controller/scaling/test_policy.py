"""Pure scaling decisions."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.scaling.policy import (
    MAX_BACKOFF_S,
    backoff_s,
    needed_replicas,
    replica_floor,
    window,
)
from functions.spec import ScalingSpec, ScheduleSpec

OFFICE = ScheduleSpec(cron="0 8 * * 1-5", timezone="Europe/Berlin", duration="10h")


@pytest.mark.parametrize(
    ("load", "floor", "needed"),
    [(0, 0, 0), (1, 0, 1), (32, 0, 1), (33, 0, 2), (10_000, 0, 4), (0, 2, 2), (0, 9, 4)],
)
def test_replicas_follow_load_between_floor_and_maximum(load: int, floor: int, needed: int) -> None:
    scaling = ScalingSpec(max_replicas=4, target_concurrency=32)
    assert needed_replicas(scaling, load=load, floor=floor) == needed


@pytest.mark.parametrize(
    ("moment", "is_open"),
    [
        ("2026-11-23T06:59:59", False),  # Monday, 07:59 in Berlin
        ("2026-11-23T07:00:00", True),
        ("2026-11-23T16:59:59", True),
        ("2026-11-23T17:00:00", False),
        ("2026-11-22T09:00:00", False),  # Sunday
        ("2026-07-06T06:00:00", True),  # Monday, summer time
    ],
)
def test_a_schedule_counts_weekdays_as_cron_does_in_its_own_zone(
    moment: str, is_open: bool
) -> None:
    assert window(OFFICE, datetime.fromisoformat(moment).replace(tzinfo=UTC))[0] is is_open


@pytest.mark.parametrize(
    ("moment", "edge"),
    [
        ("2026-11-23T06:59:59", "2026-11-23T07:00:00"),
        ("2026-11-23T07:00:00", "2026-11-23T17:00:00"),
        ("2026-11-27T17:00:01", "2026-11-30T07:00:00"),  # over the weekend
        ("2026-03-27T17:00:01", "2026-03-30T06:00:00"),  # into summer time
    ],
)
def test_a_window_is_known_until_its_next_edge(moment: str, edge: str) -> None:
    now, until = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (moment, edge))
    floor = replica_floor(ScalingSpec(), [OFFICE], now)
    assert floor.until == until
    assert floor.holds(now)
    assert floor.holds(until - timedelta(microseconds=1))
    assert not floor.holds(until)
    assert not floor.holds(now - timedelta(seconds=1)), "the wall clock has gone back"


@given(st.integers(0, 366 * 86_400))
def test_inside_the_known_stretch_a_new_look_finds_the_same(second: int) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=second)
    floor = replica_floor(ScalingSpec(), [OFFICE], now)
    middle = now + (floor.until - now) / 2
    assert replica_floor(ScalingSpec(), [OFFICE], middle).num_replicas == floor.num_replicas


def test_the_floor_is_the_highest_of_minimum_and_open_windows() -> None:
    monday_noon = datetime(2026, 11, 23, 11, tzinfo=UTC)
    wide = OFFICE.model_copy(update={"min_replicas": 3})
    for minimum, schedules, floor in [(0, [OFFICE, wide], 3), (1, [], 1), (0, [], 0)]:
        scaling = ScalingSpec(min_replicas=minimum, max_replicas=4)
        assert replica_floor(scaling, schedules, monday_noon).num_replicas == floor


@given(st.integers(min_value=1, max_value=10_000))
def test_backoff_grows_and_is_bounded(num_failures: int) -> None:
    assert 0 < backoff_s(num_failures) <= backoff_s(num_failures + 1) <= MAX_BACKOFF_S
