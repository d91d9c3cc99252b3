"""Commands on deployed functions: list, describe, warm, park, stop, delete."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from controller.cli.connection import connect, function_path
from controller.cli.output import (
    OutputFormat,
    OutputOption,
    get,
    human_bytes,
    human_moment,
    human_seconds,
    note,
    print_fields,
    print_json,
    print_table,
)

NameArgument = Annotated[str, typer.Argument(help="Name of the function.", show_default=False)]
View = Mapping[str, Any]

NUM_COLD_STARTS = 5
COLUMNS = ("NAME", "TIER", ">REPLICAS", ">IN FLIGHT", ">QUEUED", "SNAPSHOT", "BACKEND", "SOURCE")
REPLICA_COLUMNS = (
    "ID", "STATE", ">IN FLIGHT", ">IDLE", ">WEIGHTS", ">KV CACHE", ">KEPT", ">HOST", "DEVICES",
    "NOTE",
)  # fmt: skip
COLD_START_COLUMNS = ("STARTED", "FROM", "OUTCOME", ">TOTAL", "PHASES")


def list_functions(context: typer.Context, output: OutputOption = OutputFormat.TABLE) -> None:
    """List the deployed functions and the tier each is in."""
    with connect(context) as controller:
        answer = controller.call("GET", "/api/v1/functions")
        show_functions(answer["functions"], output)


def show_functions(views: Sequence[View], output: OutputFormat) -> None:
    """Print functions as a table or as JSON."""
    if output is OutputFormat.JSON:
        print_json({"functions": views})
        return
    if not views:
        note("no functions are deployed; `coldspark deploy -f FILE` deploys one")
        return
    print_table(COLUMNS, [_row(view) for view in views])


def _row(view: View) -> Sequence[object]:
    return (
        view["name"],
        view["tier"],
        len(view["replicas"]),
        view["in_flight"],
        view["queued"],
        build_text(view),
        view["backend"],
        view["source"],
    )


def build_text(view: View) -> str:
    """Return where a function's snapshot stands, e.g. `building: convert 40 %`."""
    state, build = view["snapshot_state"], view.get("build")
    if state != "building" or not build:
        return str(state)
    total = build.get("total_bytes")
    share = f" {100 * build['done_bytes'] // total} %" if total else ""
    return f"building: {build['phase']}{share}"


def describe(
    context: typer.Context, name: NameArgument, output: OutputOption = OutputFormat.TABLE
) -> None:
    """Show one function: replicas, memory, spec and its last cold starts."""
    params = {"function": name, "limit": NUM_COLD_STARTS}
    with connect(context) as controller:
        view = controller.call("GET", function_path(name))
        cold_starts = controller.call("GET", "/api/v1/cold-starts", params=params)["cold_starts"]
        if output is OutputFormat.JSON:
            print_json({**view, "cold_starts": cold_starts})
            return
        print_fields(_fields(view))
        if view["replicas"]:
            _heading("Replicas")
            print_table(REPLICA_COLUMNS, [_replica_row(replica) for replica in view["replicas"]])
        if cold_starts:
            _heading("Last cold starts")
            print_table(COLD_START_COLUMNS, [_cold_start_row(start) for start in cold_starts])
        _heading("Spec")
        _print_spec(view["spec"])


def _fields(view: View) -> dict[str, object]:
    return {
        "name": view["name"],
        "tier": view["tier"],
        "revision": view["revision"],
        "served names": ", ".join(view["served_names"]),
        "source": view["source"],
        "snapshot": view["snapshot"] or build_text(view),
        "backend": view["backend"],
        "in flight": view["in_flight"],
        "queued": view["queued"],
        "last error": view["last_error"],
    }


def _replica_row(replica: View) -> Sequence[object]:
    memory = replica.get("memory") or {}
    return (
        replica["id"],
        replica["state"],
        replica["in_flight"],
        human_seconds(replica["idle_s"]),
        human_bytes(memory.get("weights_bytes")),
        human_bytes(memory.get("kv_cache_bytes")),
        human_bytes(memory.get("kept_bytes")),
        human_bytes(memory.get("host_rss_bytes")),
        " ".join(replica["devices"]),
        replica["last_error"] or memory.get("kept_reason") or _profile_note(replica),
    )


def _profile_note(replica: View) -> str | None:
    """Return why a start could not use its snapshot's profile, if it could not."""
    use = replica.get("profile")
    return None if not use or use["is_used"] else f"started without a profile: {use['reason']}"


def _cold_start_row(start: View) -> Sequence[object]:
    phases = (_phase_text(phase) for phase in start["phases"])
    return (
        human_moment(start["started_at"]),
        start["from_tier"],
        start["outcome"],
        human_seconds(start["total_s"]),
        " · ".join(phases),
    )


def _phase_text(phase: View) -> str:
    text = f"{phase['name']} {human_seconds(phase['seconds'])}"
    return f"{text} at {phase['gb_per_s']:.1f} GB/s" if phase["gb_per_s"] else text


def _heading(title: str) -> None:
    typer.echo(f"\n{title}")


def _print_spec(spec: object) -> None:
    import yaml  # 30 ms that only this command needs

    text = yaml.safe_dump(spec, sort_keys=False, allow_unicode=True)
    typer.echo("".join(f"  {line}\n" for line in text.splitlines()), nl=False)


def warm(
    context: typer.Context, name: NameArgument, output: OutputOption = OutputFormat.TABLE
) -> None:
    """Bring one replica to ready and return when it is."""
    _operate(context, name, "warm", output)


def park(
    context: typer.Context, name: NameArgument, output: OutputOption = OutputFormat.TABLE
) -> None:
    """Park idle replicas now: weights and KV cache are given back, processes stay."""
    _operate(context, name, "park", output)


def stop(
    context: typer.Context, name: NameArgument, output: OutputOption = OutputFormat.TABLE
) -> None:
    """Stop all replicas; the next request starts one again."""
    view = _operate(context, name, "stop", output)
    left = [replica["id"] for replica in view["replicas"] if replica["state"] == "draining"]
    if left and output is not OutputFormat.JSON:
        note(f"removed as soon as its backend answers: {', '.join(left)}")


def _operate(context: typer.Context, name: str, operation: str, output: OutputFormat) -> View:
    """Have an operation done; print the function after it, and return it."""
    with connect(context) as controller:
        view: View = controller.call("POST", function_path(name, operation))
        if output is OutputFormat.JSON:
            print_json(view)
            return view
        held = sum(
            get(replica, "memory", part) or 0
            for replica in view["replicas"]
            for part in ("weights_bytes", "kv_cache_bytes", "kept_bytes")
        )
        print_fields({"name": view["name"], "tier": view["tier"], "holds": human_bytes(held)})
        return view


def delete(
    context: typer.Context, name: NameArgument, output: OutputOption = OutputFormat.TABLE
) -> None:
    """Delete a function and stop its replicas; its snapshot and its costs stay."""
    with connect(context) as controller:
        view = controller.call("DELETE", function_path(name))
        left = [replica["id"] for replica in view["replicas"]] if view else []
    if output is OutputFormat.JSON:
        print_json({"deleted": name, "left": left})
    elif left:
        note(f"deleted {name}; removed as soon as its backend answers: {', '.join(left)}")
    else:
        note(f"deleted {name}")
