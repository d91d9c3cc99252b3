"""The life of a function with real processes: the main job, and what happens when parts die."""

import json
import os
import signal
import sqlite3
import threading
from contextlib import closing, suppress
from typing import Any

import httpx
import openai
import psutil
import pytest

from functions.spec import FunctionSpec
from tests.e2e.conftest import Node, wait_for, with_scaling

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]

PARIS = "The capital of France is Paris."


def test_cold_warm_parked_and_awake_again(node: Node, spec: FunctionSpec) -> None:
    node.deploy(with_scaling(spec, idle_timeout=1.0))
    assert node.view()["tier"] == "stopped"
    assert node.ask() == PARIS
    warm = node.view()
    assert warm["tier"] == "ready"
    parked = wait_for(lambda: settled_in(node, "parked"), "parking")
    (before,), (after,) = warm["replicas"], parked["replicas"]
    assert before["memory"]["weights_bytes"] > 200 << 20
    assert after["memory"]["weights_bytes"] == after["memory"]["kv_cache_bytes"] == 0
    assert after["freed_bytes"] > 200 << 20
    rss_drop = before["memory"]["host_rss_bytes"] - after["memory"]["host_rss_bytes"]
    assert rss_drop > 200 << 20, "the memory must really go back"
    assert node.ask() == PARIS
    assert node.view()["replicas"][0]["id"] == before["id"], "woken, not started anew"
    starts = wait_for(lambda: _cold_starts(node, 2), "the journal")
    assert [start["from_tier"] for start in starts] == ["parked", "stopped"]
    node.operate("stop")
    assert not node.runtimes()


@pytest.mark.timeout(180)
def test_a_snapshot_damaged_on_disk_is_built_anew(
    node_with_own_store: Node, spec: FunctionSpec
) -> None:
    node, store = node_with_own_store, node_with_own_store.home / "snapshots"
    node.deploy(spec)
    ref = node.view()["snapshot"]
    weights = next((store / ref).rglob("*.safetensors"))
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(openai.InternalServerError, match="being built anew") as told:
        node.ask()
    assert told.value.status_code == 503
    assert "tensors: " in str(told.value), "the message names what is damaged"
    wait_for(lambda: node.view()["snapshot_state"] == "ready", "the new build", 120.0)
    assert node.ask() == PARIS
    assert (store / ".quarantine" / ref / "quarantine.txt").exists()


def test_a_stream_and_its_whole_answer_agree(node: Node, spec: FunctionSpec) -> None:
    node.deploy(spec)
    with node.client() as client:
        stream = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == PARIS
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens == 37
    assert usage.completion_tokens == 8


def test_killing_the_runtime_in_a_stream_is_an_error_and_the_next_call_works(
    node: Node, spec: FunctionSpec
) -> None:
    node.deploy(spec)
    node.operate("warm")
    body = {
        "model": "smollm2",
        "prompt": "Once upon a time",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
    }
    events: list[Any] = []
    with httpx.stream("POST", f"{node.url}/v1/completions", json=body, timeout=60.0) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
            if len(events) == 3:
                _kill_runtimes(node)
    assert "[DONE]" not in events, "a broken stream must not look whole"
    assert json.loads(events[-1])["error"]["code"] == "runtime_died"
    assert node.ask() == PARIS
    wait_for(lambda: len(node.view()["replicas"]) == 1, "the dead replica's removal")


def test_killing_the_engine_before_the_first_token_goes_unnoticed(
    node: Node, spec: FunctionSpec
) -> None:
    node.deploy(spec)
    node.operate("warm")
    for server in node.runtimes():
        for child in server.children(recursive=True):
            child.send_signal(signal.SIGSTOP)
    with node.client() as client:
        pending = client.with_options(timeout=60.0)
        killer = threading.Timer(1.0, _kill_runtimes, [node])
        killer.start()
        answer = pending.completions.create(
            model="smollm2", prompt="The capital of France is", max_tokens=3, temperature=0
        )
        killer.join()
    assert "Paris" in answer.choices[0].text


