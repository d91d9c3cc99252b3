"""What the page says, worked out from the same values as the admin API gives. Pure.

Everything here is text or numbers ready to be shown; escaping is the templates' business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any

from controller.dashboard.charts import BarChart
from controller.dashboard.format import (
    NOTHING,
    human_bytes,
    human_count,
    human_seconds,
    human_share,
    human_usd,
)
from controller.dashboard.money import CostLine
from controller.dashboard.waterfall import ColdStartLine

Json = Mapping[str, Any]

_TIER_GLYPHS = {"ready": "●", "parked": "◐", "standby": "◔", "stopped": "○"}


class Window(StrEnum):
    """How far back the page looks."""

    HOUR = "1h"
    DAY = "24h"
    WEEK = "7d"
    MONTH = "30d"

    @property
    def duration(self) -> timedelta:
        """The length of the window."""
        return _WINDOWS[self][0]

    @property
    def words(self) -> str:
        """The window in a sentence: "in the last …"."""
        return _WINDOWS[self][1]


_WINDOWS = {
    Window.HOUR: (timedelta(hours=1), "hour"),
    Window.DAY: (timedelta(hours=24), "24 hours"),
    Window.WEEK: (timedelta(days=7), "7 days"),
    Window.MONTH: (timedelta(days=30), "30 days"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One headline figure."""

    label: str
    value: str
    note: str
    is_good: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionLine:
    """One row of the functions table."""

    name: str
    source: str
    backend: str
    tier: str
    glyph: str
    in_flight: int
    queued: int
    replicas: str
    memory: str
    memory_note: str
    active: str
    idle: str
    cost: str
    building: str
    percent: int | None
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLine:
    """One device of the node; `percent` is None when its memory is not known."""

    id: str
    kind: str
    used: str
    percent: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """The part of the page that comes from the store."""

    tiles: Sequence[Tile]
    charts: Sequence[BarChart]
    num_hidden: int
    costs: Sequence[CostLine]
    cold_starts: Sequence[ColdStartLine]


def tiles(total: Json, cold_starts: Sequence[Json], window: Window) -> Sequence[Tile]:
    """Return the headline figures of a cost report by function."""
    cost, always_on = Decimal(total["cost_usd"]), Decimal(total["always_on_cost_usd"])
    idle, saved = Decimal(total["idle_cost_usd"]), always_on - cost
    tokens = int(total["prompt_tokens"]) + int(total["output_tokens"])
    recent = [float(start["total_s"]) for start in cold_starts if start["outcome"] != "failed"]
    return (
        Tile(
            label="Spent",
            value=human_usd(cost),
            note=f"{human_share(idle, cost)} of it idle" if cost else f"in the last {window.words}",
        ),
        Tile(
            label="Saved",
            value=human_usd(saved),
            note=f"always on would cost {human_usd(always_on)}",
            is_good=saved > 0,
        ),
        Tile(
            label="Active time",
            value=human_seconds(float(total["active_s"])),
            note=f"idle {human_seconds(float(total['idle_s']))}",
        ),
        Tile(
            label="Requests",
            value=human_count(int(total["requests"])),
            note=f"{human_count(tokens)} tokens",
        ),
        Tile(
            label="Typical cold start",
            value=human_seconds(sorted(recent)[len(recent) // 2]) if recent else NOTHING,
            note=f"median of the last {len(recent)}" if recent else "none yet",
        ),
    )


def function_lines(views: Sequence[Json], costs: Mapping[str, Json]) -> Sequence[FunctionLine]:
    """Return the rows of the functions table.

    Args:
        views: Function views as the admin API gives them.
        costs: Rows of a cost report by function name; a missing one shows dashes.
    """
    return [_function_line(view, costs.get(view["name"])) for view in views]


def _function_line(view: Json, cost: Json | None) -> FunctionLine:
    memories = [replica["memory"] for replica in view["replicas"] if replica.get("memory")]
    kept = sum(memory["kept_bytes"] for memory in memories)
    held = kept + sum(memory["weights_bytes"] + memory["kv_cache_bytes"] for memory in memories)
    freed = sum(replica.get("freed_bytes") or 0 for replica in view["replicas"])
    reasons = sorted({memory["kept_reason"] for memory in memories if memory.get("kept_reason")})
    build, tier = view.get("build"), str(view["tier"])
    return FunctionLine(
        name=view["name"],
        source=view["source"],
        backend=view["backend"],
        tier=tier,
        glyph=_TIER_GLYPHS.get(tier, "?"),
        in_flight=view["in_flight"],
        queued=view["queued"],
        replicas=_replicas(view["replicas"]),
        memory=human_bytes(held),
        memory_note=_memory_note(freed, kept, reasons),
        active=human_seconds(float(cost["active_s"])) if cost else NOTHING,
        idle=human_seconds(float(cost["idle_s"])) if cost else NOTHING,
        cost=human_usd(Decimal(cost["cost_usd"])) if cost else NOTHING,
        building=_building(view, build),
        percent=_percent(build["done_bytes"], build["total_bytes"]) if build else None,
        error=view.get("last_error") or "",
    )


def _memory_note(freed: int, kept: int, reasons: Sequence[str]) -> str:
    """Return what parking gave back and what it did not, and why."""
    parts = [f"{human_bytes(freed)} given back"] if freed else []
    parts += [f"{human_bytes(kept)} kept"] if kept else []
    return "; ".join([", ".join(parts), *reasons] if parts else reasons)


def _replicas(replicas: Sequence[Json]) -> str:
    states = [str(replica["state"]) for replica in replicas]
    counted = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return ", ".join(counted) or "none"


def _building(view: Json, build: Json | None) -> str:
    if view.get("snapshot_state") != "building":
        return ""
    return f"building the snapshot: {build['phase']}" if build else "building the snapshot"


def _percent(done: int, total: int) -> int | None:
    return min(100 * done // total, 100) if total else None


def device_lines(devices: Sequence[Json]) -> Sequence[DeviceLine]:
    """Return the node's devices."""
    return [
        DeviceLine(
            id=device["id"],
            kind=str(device["kind"]).upper(),
            used=f"{human_bytes(device['used_bytes'])} of {human_bytes(device['memory_bytes'])}"
            if device.get("used_bytes") is not None
            else human_bytes(device["memory_bytes"]),
            percent=None
            if device.get("used_bytes") is None
            else _percent(device["used_bytes"], device["memory_bytes"]),
        )
        for device in devices
    ]
