"""Starts from a standby runtime, with real processes."""

import signal

import psutil
import pytest

from functions.spec import FunctionSpec
from tests.e2e.conftest import Node, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]

PARIS = "The capital of France is Paris."


@pytest.fixture
def pooled(node: Node) -> Node:
    """A controller that keeps one standby."""
    node.kill()
    node.environment["COLDSPARK_STANDBY_REPLICAS"] = "1"
    node.start()
    return node


def standby(node: Node) -> psutil.Process:
    """Wait until a runtime is in standby and return its server, which nobody uses."""

    def find() -> psutil.Process | None:
        if not node.get("/api/v1/status")["standbys"].get("process", {}).get("ready"):
            return None
        unused = [p for p in node.runtimes() if is_server(p) and not engines(p)]
        return unused[0] if len(unused) == 1 else None

    process = wait_for(find, "a standby")
    assert isinstance(process, psutil.Process)
    return process


def is_server(process: psutil.Process) -> bool:
    return "runtime.main" in process.cmdline()


def engines(server: psutil.Process) -> list[psutil.Process]:
    return [child for child in server.children(recursive=True) if child.name() == "engine"]


def test_a_standby_answers_the_first_call_and_serves_again_after_a_stop(
    pooled: Node, spec: FunctionSpec
) -> None:
    pooled.deploy(spec)
    server = standby(pooled)
    assert pooled.view()["tier"] == "standby"
    assert pooled.ask() == PARIS
    assert engines(server), "the standby has become the replica"
    start = wait_for(lambda: pooled.get("/api/v1/cold-starts")["cold_starts"], "the journal")[0]
    assert start["from_tier"] == "standby"
    other = standby(pooled)
    other.send_signal(signal.SIGKILL)
    replacement = standby(pooled)
    assert replacement.pid not in (server.pid, other.pid)
    pooled.operate("stop")
    wait_for(lambda: not server.is_running(), "the end of what the pool has no room for")
    assert pooled.ask() == PARIS
    assert engines(replacement)


def test_a_killed_controller_finds_replica_and_standby_again(
    pooled: Node, spec: FunctionSpec
) -> None:
    pooled.deploy(spec)
    standby(pooled)
    assert pooled.ask() == PARIS
    unused = standby(pooled)
    (replica,) = pooled.view()["replicas"]
    pooled.kill()
    pooled.start()
    view = pooled.view()
    assert (view["tier"], view["replicas"][0]["id"]) == ("ready", replica["id"])
    assert standby(pooled) == unused
    assert pooled.ask() == PARIS
    lines = pooled.coldspark("logs", "smollm2").splitlines()
    assert '"event": "assigned"' in lines[0], "the log begins with the replica's own first line"
