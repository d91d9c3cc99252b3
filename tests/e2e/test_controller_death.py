"""A controller that is killed while a replica is on its way from one state into another."""

import threading
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from functions.spec import FunctionSpec
from tests.e2e.conftest import Node, wait_for
from tests.e2e.test_life import PARIS, assert_books_have_no_gap

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]

SHORT = {"model": "smollm2", "prompt": "Once", "max_tokens": 1}
ENDLESS = SHORT | {"max_tokens": 2000, "ignore_eos": True}


class Call:
    """A request that is made in a thread; nobody answers it once the controller is dead."""

    def __init__(self, node: Node, path: str, **body: Any) -> None:
        self._outcome: httpx.Response | httpx.TransportError | None = None

        def post() -> None:
            try:
                self._outcome = httpx.post(node.url + path, json=body, timeout=120.0)
            except httpx.TransportError as error:
                self._outcome = error

        self._thread = threading.Thread(target=post, name=f"call {path}")
        self._thread.start()

    def outcome(self) -> httpx.Response | httpx.TransportError | None:
        self._thread.join()
        return self._outcome


def begin_loading(node: Node) -> list[Call]:
    return [Call(node, "/v1/completions", **SHORT)]


def begin_parking(node: Node) -> list[Call]:
    node.operate("warm")
    engine(node).suspend()  # what it is told has to wait
    return [Call(node, "/api/v1/functions/smollm2/park")]


def begin_waking(node: Node) -> list[Call]:
    node.operate("warm")
    node.operate("park")
    engine(node).suspend()
    return [Call(node, "/v1/completions", **SHORT)]


def begin_draining(node: Node) -> list[Call]:
    node.operate("warm")
    running = Call(node, "/v1/completions", **ENDLESS)
    wait_for(lambda: node.view()["in_flight"], "a request in flight")
    return [running, Call(node, "/api/v1/functions/smollm2/stop")]


def engine(node: Node) -> psutil.Process:
    (found,) = [
        child
        for server in servers(node)
        for child in server.children(recursive=True)
        if child.name() == "engine"
    ]
    return found


def servers(node: Node) -> list[psutil.Process]:
    return [process for process in node.runtimes() if "runtime.main" in process.cmdline()]


@pytest.mark.parametrize(
    ("begin", "state"),
    [
        (begin_loading, "loading"),
        (begin_parking, "parking"),
        (begin_waking, "loading"),
        (begin_draining, "draining"),
    ],
    ids=["loading", "parking", "waking", "draining"],
)
def test_a_controller_killed_in_between_costs_its_callers_only_their_calls(
    node: Node, spec: FunctionSpec, begin: Callable[[Node], list[Call]], state: str
) -> None:
    node.deploy(spec)
    calls = begin(node)
    wait_for(lambda: [r["state"] for r in node.view()["replicas"]] == [state], state)
    node.kill()
    for call in calls:
        assert isinstance(call.outcome(), httpx.TransportError), "it was not over yet"
    for server in servers(node):
        for process in server.children(recursive=True):
            process.resume()
    node.start()
    assert node.ask() == PARIS
    wait_for(lambda: len(servers(node)) == 1, "the end of all that nobody knows")
    (replica,) = node.view()["replicas"]
    assert replica["state"] == "ready"
    node.operate("stop")
    wait_for(lambda: not node.runtimes(), "the end of all processes")
    assert node.terminate() == 0
    assert_books_have_no_gap(node)
