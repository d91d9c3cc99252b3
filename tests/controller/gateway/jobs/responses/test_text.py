"""Responses as text, and what is asked of them; through the official SDK."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from runtime.rpc import inference_pb2 as pb
from tests.controller.gateway.jobs.responses.helpers import (
    HELLO,
    PATH,
    TOOL,
    post,
)
from tests.controller.gateway.jobs.test_requests import ended
from tests.controller.gateway.test_tools import Speaker
from tests.fakes.tokenizers import write_snapshot


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


@pytest.mark.parametrize("kind", [{}, [], 7, None, "image"])
async def test_parts_that_are_no_text_are_refused(client: httpx.AsyncClient, kind: Any) -> None:
    message = {"type": "message", "role": "user", "content": [{"type": kind, "text": "hello"}]}
    refused = await client.post(PATH, json={**HELLO, "input": [message]})
    assert refused.status_code == 400
    assert "only text is supported" in refused.json()["error"]["message"]
