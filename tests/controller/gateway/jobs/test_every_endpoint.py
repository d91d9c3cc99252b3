"""Every endpoint of OpenAI's, by the official SDK, sync and async, strict about what it gets back.

Over a real server, so that the sync one is as far away as a client is.
"""

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.controller.gateway.test_over_sockets import listening
from tests.fakes.function import FakeFunction

HELLO: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": HELLO}
VECTORS = ("vectors", "same_vectors")
Step = Callable[[Any, dict[str, Any]], Any]
"""Takes an SDK and what the steps before have made, by name."""


def lenient(sdk: Any) -> Any:
    """Return an SDK that takes what its own types leave out.

    These know neither a chunk of text before the last one nor vectors in base64, which it asks
    for by itself.
    """
    return sdk.with_options(_extra_kwargs={"_strict_response_validation": False})


def upload(sdk: Any, made: dict[str, Any]) -> Any:
    return sdk.files.create(
        file=("in.jsonl", json.dumps(LINE).encode()),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )


def batch(sdk: Any, made: dict[str, Any]) -> Any:
    return sdk.batches.create(
        input_file_id=made["file"].id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"team": "blue"},
    )


STEPS: Sequence[tuple[str, Step]] = [
    ("models", lambda sdk, made: sdk.models.list()),
    ("model", lambda sdk, made: sdk.models.retrieve("tiny")),
    ("chat", lambda sdk, made: sdk.chat.completions.create(
        **HELLO, n=2, logprobs=True, top_logprobs=0, seed=1)),
    ("chunks", lambda sdk, made: sdk.chat.completions.create(
        **HELLO, stream=True, stream_options={"include_usage": True})),
    ("texts", lambda sdk, made: sdk.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=90, logprobs=None)),
    ("text_chunks", lambda sdk, made: lenient(sdk).completions.create(
        model="tiny", prompt="a", max_tokens=90, stream=True)),
    ("vectors", lambda sdk, made: sdk.embeddings.create(
        model="encoder", input=["a", "bb"], encoding_format="float")),
    ("same_vectors", lambda sdk, made: lenient(sdk).embeddings.create(
        model="encoder", input=["a", "bb"])),
    ("first", lambda sdk, made: sdk.responses.create(model="tiny", input="hello")),
    ("events", lambda sdk, made: sdk.responses.create(model="tiny", input="hi", stream=True)),
    ("second", lambda sdk, made: sdk.responses.create(
        model="tiny", input="and?", previous_response_id=made["first"].id, metadata={"a": "b"})),
    ("kept", lambda sdk, made: sdk.responses.retrieve(made["second"].id)),
    ("items", lambda sdk, made: sdk.responses.input_items.list(made["second"].id, order="asc")),
    ("counted", lambda sdk, made: sdk.responses.input_tokens.count(model="tiny", input="hello")),
    ("later", lambda sdk, made: sdk.responses.create(model="tiny", input="hi", background=True)),
    ("over", lambda sdk, made: sdk.responses.cancel(made["later"].id)),
    ("forgotten", lambda sdk, made: sdk.responses.delete(made["first"].id)),
    ("file", upload),
    ("files", lambda sdk, made: sdk.files.list(purpose="batch", order="asc", limit=5)),
    ("described", lambda sdk, made: sdk.files.retrieve(made["file"].id)),
    ("content", lambda sdk, made: sdk.files.content(made["file"].id)),
    ("batch", batch),
    ("batches", lambda sdk, made: sdk.batches.list(limit=5)),
    ("progress", lambda sdk, made: sdk.batches.retrieve(made["batch"].id)),
    ("cancelled", lambda sdk, made: sdk.batches.cancel(made["batch"].id)),
    ("spare", upload),
    ("deleted", lambda sdk, made: sdk.files.delete(made["spare"].id)),
    ("tokens", lambda sdk, made: sdk.post(
        "../tokenize", cast_to=object, body={"model": "tiny", "prompt": "hello"})),
    ("prompt", lambda sdk, made: sdk.post(
        "../detokenize", cast_to=object, body={"model": "tiny", "tokens": [68]})),
]  # fmt: skip


class Visits:
    """An application, and which of its routes were visited."""

    def __init__(self, app: FastAPI) -> None:
        self.routes: set[tuple[str, str]] = set()
        self._app: ASGIApp = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on."""
        try:
            await self._app(scope, receive, send)
        finally:
            if isinstance(route := scope.get("route"), APIRoute):
                self.routes.add((scope["method"], route.path_format))


async def drive(url: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    async with openai.AsyncOpenAI(
        base_url=url, api_key="unused", max_retries=0, _strict_response_validation=True
    ) as sdk:
        for name, step in STEPS:
            got = await step(sdk, made)
            made[name] = [one async for one in got] if isinstance(got, openai.AsyncStream) else got
    return made


def drive_sync(url: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with openai.OpenAI(
        base_url=url, api_key="unused", max_retries=0, _strict_response_validation=True
    ) as sdk:
        for name, step in STEPS:
            got = step(sdk, made)
            made[name] = list(got) if isinstance(got, openai.Stream) else got
    return made


@pytest.mark.parametrize("run", [drive, drive_sync])
async def test_sdk_drives_every_endpoint(
    app: FastAPI, function: FakeFunction, run: Callable[[str], Any]
) -> None:
    function.tier = "stopped"  # so that a batch waits until it is cancelled
    visits = Visits(app)
    async with listening(visits) as port:
        url = f"http://127.0.0.1:{port}/v1/"
        made = await (run(url) if inspect.iscoroutinefunction(run) else asyncio.to_thread(run, url))
    described = app.openapi()["paths"]
    every = {
        (method.upper(), path)
        for path, methods in described.items()
        for method, operation in methods.items()
        if "openai" in operation["tags"]
    }
    assert every <= visits.routes
    said = made["chat"].choices[1].message.content
    assert said == made["texts"].choices[0].text == made["first"].output_text
    assert made["chunks"][-1].usage.completion_tokens * 2 == made["chat"].usage.completion_tokens
    deltas = [chunk.choices[0].delta.content for chunk in made["chunks"] if chunk.choices]
    assert "".join(delta or "" for delta in deltas) == said
    assert "".join(chunk.choices[0].text for chunk in made["text_chunks"]) == said
    assert len(made["items"].data) == 3
    vectors, same = ([one.embedding for one in made[name].data] for name in VECTORS)
    assert vectors == [pytest.approx(vector) for vector in same]
    assert made["content"].content == json.dumps(LINE).encode()
