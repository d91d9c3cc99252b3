import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from controller.errors import ActivationTimeout, RuntimeDied
from controller.gateway import stalls
from controller.metrics import Metrics
from controller.scaling.activation import PhaseTiming
from controller.scaling.generation import GenerationRequest, TokenChunk
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.asgi import AsgiCall, events
from tests.fakes.function import FakeFunction, Step

PATH = "/v1/chat/completions"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
NEVER = 3600.0
AT_ONCE = 0.001


def body(**fields: Any) -> list[bytes]:
    return [json.dumps({**HELLO, "stream": True, **fields}).encode()]


@pytest.fixture
def ready(function: FakeFunction, answer_tokens: list[int]) -> asyncio.Event:
    """Set it to let the function, parked until then, answer."""
    event = asyncio.Event()
    last = TokenChunk([2], finish_reason="stop")
    function.tier = "parked"
    function.script = lambda request: [event, TokenChunk(answer_tokens), last]
    return event


async def test_stream_waits_for_the_first_token_before_it_answers(
    make_app: AppMaker, ready: asyncio.Event
) -> None:
    call = AsgiCall(make_app(heartbeat_s=NEVER), PATH, body())
    await asyncio.sleep(0.02)
    assert call.messages == []
    ready.set()
    assert events(await call.finished())[-1] == "[DONE]"
    assert call.headers["x-coldspark-queue-ms"] == "12"


async def test_waiting_stream_gets_comments_with_the_rest_of_the_cold_start(
    make_app: AppMaker, function: FakeFunction, ready: asyncio.Event
) -> None:
    function.eta_s = 0.42
    call = AsgiCall(make_app(heartbeat_s=AT_ONCE), PATH, body())
    await call.seen(": waking, 0.4 s left\n\n: waking, 0.4 s left\n\n")
    assert call.status == 200
    assert call.headers["x-coldspark-tier"] == "parked"
    assert "x-coldspark-queue-ms" not in call.headers
    ready.set()
    text = await call.finished()
    assert events(text)[-1] == "[DONE]"
    assert "data: " not in text.partition(": waking")[0]


TIMELINE = (PhaseTiming("queue", 0.0004), PhaseTiming("weights_read", 0.25))
TIMED = "queue;dur=0.4, weights_read;dur=250.0"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_says_where_the_wait_for_a_cold_start_went(
    make_app: AppMaker, function: FakeFunction, ready: asyncio.Event, stream: bool
) -> None:
    function.timeline = TIMELINE
    ready.set()
    call = AsgiCall(make_app(heartbeat_s=NEVER), PATH, body(stream=stream))
    assert ": timing" not in await call.finished()
    assert call.headers["server-timing"] == TIMED


async def test_a_stream_whose_headers_are_out_says_it_in_a_comment_before_the_text(
    make_app: AppMaker, function: FakeFunction, ready: asyncio.Event
) -> None:
    function.timeline = TIMELINE
    call = AsgiCall(make_app(heartbeat_s=AT_ONCE), PATH, body())
    await call.seen(": waking")
    ready.set()
    text = await call.finished()
    assert "server-timing" not in call.headers
    assert text.count(": timing") == 1
    before, after = text.split(f": timing {TIMED}\n\n")
    assert "data: " not in before
    assert after.startswith("data: ")


async def test_a_warm_answer_has_no_timeline(make_app: AppMaker, function: FakeFunction) -> None:
    call = AsgiCall(make_app(heartbeat_s=NEVER), PATH, body())
    assert ": timing" not in await call.finished()
    assert "server-timing" not in call.headers


async def test_comment_says_less_when_the_rest_is_not_known(
    make_app: AppMaker, function: FakeFunction, ready: asyncio.Event
) -> None:
    call = AsgiCall(make_app(heartbeat_s=AT_ONCE), PATH, body())
    await call.seen(": waking\n\n: waking\n\n")
    ready.set()
    await call.finished()


async def test_warm_but_queued_stream_is_told_to_wait(
    make_app: AppMaker, function: FakeFunction, ready: asyncio.Event
) -> None:
    function.tier = "ready"
    call = AsgiCall(make_app(heartbeat_s=AT_ONCE), PATH, body())
    await call.seen(": waiting\n\n")
    ready.set()
    await call.finished()


async def test_failure_after_a_heartbeat_is_an_event_without_done(
    make_app: AppMaker, function: FakeFunction, metrics: Metrics
) -> None:
    fail = asyncio.Event()
    function.script = lambda request: [fail, ActivationTimeout("no replica in 10 s")]
    call = AsgiCall(make_app(heartbeat_s=AT_ONCE), PATH, body())
    await call.seen(": waiting")
    fail.set()
    text = await call.finished()
    assert events(text) == [
        {
            "error": {
                "message": "no replica in 10 s",
                "type": "server_error",
                "param": None,
                "code": "activation_timeout",
            }
        }
    ]
    assert call.messages[-1]["more_body"] is False
    assert isinstance(function.generations[0].left_with, ActivationTimeout)
    assert b'requests_total{code="504",cold="false",function="tiny"} 1.0' in metrics.render()


async def test_runtime_that_dies_mid_stream_ends_it_with_an_error_and_no_done(
    make_app: AppMaker, function: FakeFunction, answer_tokens: list[int]
) -> None:
    function.script = lambda request: [TokenChunk(answer_tokens[:8]), RuntimeDied("it is gone")]
    call = AsgiCall(make_app(), PATH, body(stream_options={"include_usage": True}))
    *chunks, last = events(await call.finished())
    assert last["error"]["code"] == "runtime_died"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert not any(chunk["usage"] for chunk in chunks)


