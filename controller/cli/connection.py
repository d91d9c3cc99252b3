"""Where the controller is; the client itself is loaded only by commands that call it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

import typer

if TYPE_CHECKING:
    from controller.cli.client import ControllerClient

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Where the controller is and what opens it."""

    url: str
    api_key: str | None


def connect(context: typer.Context) -> "ControllerClient":
    """Return a client for the controller the global options name; use it as a context manager."""
    from controller.cli.client import ControllerClient  # httpx takes 0.1 s

    connection = context.find_object(Connection)
    assert connection is not None
    return ControllerClient(connection)


def function_path(name: str, *rest: str) -> str:
    """Return the admin path of one function; the name is quoted, whatever it holds."""
    return "/".join(["/api/v1/functions", quote(name, safe=""), *rest])
