"""How the command line prints data: a table to read, or JSON to process. Always on stdout."""

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

PIPE_WIDTH = 1000  # columns of a table nobody looks at, so that nothing is cut


class OutputFormat(StrEnum):
    """How data is printed."""

    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[
    OutputFormat,
    typer.Option("--output", "-o", envvar="SNAPSHOTS_OUTPUT", help="How data is printed."),
]


def print_json(value: object) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their columns; no header line when these have no names."""
    from rich.console import Console  # a reused build prints no table
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, show_header=any(columns))
    for row in rows:
        table.add_row(*map(str, row))
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(width=width, highlight=False, markup=False).print(table)


def size(num_bytes: int) -> str:
    """Return a size in decimal units, as disks are sold."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
