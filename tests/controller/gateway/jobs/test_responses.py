"""The Responses API through the official SDK, over a function that says what it is told to."""

import asyncio
import json
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from sqlalchemy import func, select
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from controller.errors import ContextLengthExceeded, QueueFull, RuntimeDied
from controller.gateway.auth import ApiKey, hash_key
from controller.gateway.grammars import json_grammar
from controller.gateway.response_api import beginning
from controller.gateway.routes import responses
from controller.requests import service
from controller.scaling.generation import GenerationRequest, TokenChunk
from controller.store.database import Database
from controller.store.errors import DatabaseUnavailable, NotStored
from controller.store.responses import Responses
from controller.store.tables import responses as responses_table
from runtime.rpc import inference_pb2 as pb
from tests.controller.gateway.conftest import AppMaker, FakeKeyStore, client_of
from tests.controller.gateway.jobs.test_requests import ended
from tests.controller.gateway.test_tools import THINKING_TEMPLATE, Speaker
from tests.fakes.asgi import AsgiCall
from tests.fakes.function import Step
from tests.fakes.tokenizers import write_snapshot

PATH = "/v1/responses"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
SAME: Any = {"model": "tiny"}
HELLO: dict[str, Any] = {"model": "tiny", "input": "hello"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def function(snapshot: Path, byte_level: Tokenizer) -> Speaker:
    return Speaker(snapshot, byte_level, "It is warm, 東京 too.")


@pytest.fixture
def thinker(tmp_path: Path, byte_level: Tokenizer) -> Speaker:
    snapshot = write_snapshot(
        tmp_path / "it@0", byte_level, eos_token="<|im_end|>", chat_template=THINKING_TEMPLATE
    )
    return Speaker(snapshot, byte_level, f"Hm, a city.\n</think>\n\nI see.\n{CALL}")


async def post(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(PATH, json={**HELLO, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    Response.model_validate(body)  # the SDK itself is lenient
    return body


async def test_text(sdk: openai.AsyncOpenAI, function: Speaker) -> None:
    response = await sdk.responses.create(
        model="tiny",
        input="hello",
        instructions="Be brief.",
        metadata={"k": "v"},
        temperature=0.5,
        user="someone",
    )
    assert response.output_text == function.text
    assert (response.status, response.error, response.incomplete_details) == (
        "completed", None, None,
    )  # fmt: skip
    assert (response.metadata, response.temperature) == ({"k": "v"}, 0.5)
    (message,) = response.output
    assert message.type == "message"
    assert message.id.startswith("msg_")
    assert response.usage is not None
    assert response.usage.input_tokens == len(function.generations[-1].request.prompt_token_ids)
    assert response.usage.output_tokens == len(function.tokenizer.encode(function.text).ids) + 1
    assert function.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "<|im_start|>user\nhello<|im_end|>" in function.prompt


async def test_kept_response_is_found_until_it_is_deleted(sdk: openai.AsyncOpenAI) -> None:
    made = await sdk.responses.create(model="tiny", input="hello")
    assert await sdk.responses.retrieve(made.id) == made
    items = await sdk.responses.input_items.list(made.id)
    (item,) = items.data
    assert item.type == "message"
    assert item.to_dict()["content"] == [{"type": "input_text", "text": "hello"}]
    await sdk.responses.delete(made.id)
    for call in (sdk.responses.retrieve, sdk.responses.delete):
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            await call(made.id)


# Storage.


async def test_conversation_goes_on_from_a_kept_response(
    sdk: openai.AsyncOpenAI, function: Speaker
) -> None:
    first = await sdk.responses.create(model="tiny", input="hello", instructions="Be brief.")
    second = await sdk.responses.create(
        model="tiny", input="and then?", previous_response_id=first.id
    )
    assert second.previous_response_id == first.id
    assert function.prompt == (
        "<|im_start|>user\nhello<|im_end|>\n"
        f"<|im_start|>assistant\n{function.text}<|im_end|>\n"
        "<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
    )
    await sdk.responses.delete(first.id)
    third = await sdk.responses.create(model="tiny", input="so?", previous_response_id=second.id)
    assert "<|im_start|>user\nhello<|im_end|>" in function.prompt
    listed = [item.to_dict() async for item in sdk.responses.input_items.list(third.id, limit=2)]
    said = [item["content"][0]["text"] for item in listed]  # type: ignore[index]
    assert said == ["so?", function.text, "and then?", function.text, "hello"]
    assert listed[1]["id"] == second.output[0].id
    page = await sdk.responses.input_items.list(third.id, order="asc", limit=1)
    assert (page.data[0].to_dict(), page.has_more) == (listed[-1], True)
    with pytest.raises(openai.NotFoundError, match="no item"):
        await sdk.responses.input_items.list(third.id, after="msg_0")


async def test_response_is_not_kept_if_that_is_asked(sdk: openai.AsyncOpenAI) -> None:
    made = await sdk.responses.create(model="tiny", input="hello", store=False)
    assert made.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.responses.create(model="tiny", input="x", previous_response_id=made.id)
    assert caught.value.param == "previous_response_id"
    assert caught.value.code == "previous_response_not_found"


class TestKeys:
    """Two callers."""

    @pytest.fixture
    def key_store(self) -> FakeKeyStore:
        keys = (ApiKey(id=one, name=one, key_hash=hash_key(f"sk-{one}")) for one in "ab")
        return FakeKeyStore(*keys)

    async def test_response_is_its_keys_alone(self, sdk: openai.AsyncOpenAI) -> None:
        hers, his = sdk.with_options(api_key="sk-a"), sdk.with_options(api_key="sk-b")
        made = await hers.responses.create(model="tiny", input="hello")
        for call in (his.responses.retrieve, his.responses.delete, his.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                await call(made.id)
        with pytest.raises(openai.BadRequestError, match="there is no response"):
            await his.responses.create(model="tiny", input="x", previous_response_id=made.id)
        assert (await hers.responses.retrieve(made.id)).id == made.id


async def test_answer_says_that_it_could_not_be_kept(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise DatabaseUnavailable("its disk is full")

    monkeypatch.setattr(Responses, "put", away)
    with capture_logs() as logs:
        response = await post(client)
    assert (response["status"], response["store"]) == ("completed", False)
    assert [entry["event"] for entry in logs] == ["response not kept"]


async def test_conversation_that_has_become_too_long_is_refused(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await post(client)
    monkeypatch.setattr(beginning, "MAX_MESSAGES", 2)
    answer = await client.post(PATH, json={**HELLO, "previous_response_id": first["id"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "previous_response_id")


async def test_ids_of_a_conversation_are_its_own(client: httpx.AsyncClient) -> None:
    first = await post(client, input=[{"role": "user", "content": "x", "id": "msg_1"}])
    again = [*first["output"], {"role": "user", "content": "y", "id": "msg_1"}]
    second = await post(client, input=again, previous_response_id=first["id"])
    listed = (await client.get(f"{PATH}/{second['id']}/input_items?order=asc")).json()
    ids = [item["id"] for item in listed["data"]]
    assert len(set(ids)) == len(ids) == 4
    assert ids[:2] == ["msg_1", first["output"][0]["id"]]
    assert [one.partition("_")[0] for one in ids] == ["msg"] * 4


# In the background.


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


# Streams.


def read_events(text: str) -> list[Any]:
    """Return a stream's events, each checked against the SDK's type of its name."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, _, data = block.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    answer = await client.post(PATH, json={**HELLO, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return read_events(answer.text)


def runs(events: list[Any]) -> list[str]:
    """Return the types of events, equal ones in a row once."""
    types = [event["type"].removeprefix("response.") for event in events]
    return [one for one, before in zip(types, ["", *types], strict=False) if one != before]


TEXT_EVENTS = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]
CALL_EVENTS = [
    "output_item.added",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "output_item.done",
]
THOUGHT_EVENTS = [one.replace("output_text", "reasoning_text") for one in TEXT_EVENTS]
BEGIN, END = ["created", "in_progress"], ["completed"]


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


# Tools.


async def test_calls_between_texts_are_items_in_order(
    client: httpx.AsyncClient, function: Speaker
) -> None:
    function.text = f"Let me see.\n{CALL}\nAnd again.\n{CALL}\n{CALL}"
    whole = await post(client, tools=[TOOL])
    kinds = [item["type"] for item in whole["output"]]
    assert kinds == ["message", "function_call", "message", "function_call", "function_call"]
    calls = [item for item in whole["output"] if item["type"] == "function_call"]
    assert {(one["name"], one["arguments"]) for one in calls} == {("weather", '{"city": "Zürich"}')}
    assert len({one["call_id"] for one in calls}) == 3
    assert whole["tools"][0]["name"] == "weather"
    events = await stream(client, tools=[TOOL])
    assert runs(events) == [
        *BEGIN, *TEXT_EVENTS, *CALL_EVENTS, *TEXT_EVENTS, *CALL_EVENTS, *CALL_EVENTS, *END,
    ]  # fmt: skip
    assert anonymous(events[-1]["response"]["output"]) == anonymous(whole["output"])


async def test_result_of_a_call_goes_on(sdk: openai.AsyncOpenAI, function: Speaker) -> None:
    function.text = CALL
    first = await sdk.responses.create(model="tiny", input="Is it warm?", tools=[TOOL])
    (call,) = first.output
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "25 °C"}
    function.text = "It is."
    kept = await sdk.responses.create(
        model="tiny", input=[result], previous_response_id=first.id, tools=[TOOL]
    )
    prompt = function.prompt
    assert kept.output_text == "It is."
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in prompt
    assert "<tool_response>\n25 °C\n</tool_response>" in prompt
    sent: Any = [{"role": "user", "content": "Is it warm?"}, call.to_dict(), result]
    await sdk.responses.create(model="tiny", input=sent, store=False, tools=[TOOL])
    assert function.prompt == prompt


@pytest.mark.parametrize(
    ("choice", "is_enforced"),
    [
        ("required", True),
        ({"type": "function", "name": "weather"}, True),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}, True),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}, False),
        ("auto", False),
    ],
)  # fmt: skip
async def test_required_calls_are_enforced(
    client: httpx.AsyncClient, function: Speaker, choice: Any, is_enforced: bool
) -> None:
    function.text = CALL
    response = await post(client, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert ("calls:" in function.grammar) == is_enforced
    assert response["tool_choice"] == choice
    assert response["parallel_tool_calls"] is False


async def test_typed_arguments_are_parsed(sdk: openai.AsyncOpenAI, function: Speaker) -> None:
    class weather(BaseModel):  # the tool's name
        city: str

    function.text = CALL
    tool = openai.pydantic_function_tool(weather)["function"]
    flat: Any = {"type": "function", **tool}
    response = await sdk.responses.parse(model="tiny", input="hello", tools=[flat])
    (call,) = response.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Zürich"}


# Forms, thoughts, log-probabilities.


class Person(BaseModel):
    name: str
    age: int


async def test_typed_text_is_parsed(sdk: openai.AsyncOpenAI, function: Speaker) -> None:
    function.text = '{"name":"Zoë","age":36}'
    parsed = await sdk.responses.parse(model="tiny", input="Who?", text_format=Person)
    assert parsed.output_parsed == Person(name="Zoë", age=36)
    matcher = LLMatcher(LLTokenizer("byte"), function.grammar, log_level=0)
    tokens = LLTokenizer("byte").tokenize_str(function.text)
    assert matcher.try_consume_tokens(tokens) == len(tokens)
    assert matcher.is_accepting()
    async with sdk.responses.stream(model="tiny", input="Who?", text_format=Person) as opened:
        final = await opened.get_final_response()
    assert final.output_parsed == parsed.output_parsed
    (again,) = (await sdk.responses.create(**SAME, input=parsed.output)).output  # type: ignore[arg-type]
    assert again.type == "message"


async def test_any_object(client: httpx.AsyncClient, function: Speaker) -> None:
    response = await post(client, text={"format": {"type": "json_object"}})
    assert function.grammar == json_grammar({"type": "object"})
    assert response["text"] == {"format": {"type": "json_object"}}
    assert (await post(client))["text"] == {"format": {"type": "text"}}


class TestThoughts:
    """A model that thinks."""

    @pytest.fixture
    def function(self, thinker: Speaker) -> Speaker:
        return thinker

    async def test_thought_is_an_item(self, client: httpx.AsyncClient) -> None:
        whole = await post(client, tools=[TOOL], reasoning={"effort": "low", "summary": "auto"})
        thought, message, call = whole["output"]
        assert thought["content"] == [{"type": "reasoning_text", "text": "Hm, a city."}]
        assert thought["summary"] == []
        assert message["content"][0]["text"] == "I see."
        assert call["type"] == "function_call"
        assert whole["reasoning"] == {"effort": "low", "summary": None}
        num_thought = whole["usage"]["output_tokens_details"]["reasoning_tokens"]
        assert 5 < num_thought < whole["usage"]["output_tokens"] - 20
        events = await stream(client, tools=[TOOL])
        assert runs(events) == [*BEGIN, *THOUGHT_EVENTS, *TEXT_EVENTS, *CALL_EVENTS, *END]
        assert anonymous(events[-1]["response"]["output"]) == anonymous(whole["output"])

    async def test_thought_can_be_sent_back(
        self, client: httpx.AsyncClient, function: Speaker
    ) -> None:
        first = await post(client, tools=[TOOL], include=["reasoning.encrypted_content"])
        result = {"type": "function_call_output", "output": "25", "call_id": "x"}
        result["call_id"] = first["output"][-1]["call_id"]
        before = [{"role": "user", "content": "hello"}, *first["output"]]
        await post(client, tools=[TOOL], input=[*before, result])
        prompt = function.prompt
        await post(client, tools=[TOOL], input=[result], previous_response_id=first["id"])
        assert function.prompt == prompt


async def test_log_probabilities(client: httpx.AsyncClient, function: Speaker) -> None:
    tokens = function.tokenizer.encode("so warm").ids
    found = [pb.TokenLogprobs(logprob=-0.5, top_token_ids=[104], top_logprobs=[-0.25])]
    function.script = lambda request: [
        *(TokenChunk([token], logprobs=found) for token in tokens),
        TokenChunk([], finish_reason="stop"),
    ]
    whole = await post(client, top_logprobs=1)
    told = whole["output"][0]["content"][0]["logprobs"]
    assert len(told) == len(tokens)
    assert (told[0]["logprob"], told[0]["top_logprobs"][0]["logprob"]) == (-0.5, -0.25)
    events = await stream(client, include=["message.output_text.logprobs"], top_logprobs=1)
    deltas = [one for one in events if one["type"] == "response.output_text.delta"]
    assert [entry for one in deltas for entry in one["logprobs"]] == told
    assert (await post(client))["output"][0]["content"][0]["logprobs"] == []


# Fields.


async def test_oldest_turns_are_left_out_if_that_is_asked(
    client: httpx.AsyncClient, function: Speaker
) -> None:
    function.max_model_len = 128
    turns: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    for number in range(12):
        turns.append({"role": "user", "content": f"question {number}"})
        turns.append({"role": "assistant", "content": f"answer {number}"})
    turns.append({"role": "user", "content": "last one"})
    refused = await client.post(PATH, json={**HELLO, "input": turns})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert refused.json()["error"]["param"] == "input"
    await post(client, input=turns, truncation="auto", max_output_tokens=16)
    prompt = function.prompt
    size = len(function.generations[-1].request.prompt_token_ids)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nquestion")
    assert prompt.endswith("<|im_start|>user\nlast one<|im_end|>\n<|im_start|>assistant\n")
    assert 128 - 16 - 60 < size <= 128 - 16
    too_long = {"role": "user", "content": "x" * 2000}
    refused = await client.post(PATH, json={**HELLO, "input": [too_long], "truncation": "auto"})
    assert refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0, "top_p": 0.5}, {"temperature": 0, "top_p": 0.5}),
        ({"seed": 7, "min_tokens": 2}, {"seed": 7, "min_tokens": 2}),
        ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
        ({"stop_token_ids": [5]}, {"stop_token_ids": [5]}),
    ],
)
async def test_fields_reach_the_engine(
    client: httpx.AsyncClient, function: Speaker, fields: Any, expected: Any
) -> None:
    await post(client, **fields)
    sampling = function.generations[-1].request.sampling
    wanted = pb.SamplingParams(**expected)
    assert all(getattr(sampling, name) == getattr(wanted, name) for name in expected)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content",
        ),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
            "input[0].encrypted_content",
        ),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 7}}}},
            "text.format",
        ),
        ({"text": {"format": {"type": "text"}}, "max_tokens": 3}, "max_tokens"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"stream_options": {}}, "stream_options"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
        ({"truncation": "sometimes"}, "truncation"),
    ],
)
async def test_what_is_not_honoured_is_named(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    answer = await client.post(PATH, json={**HELLO, **fields})
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["param"] or "").startswith(param), answer.text


async def test_harmless_fields_are_taken(client: httpx.AsyncClient) -> None:
    await post(
        client,
        background=False,
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        max_tool_calls=3,
        text={"verbosity": "medium"},
        reasoning={"summary": "detailed"},
    )


async def test_response_that_is_over_is_not_streamed(client: httpx.AsyncClient) -> None:
    made = await post(client)
    answer = await client.get(f"{PATH}/{made['id']}", params={"stream": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream")


async def test_response_can_be_asked_for_later(client: httpx.AsyncClient) -> None:
    body = {"endpoint": PATH, "body": {**HELLO, "metadata": {"k": "v"}}}
    accepted = (await client.post("/v1/requests", json=body)).json()
    done = await ended(client, accepted["id"])
    response = done["response"]["body"]
    assert response["status"] == "completed"
    assert (await client.get(f"{PATH}/{response['id']}")).json() == response


async def test_input_tokens_are_counted_without_waking(
    sdk: openai.AsyncOpenAI, function: Speaker
) -> None:
    first = await sdk.responses.create(model="tiny", input="hello")
    asked: Any = {
        "model": "tiny",
        "input": "and then?",
        "instructions": "Be brief.",
        "previous_response_id": first.id,
        "tools": [TOOL],
    }
    counted = await sdk.responses.input_tokens.count(**asked)
    assert len(function.generations) == 1
    made = await sdk.responses.create(**asked)
    assert made.usage is not None
    assert counted.input_tokens == made.usage.input_tokens


async def test_error_of_the_template_names_the_input(
    client: httpx.AsyncClient, function: Speaker, tmp_path: Path
) -> None:
    refusing = "{{ raise_exception('no such talk') }}"
    function.snapshot_path = write_snapshot(
        tmp_path / "no@0", function.tokenizer, eos_token="<|im_end|>", chat_template=refusing
    )
    for path in (PATH, f"{PATH}/input_tokens"):
        error = (await client.post(path, json=HELLO)).json()["error"]
        assert (error["param"], error["code"]) == ("input", None)
        assert "no such talk" in error["message"]


# Properties.


def anonymous(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return items without what is made up for each."""
    return [{**item, "id": "", "call_id": ""} for item in items]


PARTS = st.sampled_from(
    [CALL, "so ", "<tool_call>", "東京", "\n", '{"name": ', "</tool_call>", "é", "</think>"]
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
