"""`coldspark status` and `coldspark version`."""

import platform
from collections.abc import Mapping
from typing import Any

import typer

from controller.cli.connection import connect
from controller.cli.output import (
    OutputFormat,
    OutputOption,
    human_bytes,
    human_seconds,
    print_fields,
    print_json,
    print_table,
)
from runtime.version import VERSION


def status(context: typer.Context, output: OutputOption = OutputFormat.TABLE) -> None:
    """Show the controller and its devices."""
    with connect(context) as controller:
        view = controller.call("GET", "/api/v1/status")
        if output is OutputFormat.JSON:
            print_json(view)
            return
        fields = {
            "version": view["version"],
            "up for": human_seconds(view["uptime_s"]),
            "functions": view["functions"],
            "replicas": view["replicas"],
            "standbys": ", ".join(
                f"{backend}: {counts['ready']} ready, {counts['starting']} starting"
                for backend, counts in view["standbys"].items()
            )
            or "none",
            "starts": "{under_way} of {limit} under way, {waiting} waiting".format(
                **view["starts"]
            ),
            "host memory": _host_memory(view["host_memory"]),
            "weights in memory": _held(view["host_cache"]),
        }
        print_fields(fields)
        typer.echo("\nDevices")
        rows = [
            (
                device["id"],
                device["kind"],
                human_bytes(device["used_bytes"]),
                human_bytes(device["promised_bytes"]),
                human_bytes(device["foreign_bytes"]),
                human_bytes(device["memory_bytes"]),
            )
            for device in view["devices"]
        ]
        print_table(("ID", "KIND", ">USED", ">PROMISED", ">FOREIGN", ">MEMORY"), rows)


def _host_memory(memory: Mapping[str, Any]) -> str:
    held = "".join(
        f", {human_bytes(num_bytes)} {state}"
        for state, num_bytes in memory["held_bytes"].items()
        if num_bytes
    )
    shortage = f"; nothing is parked deep: {memory['shortage']}" if memory["shortage"] else ""
    return f"{human_bytes(memory['available_bytes'])} available{held}{shortage}"


def _held(cache: Mapping[str, Any]) -> str:
    if not cache["budget_bytes"]:
        return "as the page cache has them (COLDSPARK_HOST_CACHE_BYTES)"
    pinned_bytes = cache["pinned_bytes"]
    pinned, locked = human_bytes(pinned_bytes), human_bytes(cache["held_bytes"] - pinned_bytes)
    reason = f"; {cache['reason']}" if cache["reason"] else ""
    return f"{pinned} pinned and {locked} locked of {human_bytes(cache['budget_bytes'])}{reason}"


def version(output: OutputOption = OutputFormat.TABLE) -> None:
    """Show the installed version; needs no controller."""
    versions = {
        "coldspark": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if output is OutputFormat.JSON:
        print_json(versions)
    else:
        print_fields(versions)
