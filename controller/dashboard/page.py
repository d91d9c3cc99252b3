"""What the page says, worked out from the same values as the admin API gives. Pure.

Everything here is text or numbers ready to be shown; escaping is the templates' business.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any

from controller.dashboard.charts import BarChart, Series
from controller.dashboard.format import (
    NOTHING,
    human_age,
    human_bytes,
    human_count,
    human_seconds,
    human_share,
    human_usd,
)

Json = Mapping[str, Any]

MAX_BARS = 12
_STARTING = ("starting_s", "loading_s", "draining_s", "failed_s")
_GIVEN_BACK = ("parked_s", "unallocated_s")
_TIME_UNITS = ((172_800.0, 86_400.0, "days"), (7200.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))
_TIER_GLYPHS = {"ready": "●", "parked": "◐", "standby": "◔", "stopped": "○"}
_PHASE_KINDS = {
    "queue": "wait",
    "place": "wait",
    "container_start": "start",
    "runtime_import": "import",
    "first_token": "first",
    "prefill": "first",
}
_SHOWN_PHASE_SHARE = 0.01


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


class Grouping(StrEnum):
    """What a bar stands for."""

    FUNCTION = "function"
    DAY = "day"
    DEVICE = "device"


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
class CostLine:
    """One row of the cost table."""

    group: str
    active: str
    idle: str
    starting: str
    given_back: str
    requests: str
    tokens: str
    cost: str
    idle_cost: str
    always_on: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBar:
    """One phase of a waterfall; positions in thousandths of the longest cold start shown."""

    name: str
    seconds: float
    duration: str
    kind: str
    x: float
    width: float
    is_listed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStartLine:
    """One row of the cold starts."""

    id: str
    function: str
    started_at: str
    clock: str
    age: str
    from_tier: str
    reason: str
    outcome: str
    is_failed: bool
    total: str
    phases: Sequence[PhaseBar]
    rest: str


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
    held = sum(memory["weights_bytes"] + memory["kv_cache_bytes"] for memory in memories)
    freed = sum(replica.get("freed_bytes") or 0 for replica in view["replicas"])
    kept = sorted({memory["kept_reason"] for memory in memories if memory.get("kept_reason")})
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
        memory_note="; ".join(kept) or (f"{human_bytes(freed)} given back" if freed else ""),
        active=human_seconds(float(cost["active_s"])) if cost else NOTHING,
        idle=human_seconds(float(cost["idle_s"])) if cost else NOTHING,
        cost=human_usd(Decimal(cost["cost_usd"])) if cost else NOTHING,
        building=_building(view, build),
        percent=_percent(build["done_bytes"], build["total_bytes"]) if build else None,
        error=view.get("last_error") or "",
    )


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


def cost_lines(report: Json) -> Sequence[CostLine]:
    """Return the rows of the cost table, the total last."""
    return [_cost_line(row["group"] or "nobody", row) for row in report["rows"]] + [
        _cost_line("Total", report["total"])
    ]


def _cost_line(group: str, row: Json) -> CostLine:
    return CostLine(
        group=group,
        active=human_seconds(float(row["active_s"])),
        idle=human_seconds(float(row["idle_s"])),
        starting=human_seconds(sum(float(row[name]) for name in _STARTING)),
        given_back=human_seconds(sum(float(row[name]) for name in _GIVEN_BACK)),
        requests=human_count(int(row["requests"])),
        tokens=human_count(int(row["prompt_tokens"]) + int(row["output_tokens"])),
        cost=human_usd(Decimal(row["cost_usd"])),
        idle_cost=human_usd(Decimal(row["idle_cost_usd"])),
        always_on=human_usd(Decimal(row["always_on_cost_usd"])),
    )


def charts(report: Json, grouping: Grouping) -> tuple[Sequence[BarChart], int]:
    """Return the charts of a cost report, and how many rows did not fit into them."""
    rows = [row for row in report["rows"] if row["group"] is not None]
    if grouping is Grouping.DAY:
        shown = rows[-MAX_BARS:]
    else:
        shown = sorted(rows, key=lambda row: -Decimal(row["cost_usd"]))[:MAX_BARS]
    if not shown:
        return (), 0
    return (_time_chart(shown), _money_chart(shown)), len(rows) - len(shown)


def _time_chart(rows: Sequence[Json]) -> BarChart:
    columns = {
        "active": ("Active", [float(row["active_s"]) for row in rows]),
        "idle": ("Idle", [float(row["idle_s"]) for row in rows]),
        "other": ("Starting", [sum(float(row[name]) for name in _STARTING) for row in rows]),
    }
    longest = max(map(sum, zip(*(values for _, values in columns.values()), strict=True)))
    divisor, unit = _time_unit(longest)
    described = "; ".join(
        f"{row['group']}: active {human_seconds(float(row['active_s']))}, "
        f"idle {human_seconds(float(row['idle_s']))}"
        for row in rows
    )
    return BarChart(
        id="time",
        title=f"Device time, {unit}",
        description=described,
        bars=[row["group"] for row in rows],
        series=[
            Series(
                kind=kind,
                label=label,
                values=[value / divisor for value in values],
                texts=[human_seconds(value) for value in values],
            )
            for kind, (label, values) in columns.items()
        ],
    )


def _time_unit(longest_s: float) -> tuple[float, str]:
    for threshold, divisor, unit in _TIME_UNITS:
        if longest_s >= threshold:
            return divisor, unit
    return 1.0, "seconds"


def _money_chart(rows: Sequence[Json]) -> BarChart:
    """Two bars a row: what it cost, and what always-on would have cost."""
    spent = {
        "active": ("Active", [Decimal(row["active_cost_usd"]) for row in rows]),
        "idle": ("Idle", [Decimal(row["idle_cost_usd"]) for row in rows]),
        "other": ("Starting", [_other_usd(row) for row in rows]),
    }
    always_on = [Decimal(row["always_on_cost_usd"]) for row in rows]
    described = "; ".join(
        f"{row['group']}: {human_usd(Decimal(row['cost_usd']))}, of it idle "
        f"{human_usd(Decimal(row['idle_cost_usd']))}, always on "
        f"{human_usd(Decimal(row['always_on_cost_usd']))}"
        for row in rows
    )
    series = [
        _paired(kind, label, [(amount, None) for amount in amounts])
        for kind, (label, amounts) in spent.items()
    ]
    return BarChart(
        id="money",
        title="Money, US dollars",
        description=described,
        bars=[name for row in rows for name in (row["group"], "if always on")],
        series=[*series, _paired("always-on", "Always on", [(None, usd) for usd in always_on])],
    )


def _paired(
    kind: str, label: str, pairs: Iterable[tuple[Decimal | None, Decimal | None]]
) -> Series:
    amounts = [amount for pair in pairs for amount in pair]
    return Series(
        kind=kind,
        label=label,
        values=[None if amount is None else float(amount) for amount in amounts],
        texts=["" if amount is None else human_usd(amount) for amount in amounts],
    )


def _other_usd(row: Json) -> Decimal:
    spent = Decimal(row["active_cost_usd"]) + Decimal(row["idle_cost_usd"])
    return Decimal(row["cost_usd"]) - spent


def cold_start_lines(starts: Sequence[Json], now: datetime) -> Sequence[ColdStartLine]:
    """Return the rows of the cold starts, all to one scale."""
    longest_s = max((float(start["total_s"]) for start in starts), default=0.0)
    return [_cold_start_line(start, longest_s, now) for start in starts]


def _cold_start_line(start: Json, longest_s: float, now: datetime) -> ColdStartLine:
    at = datetime.fromisoformat(start["started_at"])
    phases = _phase_bars(start["phases"], float(start["total_s"]), longest_s)
    unlisted_s = [phase.seconds for phase in phases if not phase.is_listed]
    return ColdStartLine(
        id=str(start["id"]),
        function=start["function"],
        started_at=at.isoformat(),
        clock=f"{at:%Y-%m-%d %H:%M:%S} UTC",
        age=human_age(at, now),
        from_tier=start["from_tier"],
        reason=start.get("reason") or "",
        outcome=start["outcome"],
        is_failed=start["outcome"] == "failed",
        total=human_seconds(float(start["total_s"])),
        phases=phases,
        rest=human_seconds(sum(unlisted_s)) if unlisted_s else "",
    )


def _phase_bars(phases: Sequence[Json], total_s: float, longest_s: float) -> Sequence[PhaseBar]:
    bars: list[PhaseBar] = []
    x = 0.0
    for phase in phases:
        seconds = max(float(phase["seconds"]), 0.0)
        width = 1000 * seconds / longest_s if longest_s > 0 else 0.0
        bars.append(
            PhaseBar(
                name=str(phase["name"]).replace("_", " "),
                seconds=seconds,
                duration=human_seconds(seconds),
                kind=phase_kind(str(phase["name"])),
                x=round(x, 2),
                width=round(width, 2),
                is_listed=seconds >= _SHOWN_PHASE_SHARE * total_s,
            )
        )
        x += width
    return bars


def phase_kind(name: str) -> str:
    """Return the stylesheet's name for a phase's colour."""
    if name.startswith("weights_"):
        return "weights"
    return _PHASE_KINDS.get(name, "prepare")
