"""`coldspark logs`: what a function's runtimes wrote."""

import sys
from typing import Annotated

import typer

from controller.cli.connection import connect, function_path
from controller.cli.functions import NameArgument
from controller.cli.output import OutputFormat, OutputOption, clean, print_json


def logs(
    context: typer.Context,
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    tail: Annotated[int, typer.Option(min=0, help="Lines from the end to start with.")] = 100,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Show the log of a function's replicas; as JSON, a list of lines (with -f, one a line)."""
    params = {"tail": tail, "follow": str(follow).lower()}
    lines: list[str] = []
    with (
        connect(context) as controller,
        controller.stream("GET", function_path(name, "logs"), params=params) as response,
    ):
        for line in response.iter_lines():
            if output is OutputFormat.TABLE:
                typer.echo(clean(line))
            elif follow:
                print_json_line(line)
            else:
                lines.append(line)
    if output is OutputFormat.JSON and not follow:
        print_json({"lines": lines})


def print_json_line(line: str) -> None:
    """Print one log line as one JSON document on one line, at once."""
    import json  # local to the only caller that needs a compact form

    typer.echo(json.dumps({"line": line}, ensure_ascii=False))
    sys.stdout.flush()
