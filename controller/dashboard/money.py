"""Idle against active time, as charts and as a table. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any

from controller.dashboard.charts import BarChart, Series
from controller.dashboard.format import human_count, human_seconds, human_usd

Json = Mapping[str, Any]

MAX_BARS = 8
_STARTING = ("starting_s", "loading_s", "draining_s", "failed_s")
_GIVEN_BACK = ("parked_s", "unallocated_s")
_TIME_UNITS = ((172_800.0, 86_400.0, "days"), (7200.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))


class Grouping(StrEnum):
    """What a bar stands for."""

    FUNCTION = "function"
    DAY = "day"
    DEVICE = "device"


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
        values=[float(amount or 0) for amount in amounts],
        texts=["" if amount is None else human_usd(amount) for amount in amounts],
    )


def _other_usd(row: Json) -> Decimal:
    spent = Decimal(row["active_cost_usd"]) + Decimal(row["idle_cost_usd"])
    return Decimal(row["cost_usd"]) - spent
