"""`coldspark snapshots …`: handed to `python -m snapshots`, which may import torch."""

import subprocess
import sys
from typing import Any

import typer

from controller.cli.errors import ExitCode
from controller.cli.up import read_settings

# `--help` too belongs to the program behind.
PASS_THROUGH: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


def snapshots(context: typer.Context) -> None:
    """Build, verify, inspect, list and collect snapshots (`coldspark snapshots --help`)."""
    command = [sys.executable, "-m", "snapshots", *_with_store(context.args)]
    raise typer.Exit(_run(command))


def _with_store(arguments: list[str]) -> list[str]:
    """Name the controller's store unless the caller names one or only wants help."""
    if not arguments or arguments[0].startswith("-"):
        return arguments
    if any(a == "--help" or a == "--store" or a.startswith("--store=") for a in arguments):
        return arguments
    return [*arguments, "--store", str(read_settings().snapshot_store)]


def _run(command: list[str]) -> int:
    """Return the exit code of a child on our own streams; Ctrl-C reaches it through the terminal."""
    with subprocess.Popen(command) as child:
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:
                continue  # the child got it as well; its clean-up decides when we end
    return ExitCode.INTERRUPTED if code < 0 else code
