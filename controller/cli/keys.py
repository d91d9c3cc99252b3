"""`coldspark keys`: who may call the gateway."""

from typing import Annotated
from urllib.parse import quote

import typer

from controller.cli.connection import connect
from controller.cli.errors import UsageProblem
from controller.cli.output import (
    OutputFormat,
    OutputOption,
    human_moment,
    note,
    print_fields,
    print_json,
    print_table,
)

app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)


@app.command("create")
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Who or what uses it.", show_default=False)],
    expires_in: Annotated[
        str | None, typer.Option(help="Life of the key, e.g. 30d. For ever, if not given.")
    ] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Create a key. It is shown once: only its hash is kept."""
    body = {"name": name, "expires_in_s": None if expires_in is None else _seconds(expires_in)}
    with connect(context) as controller:
        key = controller.call("POST", "/api/v1/keys", body=body)
        if output is OutputFormat.JSON:
            print_json(key)
            return
        print_fields({"id": key["id"], "name": key["name"], "key": key["key"]})
        note("keep the key now: it cannot be shown again")


def _seconds(text: str) -> float:
    from functions.units import parse_duration  # keeps `coldspark --help` free of the spec

    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageProblem(f"--expires-in {error}, got {text!r}") from error


@app.command("list")
def list_keys(context: typer.Context, output: OutputOption = OutputFormat.TABLE) -> None:
    """List keys, without their secrets."""
    with connect(context) as controller:
        answer = controller.call("GET", "/api/v1/keys")
        if output is OutputFormat.JSON:
            print_json(answer)
            return
        columns = ("ID", "NAME", "CREATED", "EXPIRES", "REVOKED")
        rows = [
            (
                key["id"],
                key["name"],
                human_moment(key.get("created_at")),
                human_moment(key.get("expires_at")),
                human_moment(key.get("revoked_at")),
            )
            for key in answer["keys"]
        ]
        print_table(columns, rows)


@app.command("revoke")
def revoke(
    context: typer.Context,
    key_id: Annotated[str, typer.Argument(help="Id of the key.", show_default=False)],
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Revoke a key; calls with it are refused from now on."""
    with connect(context) as controller:
        controller.call("DELETE", f"/api/v1/keys/{quote(key_id, safe='')}")
    if output is OutputFormat.JSON:
        print_json({"revoked": key_id})
    else:
        note(f"revoked {key_id}")
