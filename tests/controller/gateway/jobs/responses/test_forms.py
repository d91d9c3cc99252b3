"""Structured text, thoughts and log-probabilities."""

import httpx
import openai
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel

from controller.gateway.grammars import json_grammar
from controller.scaling.generation import TokenChunk
from runtime.rpc import inference_pb2 as pb
from tests.controller.gateway.jobs.responses.helpers import (
    BEGIN,
    CALL_EVENTS,
    END,
    SAME,
    TEXT_EVENTS,
    THOUGHT_EVENTS,
    TOOL,
    anonymous,
    post,
    runs,
    stream,
)
from tests.controller.gateway.test_tools import Speaker


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
