"""`coldspark snapshots …`: handed to `python -m snapshots`, which may import torch.

All but `profile`, which is the controller's to do.
"""

import os
import subprocess
import sys
from typing import Any

import typer

from controller.cli import profile
from controller.cli.connection import Connection
from controller.cli.errors import ExitCode
from controller.cli.output import note
from controller.cli.up import read_settings

# `--help` too belongs to the program behind.
PASS_THROUGH: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


def snapshots(context: typer.Context) -> None:
    """Build, verify, inspect, list, profile and collect snapshots (`coldspark snapshots --help`)."""
    if context.args[:1] == ["profile"]:
        profile.app(
            context.args[1:],
            prog_name="coldspark snapshots profile",
            standalone_mode=False,
            obj=context.find_object(Connection),
        )
        return
    if context.args in ([], ["--help"]):
        note("`coldspark snapshots profile FUNCTION --help` is beside what follows")
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
