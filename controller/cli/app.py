"""The `coldspark` command: groups its commands, turns failures into messages and exit codes."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from controller.cli import (
    cost,
    deploy,
    doctor,
    functions,
    keys,
    logs,
    run,
    snapshots,
    status,
    up,
)
from controller.cli.connection import DEFAULT_URL, Connection
from controller.cli.errors import EXIT_CODES, CliError, ExitCode
from controller.cli.output import report
from snapshots.exit_codes import EXIT_CODES as SNAPSHOT_EXIT_CODES

_MEANINGS = SNAPSHOT_EXIT_CODES | EXIT_CODES  # `snapshots` hands its own through
EPILOG = "Exit codes: " + ", ".join(f"{code:d} {_MEANINGS[code]}" for code in sorted(_MEANINGS))

FUNCTIONS, NODE, FILES = "Functions", "Controller and node", "Files"

app = typer.Typer(
    name="coldspark",
    help="Serve language models that cost nothing while nobody asks.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _connection(
    context: typer.Context,
    url: Annotated[
        str, typer.Option(envvar="COLDSPARK_URL", help="Address of the controller.")
    ] = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="COLDSPARK_API_KEY", help="Sent as a bearer token.", show_default=False
        ),
    ] = None,
) -> None:
    context.obj = Connection(url=url, api_key=api_key)


app.command("deploy", rich_help_panel=FUNCTIONS)(deploy.deploy)
app.command("list", rich_help_panel=FUNCTIONS)(functions.list_functions)
app.command("describe", rich_help_panel=FUNCTIONS)(functions.describe)
app.command("run", rich_help_panel=FUNCTIONS)(run.run)
app.command("warm", rich_help_panel=FUNCTIONS)(functions.warm)
app.command("park", rich_help_panel=FUNCTIONS)(functions.park)
app.command("stop", rich_help_panel=FUNCTIONS)(functions.stop)
app.command("delete", rich_help_panel=FUNCTIONS)(functions.delete)
app.command("logs", rich_help_panel=FUNCTIONS)(logs.logs)
app.command("cost", rich_help_panel=FUNCTIONS)(cost.cost)
app.command("up", rich_help_panel=NODE)(up.up)
app.command("status", rich_help_panel=NODE)(status.status)
app.command("doctor", rich_help_panel=NODE)(doctor.doctor)
app.add_typer(keys.app, name="keys", rich_help_panel=NODE)
app.command("version", rich_help_panel=NODE)(status.version)
app.command("validate", rich_help_panel=FILES)(deploy.validate)
app.command("schema", rich_help_panel=FILES)(deploy.schema)
app.command("snapshots", rich_help_panel=FILES, **snapshots.PASS_THROUGH)(snapshots.snapshots)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; failures are told on stderr."""
    try:
        result = app(list(arguments), prog_name="coldspark", standalone_mode=False)
        sys.stdout.flush()
    except CliError as error:
        report(error.message, error.hint)
        return error.exit_code
    except typer.TyperException as error:
        return _report_usage(error)
    except (typer.Abort, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        return _close_stdout()
    return result if isinstance(result, int) else ExitCode.OK


def _report_usage(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if not message:  # a group without a command has printed its help
        return ExitCode.USAGE
    command = context.command_path if context is not None else "coldspark"
    report(message, f"`{command} --help` lists what it takes")
    return error.exit_code


def _close_stdout() -> int:
    """Keep the interpreter from flushing into a pipe nobody reads any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.FAILURE


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a terminal that cannot show a character must not fail
    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
