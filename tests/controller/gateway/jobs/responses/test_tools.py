"""Calls of tools as items."""

import json
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.controller.gateway.jobs.responses.helpers import (
    BEGIN,
    CALL,
    CALL_EVENTS,
    END,
    TEXT_EVENTS,
    TOOL,
    anonymous,
    post,
    runs,
    stream,
)
from tests.controller.gateway.test_tools import Speaker


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
