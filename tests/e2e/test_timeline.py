"""What a client is told of its wait, against the client's own clock."""

import json
import socket
import statistics
import time
from collections.abc import Callable

import httpx
import pytest

from functions.spec import FunctionSpec
from tests.e2e.conftest import Node

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]

NUM_RUNS = 5
SHARE, LEAST_S = 0.02, 0.010
"""What the timeline may leave unexplained, whichever is more."""
HEADER, COMMENT = b"\r\nserver-timing: ", b"\n: timing "
"""What stands before it."""


@pytest.fixture
def impatient(node: Node) -> Node:
    """A controller that sends a heartbeat before any cold start is over."""
    node.kill()
    node.environment["COLDSPARK_HEARTBEAT_S"] = "0.01"
    node.start()
    return node


def ask(node: Node, *, stream: bool, mark: bytes) -> tuple[float, dict[str, float]]:
    """Return the wait for the timeline, which comes with the first token, and its phases.

    Seconds both.
    """
    body = json.dumps({"model": "smollm2", "prompt": "The sea", "max_tokens": 1, "stream": stream})
    address = httpx.URL(node.url)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {address.host}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    received, waited_s = b"", 0.0
    with socket.create_connection((address.host, address.port or 80)) as connection:
        began = time.perf_counter()
        connection.sendall((head + body).encode())
        while chunk := connection.recv(1 << 16):
            received += chunk
            if not waited_s and mark in received:
                waited_s = time.perf_counter() - began
    assert waited_s, received
    told = received.split(mark)[1].splitlines()[0].decode()
    entries = [entry.split(";dur=") for entry in told.split(", ")]
    return waited_s, {name: float(milliseconds) / 1000 for name, milliseconds in entries}


def assert_explained(
    node: Node, cool: Callable[[], object], *, stream: bool, mark: bytes = HEADER
) -> None:
    """Cool a function down several times; each time its next call is told of its whole wait."""
    waits, unexplained = [], []
    for _ in range(NUM_RUNS):
        cool()
        waited_s, phases = ask(node, stream=stream, mark=mark)
        assert list(phases)[:2] == ["gateway", "queue"]
        assert "weights_read" in phases
        assert sum(phases.values()) <= waited_s + 0.0001 * len(phases), "each of them is rounded"
        waits.append(waited_s)
        unexplained.append(waited_s - sum(phases.values()))
    allowed_s = max(SHARE * statistics.median(waits), LEAST_S)
    assert statistics.median(unexplained) <= allowed_s, (waits, unexplained)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_wake_is_told_as_the_client_measures_it(
    node: Node, spec: FunctionSpec, stream: bool
) -> None:
    node.deploy(spec)
    node.operate("warm")
    assert_explained(node, lambda: node.operate("park"), stream=stream)


def test_a_start_is_told_as_the_client_measures_it(node: Node, spec: FunctionSpec) -> None:
    node.deploy(spec)
    assert_explained(node, lambda: node.operate("stop"), stream=False)


def test_a_stream_that_has_begun_with_a_heartbeat_tells_its_wait_in_a_comment(
    impatient: Node, spec: FunctionSpec
) -> None:
    impatient.deploy(spec)
    impatient.operate("warm")
    assert_explained(impatient, lambda: impatient.operate("park"), stream=True, mark=COMMENT)
