"""Streamed responses: every event against the SDK's own type of its name."""

import asyncio
import json
from collections.abc import Iterable
from itertools import cycle
from typing import Any, cast

import httpx
import openai
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from controller.errors import QueueFull, RuntimeDied
from controller.gateway.routes import responses
from controller.scaling.generation import GenerationRequest, TokenChunk
from controller.store import tables
from controller.store.database import Database
from controller.store.errors import NotStored
from controller.store.responses import Responses
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.controller.gateway.jobs.responses.helpers import (
    BEGIN,
    CALL,
    END,
    HELLO,
    PATH,
    TEXT_EVENTS,
    TOOL,
    anonymous,
    post,
    runs,
    stream,
)
from tests.controller.gateway.test_tools import Speaker
from tests.fakes.asgi import AsgiCall
from tests.fakes.function import Step


async def test_streamed_text(client: httpx.AsyncClient, function: Speaker) -> None:
    events = await stream(client)
    assert runs(events) == [*BEGIN, *TEXT_EVENTS, *END]
    created, *_, part_done, item_done, last = events
    assert created["response"]["status"] == "in_progress"
    assert created["response"]["output"] == []
    assert created["response"]["usage"] is None
    deltas = [one for one in events if one["type"] == "response.output_text.delta"]
    assert len(deltas) > 5
    assert "".join(one["delta"] for one in deltas) == part_done["part"]["text"] == function.text
    assert {one["item_id"] for one in [*deltas, part_done]} == {item_done["item"]["id"]}
    assert last["response"]["output"] == [item_done["item"]]
    assert last["response"]["id"] == created["response"]["id"]
    assert last["response"]["usage"]["output_tokens"] > 5
    kept = (await client.get(f"{PATH}/{last['response']['id']}")).json()
    assert kept == last["response"]


async def test_stream_helper(sdk: openai.AsyncOpenAI, function: Speaker) -> None:
    async with sdk.responses.stream(model="tiny", input="hello") as opened:
        deltas = [one.delta async for one in opened if one.type == "response.output_text.delta"]
        final = await opened.get_final_response()
    assert "".join(deltas) == final.output_text == function.text
    assert (await sdk.responses.retrieve(final.id)).output_text == function.text


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_answer_that_reaches_its_limit_is_incomplete(
    client: httpx.AsyncClient, function: Speaker, is_streamed: bool
) -> None:
    tokens = function.tokenizer.encode(function.text).ids[:3]
    function.script = lambda request: [TokenChunk(tokens, finish_reason="length")]
    if is_streamed:
        *_, last = await stream(client, max_output_tokens=3)
        assert last["type"] == "response.incomplete"
        response = last["response"]
    else:
        response = await post(client, max_output_tokens=3)
    assert function.generations[-1].request.sampling.max_tokens == 3
    assert response["status"] == response["output"][-1]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None
    assert (await client.get(f"{PATH}/{response['id']}")).json() == response


async def test_answer_of_nothing_is_an_empty_message(
    client: httpx.AsyncClient, function: Speaker
) -> None:
    function.text = ""
    whole = await post(client)
    assert whole["output"][0]["content"][0]["text"] == ""
    assert runs(await stream(client)) == [
        *BEGIN, *(one for one in TEXT_EVENTS if "delta" not in one), *END,
    ]  # fmt: skip


async def test_failure_in_a_stream_ends_it_as_failed(
    client: httpx.AsyncClient, function: Speaker
) -> None:
    tokens = function.tokenizer.encode(function.text).ids[:8]
    function.script = lambda request: [TokenChunk(tokens), RuntimeDied("it is gone")]
    *_, last = await stream(client)
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "it is gone"}
    assert (await client.get(f"{PATH}/{last['response']['id']}")).status_code == 404


async def test_failure_before_the_first_token_has_a_status(
    sdk: openai.AsyncOpenAI, function: Speaker
) -> None:
    function.refusal = QueueFull("full", retry_after_s=1)
    for is_streamed in (False, True):
        with pytest.raises(openai.RateLimitError):
            await sdk.responses.create(model="tiny", input="x", stream=is_streamed)
    with pytest.raises(openai.NotFoundError, match="no function serves"):
        await sdk.responses.create(model="other", input="x")


async def test_leaving_ends_a_whole_response_and_keeps_nothing(
    app: FastAPI, function: Speaker, database: Database
) -> None:
    tokens = function.tokenizer.encode(function.text).ids[:8]
    reached = asyncio.Event()

    def script(request: GenerationRequest) -> Iterable[Step]:
        yield TokenChunk(tokens)
        reached.set()
        yield asyncio.Event()

    function.script = script
    call = AsgiCall(app, PATH, [json.dumps(HELLO).encode()], headers={"host": "localhost"})
    await reached.wait()
    call.leave()
    await call.finished()
    assert function.num_running == 0
    assert call.messages == []
    assert await database.run(lambda c: c.execute(select(tables.responses)).all()) == []


async def test_leaving_ends_the_response_and_keeps_nothing(
    app: FastAPI, function: Speaker, database: Database
) -> None:
    tokens = function.tokenizer.encode(function.text).ids[:8]
    function.script = lambda request: [TokenChunk(tokens), asyncio.Event()]
    body = json.dumps({**HELLO, "stream": True}).encode()
    call = AsgiCall(app, PATH, [body], headers={"host": "localhost"})
    text = await call.seen("output_text.delta")
    call.leave()
    await call.finished()
    assert function.num_running == 0
    created = json.loads(text.split("\n")[1].removeprefix("data: "))["response"]
    with pytest.raises(NotStored):
        await database.run(lambda c: Responses(c).get(created["id"], key_id=None))


PARTS = st.sampled_from(
    [CALL, "so ", "<tool_call>", "東京", "\n", '{"name": ', "</tool_call>", "é", "</think>"]
)


@settings(max_examples=25)
@given(
    parts=st.lists(PARTS, max_size=6),
    sizes=st.lists(st.integers(1, 40), min_size=1),
    thinks=st.booleans(),
)
def test_stream_tells_the_same_as_the_whole_however_it_is_cut(
    make_app: AppMaker,
    function: Speaker,
    thinker: Speaker,
    parts: list[str],
    sizes: list[int],
    thinks: bool,
) -> None:
    function = thinker if thinks else function
    function.text = "".join(parts)
    tokens = function.tokenizer.encode(function.text).ids

    def cut(request: GenerationRequest) -> Iterable[Step]:
        at = 0
        for size in cycle(sizes):
            if at >= len(tokens):
                break
            yield TokenChunk(tokens[at : at + size])
            at += size
        yield TokenChunk([2], finish_reason="stop")

    async def ask() -> None:
        app = make_app(
            function, extra_routers=[responses.response_making_router(cast("Any", None))]
        )
        async with client_of(app) as client:
            whole = await post(client, tools=[TOOL], store=False)
            function.script = cut
            events = await stream(client, tools=[TOOL], store=False)
        function.script = function.play
        streamed = events[-1]["response"]["output"]
        assert anonymous(streamed) == anonymous(whole["output"])
        for index, item in enumerate(streamed):
            mine = [event for event in events if event.get("output_index") == index]
            deltas = "".join(event.get("delta", "") for event in mine)
            assert deltas == item.get(
                "arguments", "".join(p["text"] for p in item.get("content", ()))
            )

    asyncio.run(ask())
