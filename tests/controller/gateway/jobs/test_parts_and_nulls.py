"""Fields that say nothing, and fields inside of contents, on every endpoint that takes them."""

from typing import Any

import httpx
import pytest

from controller.gateway.schemas.base import ApiBody
from controller.gateway.schemas.chat import ChatCompletionRequest
from controller.gateway.schemas.completions import CompletionRequest
from controller.gateway.schemas.embeddings import EmbeddingsRequest
from controller.gateway.schemas.requests import AsyncRequestBody
from controller.gateway.schemas.responses import ResponseRequest
from controller.gateway.schemas.tokens import DetokenizeRequest, TokenizeRequest

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "hello"}]
BODIES: list[tuple[str, type[ApiBody], dict[str, Any]]] = [
    (CHAT, ChatCompletionRequest, {"model": "tiny", "messages": MESSAGES}),
    ("/v1/completions", CompletionRequest, {"model": "tiny", "prompt": "hello"}),
    (RESPONSES, ResponseRequest, {"model": "tiny", "input": "hello"}),
    ("/v1/embeddings", EmbeddingsRequest, {"model": "encoder", "input": "hello"}),
    ("/tokenize", TokenizeRequest, {"model": "tiny", "prompt": "hello"}),
    ("/detokenize", DetokenizeRequest, {"model": "tiny", "tokens": [104]}),
    (
        "/v1/requests",
        AsyncRequestBody,
        {"endpoint": CHAT, "body": {"model": "tiny", "messages": MESSAGES}},
    ),
]


@pytest.mark.parametrize(("path", "kind", "body"), BODIES, ids=[path for path, _, _ in BODIES])
async def test_null_leaves_any_field_out(
    client: httpx.AsyncClient, path: str, kind: type[ApiBody], body: dict[str, Any]
) -> None:
    optional = [
        field.alias or name for name, field in kind.model_fields.items() if name not in body
    ]
    nulls = dict.fromkeys([*optional, *kind.unsupported, *kind.ignored])
    answer = await client.post(path, json=nulls | body)
    assert answer.is_success, answer.text


def body_with(path: str, role: str, part: dict[str, Any]) -> dict[str, Any]:
    message = {"role": role, "content": [part]}
    return {"model": "tiny", "messages" if path == CHAT else "input": [message]}


@pytest.mark.parametrize(
    ("path", "role", "part"),
    [
        (CHAT, "user", {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}),
        (CHAT, "user", {"type": "text", "text": "a", "prompt_cache_breakpoint": {}}),
        (RESPONSES, "user", {"type": "input_text", "text": "a", "prompt_cache_breakpoint": {}}),
        (
            RESPONSES,
            "assistant",
            {"type": "output_text", "text": "a", "annotations": [], "logprobs": []},
        ),
        (RESPONSES, "assistant", {"type": "refusal", "refusal": "a"}),
    ],
)
async def test_harmless_fields_of_text_parts_are_taken(
    client: httpx.AsyncClient, path: str, role: str, part: dict[str, Any]
) -> None:
    answer = await client.post(path, json=body_with(path, role, part))
    assert answer.is_success, answer.text


@pytest.mark.parametrize(
    ("path", "part", "param"),
    [
        (CHAT, {"type": "text", "text": "a", "image_url": "x"}, "messages[0].content.image_url"),
        (RESPONSES, {"type": "input_text", "text": "a", "detail": 1}, "input[0].content.detail"),
        (RESPONSES, {"type": "refusal", "refusal": "a", "text": 1}, "input[0].content.text"),
    ],
)
async def test_other_fields_of_text_parts_are_named(
    client: httpx.AsyncClient, path: str, part: dict[str, Any], param: str
) -> None:
    answer = await client.post(path, json=body_with(path, "user", part))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