async def test_defect_mid_stream_is_an_error_event_too(
    make_app: AppMaker, function: FakeFunction, answer_tokens: list[int]
) -> None:
    function.script = lambda request: [TokenChunk(answer_tokens[:8]), KeyError("bug")]
    with capture_logs() as logs:
        call = AsgiCall(make_app(), PATH, body())
        last = events(await call.finished())[-1]
    assert [entry["event"] for entry in logs] == ["stream_failed"]
    assert last["error"]["code"] == "internal_error"
    assert "bug" not in last["error"]["message"]


async def test_generation_without_an_end_is_not_passed_off_as_complete(
    make_app: AppMaker, function: FakeFunction, answer_tokens: list[int]
) -> None:
    function.script = lambda request: [TokenChunk(answer_tokens[:8])]
    call = AsgiCall(make_app(), PATH, body())
    assert events(await call.finished())[-1]["error"]["code"] == "internal_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_while_nothing_was_sent_ends_the_generation(
    make_app: AppMaker,
    function: FakeFunction,
    ready: asyncio.Event,
    metrics: Metrics,
    stream: bool,
) -> None:
    call = AsgiCall(make_app(heartbeat_s=NEVER), PATH, body(stream=stream))
    await function.entered.wait()
    call.leave()
    await call.finished()
    assert call.messages == []
    assert isinstance(function.generations[0].left_with, asyncio.CancelledError)
    expected = b'client_disconnects_total{function="tiny",phase="waiting"} 1.0'
    assert expected in metrics.render()
    assert b'requests_total{code="499",cold="true",function="tiny"} 1.0' in metrics.render()


async def test_client_that_leaves_between_heartbeats_ends_the_generation(
    make_app: AppMaker, function: FakeFunction, ready: asyncio.Event
) -> None:
    call = AsgiCall(make_app(heartbeat_s=AT_ONCE), PATH, body())
    await call.seen(": waking")
    call.leave()
    await call.finished()
    assert isinstance(function.generations[0].left_with, asyncio.CancelledError)
    assert function.num_running == 0


async def test_client_that_leaves_mid_stream_ends_every_generation_of_the_call(
    make_app: AppMaker, function: FakeFunction, answer_tokens: list[int], metrics: Metrics
) -> None:
    never = asyncio.Event()
    function.script = lambda request: [TokenChunk(answer_tokens[:8]), never]
    request = {"model": "tiny", "prompt": ["a", "b", "c"], "stream": True}
    call = AsgiCall(make_app(), "/v1/completions", [json.dumps(request).encode()])
    await call.seen('"index":2')
    assert function.num_running == 3
    call.leave()
    await call.finished()
    assert function.num_running == 0
    assert "[DONE]" not in call.text
    expected = b'client_disconnects_total{function="tiny",phase="streaming"} 1.0'
    assert expected in metrics.render()


async def test_connection_that_breaks_counts_as_leaving(
    make_app: AppMaker, function: FakeFunction, ready: asyncio.Event
) -> None:
    call = AsgiCall(make_app(heartbeat_s=NEVER), PATH, body())
    await function.entered.wait()
    call.break_connection()
    await call.finished()
    assert isinstance(function.generations[0].left_with, asyncio.CancelledError)


async def test_client_that_leaves_after_the_last_byte_changes_nothing(
    make_app: AppMaker, function: FakeFunction, metrics: Metrics
) -> None:
    call = AsgiCall(make_app(), PATH, body())
    await call.seen("[DONE]")
    call.leave()
    await call.finished()
    assert function.generations[0].record.outcome == "stop"
    assert b'code="200"' in metrics.render()
    assert b'code="499"' not in metrics.render()


async def test_client_that_stops_reading_loses_its_generation(
    make_app: AppMaker,
    function: FakeFunction,
    ready: asyncio.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stalls, "WRITE_TIMEOUT_S", 0.01)
    call = AsgiCall(make_app(heartbeat_s=NEVER), PATH, body())
    call.hold_sends.clear()
    ready.set()
    await call.finished()
    assert function.num_running == 0
    assert call.messages == []


async def test_shutting_down_the_server_ends_the_generation(
    make_app: AppMaker, function: FakeFunction, ready: asyncio.Event
) -> None:
    call = AsgiCall(make_app(heartbeat_s=NEVER), PATH, body())
    await function.entered.wait()
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.finished()
    assert function.num_running == 0


@settings(max_examples=60)
@given(
    chunks=st.lists(st.lists(st.integers(0, 399), max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="aeirt .,", min_size=1, max_size=3), max_size=3),
)
def test_stream_joins_to_the_whole_for_any_tokens_chunks_and_stops(
    make_app: AppMaker, function: FakeFunction, chunks: list[list[int]], stops: list[str]
) -> None:
    def script(request: GenerationRequest) -> Iterable[Step]:
        yield from map(TokenChunk, chunks)
        yield TokenChunk([], finish_reason="length")

    def one_by_one(request: GenerationRequest) -> Iterable[Step]:
        yield from (TokenChunk([token_id]) for chunk in chunks for token_id in chunk)
        yield TokenChunk([], finish_reason="length")

    async def ask() -> None:
        request = {"model": "tiny", "prompt": "x", "stop": stops, "max_tokens": 100}
        async with client_of(make_app()) as client:
            function.script = script
            whole = (await client.post("/v1/completions", json=request)).json()["choices"][0]
            function.script = one_by_one
            response = await client.post("/v1/completions", json={**request, "stream": True})
        *streamed, done = events(response.text)
        texts = [chunk["choices"][0]["text"] for chunk in streamed]
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in streamed]
        assert "".join(texts) == whole["text"]
        assert all(texts[:-1])
        assert reasons == [None] * (len(reasons) - 1) + [whole["finish_reason"]]
        assert done == "[DONE]"
        assert not any(stop in whole["text"] for stop in stops)

    asyncio.run(ask())
