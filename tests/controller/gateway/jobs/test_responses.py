"""The Responses API through the official SDK, over a function that says what it is told to."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from tokenizers import Tokenizer

from tests.controller.gateway.test_tools import Speaker

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
HELLO: dict[str, Any] = {"model": "tiny", "input": "hello"}


@pytest.fixture
def function(snapshot: Path, byte_level: Tokenizer) -> Speaker:
    return Speaker(snapshot, byte_level, "It is warm, 東京 too.")


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