def test_a_killed_controller_adopts_its_runtime_and_loses_no_second(
    node: Node, spec: FunctionSpec
) -> None:
    node.deploy(spec)
    assert node.ask() == PARIS
    (server,) = [p for p in node.runtimes() if p.ppid() and "runtime.main" in p.cmdline()]
    replica_id = node.view()["replicas"][0]["id"]
    node.kill()
    assert server.is_running()
    node.start()
    view = node.view()
    assert view["tier"] == "ready"
    assert view["replicas"][0]["id"] == replica_id
    assert node.ask() == PARIS
    assert server.is_running(), "adopted, not replaced"
    node.operate("stop")
    assert node.terminate() == 0
    assert {"starting", "loading", "active", "idle"} <= assert_books_have_no_gap(node)


def test_a_controller_that_ends_in_order_leaves_runtimes_to_the_next(
    node: Node, spec: FunctionSpec
) -> None:
    node.deploy(spec)
    node.operate("warm")
    assert node.terminate() == 0
    assert node.runtimes()
    node.start()
    assert node.view()["tier"] == "ready"
    assert node.ask() == PARIS
    response = httpx.delete(f"{node.url}/api/v1/functions/smollm2", timeout=60.0)
    assert response.status_code == 204
    assert not node.runtimes()
    with pytest.raises(openai.NotFoundError):
        node.ask()


def test_bad_input_never_reaches_the_engine(node: Node, spec: FunctionSpec) -> None:
    node.deploy(spec)
    node.operate("warm")
    (engine,) = [
        child
        for server in node.runtimes()
        for child in server.children(recursive=True)
        if child.pid == _engine_pid(server)
    ]
    url = f"{node.url}/v1/completions"
    good = {"model": "smollm2", "prompt": "Hi", "max_tokens": 2}
    cases: list[tuple[int, dict[str, Any]]] = [
        (404, {"model": "../../etc"}),
        (400, {"max_tokens": -1}),
        (400, {"prompt": "word " * 20_000}),
        (400, {"prompt": [1 << 40]}),
        (400, {"logit_bias": {"999999999": 1000}}),
        (400, {"temperature": "hot"}),
        (400, {"stop": ["x"] * 1000}),
        (413, {"prompt": "x" * (10 << 20)}),
    ]
    for status, change in cases:
        answer = httpx.post(url, json=good | change, timeout=60.0)
        assert answer.status_code == status, (change, answer.text[:300])
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    broken = httpx.post(url, content=b'{"model": ', headers={"content-type": "application/json"})
    assert broken.status_code == 400
    assert httpx.post(url, json=good, timeout=60.0).status_code == 200
    assert engine.is_running()


def assert_books_have_no_gap(node: Node) -> set[str]:
    """Every microsecond between the first and the last is told exactly once; by which states."""
    with closing(sqlite3.connect(node.home / "coldspark.db")) as database:
        intervals = database.execute(
            "select start_us, end_us, share_ppm, state from intervals where end_us is not null"
        ).fetchall()
    told = sum((end - start) * share for start, end, share, _ in intervals)
    first = min(start for start, _, _, _ in intervals)
    last = max(end for _, end, _, _ in intervals)
    assert told == (last - first) * 1_000_000
    return {state for *_, state in intervals}


def settled_in(node: Node, tier: str) -> Any:
    """Return the function's view once it and all its replicas are in a tier."""
    view = node.view()
    is_settled = all(replica["state"] == tier for replica in view["replicas"])
    return view if view["tier"] == tier and is_settled else None


def _cold_starts(node: Node, number: int) -> Any:
    starts = node.get("/api/v1/cold-starts")["cold_starts"]
    return starts if len(starts) >= number else None


def _kill_runtimes(node: Node) -> None:
    for process in node.runtimes():
        with suppress(psutil.NoSuchProcess):  # one may have ended with another
            process.kill()


def _engine_pid(server: psutil.Process) -> int:
    """The engine is the youngest descendant."""
    return max(server.children(recursive=True), key=lambda child: child.create_time()).pid
