import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from controller.cli.app import run_command
from tests.fakes.http_server import ScriptedServer, scripted_server


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Cli = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("COLDSPARK_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command line in this process, up to its exit code."""

    def run(*arguments: str) -> Outcome:
        exit_code = run_command(arguments)
        captured = capsys.readouterr()
        return Outcome(exit_code=exit_code, stdout=captured.out, stderr=captured.err)

    return run


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """A scripted controller that every command of the test finds."""
    with scripted_server() as server:
        monkeypatch.setenv("COLDSPARK_URL", server.url)
        yield server


def view(**changes: Any) -> dict[str, Any]:
    """Return a function as the admin API shows it."""
    shown: dict[str, Any] = {
        "name": "tiny",
        "revision": "0123456789ab",
        "backend": "process",
        "served_names": ["tiny", "tiny-chat"],
        "source": "org/tiny",
        "snapshot": "tiny@0123456789ab",
        "snapshot_state": "ready",
        "build": None,
        "tier": "stopped",
        "in_flight": 0,
        "queued": 0,
        "replicas": [],
        "last_error": None,
        "spec": {"name": "tiny", "model": {"source": "org/tiny"}},
    }
    return shown | changes


def replica(**changes: Any) -> dict[str, Any]:
    """Return a replica as the admin API shows it."""
    shown: dict[str, Any] = {
        "id": "tiny-0a1b2c3d",
        "state": "ready",
        "in_flight": 0,
        "devices": ["cpu:0"],
        "idle_s": 12.5,
        "memory": {
            "weights_bytes": 256 << 20,
            "kv_cache_bytes": 128 << 20,
            "host_rss_bytes": 600 << 20,
            "kept_bytes": 0,
            "kept_reason": "",
        },
        "last_error": None,
    }
    return shown | changes
