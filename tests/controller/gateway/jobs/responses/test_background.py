"""Responses that nobody waits for."""

import asyncio
from typing import Any, cast

import openai
import pytest
from openai.types.responses import Response
from sqlalchemy import func, select

from controller.errors import ContextLengthExceeded
from controller.requests import service
from controller.store.database import Database
from controller.store.tables import responses as responses_table
from tests.controller.gateway.test_tools import Speaker


async def over(sdk: openai.AsyncOpenAI, response_id: str) -> Response:
    async with asyncio.timeout(30):
        while True:
            found = await sdk.responses.retrieve(response_id)
            if found.status != "in_progress":
                return found
            await asyncio.sleep(0.02)


async def test_response_is_made_in_the_background(
    sdk: openai.AsyncOpenAI, function: Speaker
) -> None:
    go_on = asyncio.Event()
    function.script = lambda request: [go_on, *function.play(request)]
    accepted = await sdk.responses.create(model="tiny", input="hello", background=True)
    assert (accepted.status, accepted.background, accepted.output) == ("queued", True, [])
    await function.entered.wait()
    waiting = await sdk.responses.retrieve(accepted.id)
    assert waiting.status == "in_progress"
    with pytest.raises(openai.BadRequestError, match="no answer to go on from"):
        await sdk.responses.create(model="tiny", input="x", previous_response_id=accepted.id)
    with pytest.raises(openai.ConflictError, match="cancel it first"):
        await sdk.responses.delete(accepted.id)
    items = (await sdk.responses.input_items.list(accepted.id)).data
    go_on.set()
    done = await over(sdk, accepted.id)
    assert (done.status, done.output_text) == ("completed", function.text)
    assert (done.id, done.created_at) == (accepted.id, accepted.created_at)
    assert (await sdk.responses.input_items.list(accepted.id)).data == items
    assert await sdk.responses.cancel(accepted.id) == done
    await sdk.responses.create(model="tiny", input="x", previous_response_id=done.id)
    assert f"<|im_start|>assistant\n{function.text}<|im_end|>" in function.prompt
    await sdk.responses.delete(done.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(done.id)
    listed = await sdk.get("/requests", cast_to=object)
    assert cast("Any", listed)["data"] == []


async def test_response_in_the_background_is_cancelled(
    sdk: openai.AsyncOpenAI, function: Speaker
) -> None:
    function.script = lambda request: [asyncio.Event()]
    accepted = await sdk.responses.create(model="tiny", input="hello", background=True)
    await function.entered.wait()
    assert (await sdk.responses.cancel(accepted.id)).status == "cancelled"
    assert function.num_running == 0
    assert (await sdk.responses.retrieve(accepted.id)).status == "cancelled"
    assert (await sdk.responses.cancel(accepted.id)).status == "cancelled"
    function.script = function.play
    made = await sdk.responses.create(model="tiny", input="x")
    with pytest.raises(openai.BadRequestError, match="not made in the background"):
        await sdk.responses.cancel(made.id)


async def test_response_in_the_background_fails_with_its_reason(
    sdk: openai.AsyncOpenAI, function: Speaker
) -> None:
    function.script = lambda request: [ContextLengthExceeded("too long after all")]
    accepted = await sdk.responses.create(model="tiny", input="hello", background=True)
    failed = await over(sdk, accepted.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("invalid_prompt", "too long after all")
    request_id = accepted.id.replace("resp_", "req_")
    await sdk.delete(f"/requests/{request_id}", cast_to=object)
    assert (await sdk.responses.retrieve(accepted.id)).status == "failed"


async def test_response_in_the_background_is_refused_at_once_if_it_can_be(
    sdk: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        await sdk.responses.create(model="tiny", input="x" * 50_000, background=True)
    monkeypatch.setattr(service, "MAX_LIVE", 0)
    with pytest.raises(openai.RateLimitError):
        await sdk.responses.create(model="tiny", input="x", background=True)
    count = await database.run(
        lambda c: c.execute(select(func.count(responses_table.c.id))).scalar()
    )
    assert count == 0
