"""`coldspark cost`: device seconds and money, idle beside active."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from controller.cli.connection import connect
from controller.cli.output import (
    OutputFormat,
    OutputOption,
    human_moment,
    human_seconds,
    human_usd,
    note,
    print_json,
    print_table,
)

_STARTING = ("starting_s", "loading_s", "draining_s", "failed_s")


class Group(StrEnum):
    """What the rows of a cost report stand for."""

    FUNCTION = "function"
    DAY = "day"
    DEVICE = "device"


def cost(
    context: typer.Context,
    since: Annotated[
        str, typer.Option(help="How far back: a duration such as 24h, or an ISO time.")
    ] = "24h",
    by: Annotated[Group, typer.Option(help="What a row stands for.")] = Group.FUNCTION,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show what functions cost: active and idle device time, money, and always-on beside it."""
    with connect(context) as controller:
        params = {"since": since, "by": by.value}
        report = controller.call("GET", "/api/v1/cost", params=params)
        if output is OutputFormat.JSON:
            print_json(report)
            return
        columns = (
            by.upper(), ">ACTIVE", ">IDLE", ">STARTING", ">GIVEN BACK", ">REQUESTS", ">TOKENS",
            ">COST", ">OF IT IDLE", ">ALWAYS ON",
        )  # fmt: skip
        rows = [_row(row["group"], row) for row in report["rows"]]
        print_table(columns, [*rows, _row("total", report["total"])])
        note(
            f"{human_moment(report['since'])} to {human_moment(report['until'])}, {report['currency']}"
        )


def _row(group: str | None, row: Mapping[str, Any]) -> Sequence[object]:
    return (
        group or "(nobody)",
        human_seconds(float(row["active_s"])),
        human_seconds(float(row["idle_s"])),
        human_seconds(sum(float(row[state]) for state in _STARTING)),
        human_seconds(float(row["parked_s"]) + float(row["unallocated_s"])),
        row["requests"],
        int(row["prompt_tokens"]) + int(row["output_tokens"]),
        human_usd(row["cost_usd"]),
        human_usd(row["idle_cost_usd"]),
        human_usd(row["always_on_cost_usd"]),
    )
