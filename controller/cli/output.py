"""How commands speak: data on stdout, everything else on stderr.

Nothing here knows a command. Colour never carries meaning; NO_COLOR and pipes are honoured.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 1000  # columns of a table nobody looks at, so that nothing is cut

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class OutputFormat(StrEnum):
    """How a command prints its data."""

    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[
    OutputFormat,
    typer.Option("--output", "-o", envvar="COLDSPARK_OUTPUT", help="How data is printed."),
]


def stderr_console() -> Console:
    """Return a console on today's stderr, without markup or automatic colours."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def note(message: str) -> None:
    """Tell the user something that is not data."""
    typer.echo(clean(message), err=True)


def report(message: str, hint: str | None) -> None:
    """Tell the user what failed and what to do about it."""
    note(f"error: {message}")
    if hint:
        note(f"hint: {hint}")


def print_json(value: object) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their columns; columns marked with a leading `>` are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=not sys.stdout.isatty(),
        )
    for row in rows:
        table.add_row(*(Text(clean(_cell(value))) for value in row))
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    text = _rendered(table, width)
    typer.echo("\n".join(line.rstrip() for line in text.splitlines()))


def _rendered(table: Table, width: int | None) -> str:
    console = Console(highlight=False, markup=False, width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def print_fields(fields: Mapping[str, object]) -> None:
    """Print one thing as `name  value` lines."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        typer.echo(f"{name.ljust(width)}  {clean(_cell(value))}")


def clean(text: str) -> str:
    """Return text without the control characters that could drive a terminal."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def _cell(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def human_bytes(num_bytes: float | None) -> str:
    """Return a size for people, e.g. `1.5 GiB`."""
    if num_bytes is None:
        return "-"
    power = 0
    while num_bytes >= 1024 and power < len(_UNITS) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:.0f} {_UNITS[0]}" if power == 0 else f"{num_bytes:.1f} {_UNITS[power]}"


def human_seconds(seconds: float | None) -> str:
    """Return a duration for people, e.g. `340 ms`, `12.3 s`, `4m 05s`, `3h 20m`, `2d 03h`."""
    if seconds is None:
        return "-"
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_m = divmod(minutes, 60)
    days, rest_h = divmod(hours, 24)
    if days:
        return f"{days}d {rest_h:02}h"
    return f"{hours}h {rest_m:02}m" if hours else f"{minutes}m {rest_s:02}s"


def human_moment(moment: str | None) -> str:
    """Return an ISO time for people, e.g. `2026-01-31 08:00:00 UTC`; any zone is converted."""
    if moment is None:
        return "-"
    return datetime.fromisoformat(moment).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def human_usd(amount: str) -> str:
    """Return money for people, to a hundredth of a cent."""
    return f"{Decimal(amount):.4f}"


def get(view: Mapping[str, Any], *path: str) -> Any:
    """Return a nested value of a JSON object; None where something is missing."""
    value: Any = view
    for step in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(step)
    return value
