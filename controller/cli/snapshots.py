"""`coldspark snapshots …`: handed to `python -m snapshots`, which may import torch."""

import os
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
    raise typer.Exit(_run([sys.executable, "-m", "snapshots", *context.args], _environment()))


def _environment() -> dict[str, str]:
    """Name the controller's store and our output format, unless the caller names others."""
    defaults = {}
    if "SNAPSHOTS_STORE" not in os.environ:
        defaults["SNAPSHOTS_STORE"] = str(read_settings().snapshot_store)
    if "COLDSPARK_OUTPUT" in os.environ:
        defaults["SNAPSHOTS_OUTPUT"] = os.environ["COLDSPARK_OUTPUT"]
    return defaults | os.environ


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Return the exit code of a child on our own streams; Ctrl-C reaches it through the terminal."""
    with subprocess.Popen(command, env=environment) as child:
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:
                continue  # the child got it as well; its clean-up decides when we end
    return ExitCode.INTERRUPTED if code < 0 else code
