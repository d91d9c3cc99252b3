"""The gateway behind a real server, where clients really hang up."""

import asyncio
import json
import socket
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

from controller.gateway import stalls
from controller.metrics import Metrics
from controller.scaling.embedding import Pooling
from controller.scaling.generation import GenerationRequest, TokenChunk
from tests.controller.gateway.conftest import AppMaker
from tests.fakes.function import FakeFunction, Step

CHAT, TEXT, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
SMALL_BUFFER = 4096  # so that a client that does not read is soon noticed


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[int]:
    """Serve on a free port of loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server_socket:
        server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BUFFER)
        config = uvicorn.Config(app, http="httptools", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve([server_socket]))
        try:
            yield server_socket.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


def request_head(*headers: str, path: str = CHAT) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *headers]
    return "\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode()


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    client_socket = socket.create_connection(("127.0.0.1", port))
    client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    reader, writer = await asyncio.open_connection(sock=client_socket, limit=SMALL_BUFFER)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def send(writer: asyncio.StreamWriter, **fields: Any) -> None:
    post(writer, CHAT, {**HELLO, **fields})


def post(writer: asyncio.StreamWriter, path: str, fields: dict[str, Any]) -> None:
    body = json.dumps(fields).encode()
    writer.write(request_head(f"Content-Length: {len(body)}", path=path) + body)


def close(writer: asyncio.StreamWriter) -> None:
    writer.close()


def shut_down(writer: asyncio.StreamWriter) -> None:
    """Say that nothing more will be sent, and go on listening."""
    writer.write_eof()


def reset(writer: asyncio.StreamWriter) -> None:
    """Break the connection off, as a process that is killed does."""
    at_once = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    writer.transport.abort()


Leave = Callable[[asyncio.StreamWriter], None]
ways_to_leave = pytest.mark.parametrize("leave", [close, shut_down, reset])
GENERATIONS: Mapping[str, tuple[str, dict[str, Any], int]] = {
    "stream": (CHAT, HELLO | {"stream": True}, 1),
    "whole": (CHAT, HELLO, 1),
    "answers": (CHAT, HELLO | {"n": 3}, 3),
    "prompts": (TEXT, {"model": "tiny", "prompt": ["a", "b"], "stream": True}, 2),
}
"""Path, body, number of sequences."""


@ways_to_leave
@pytest.mark.parametrize(("num_tokens", "num_streaming"), [(0, 0), (3, 2)])
async def test_leaving_ends_every_generation_of_the_call(
    make_app: AppMaker,
    function: FakeFunction,
    answer_tokens: list[int],
    metrics: Metrics,
    num_tokens: int,
    num_streaming: int,
    leave: Leave,
) -> None:
    """Before the first token, be it queued or waking, and between two."""
    reached = asyncio.Semaphore(0)

    def script(request: GenerationRequest) -> Iterable[Step]:
        for token_id in answer_tokens[:num_tokens]:
            yield TokenChunk([token_id])
        reached.release()
        yield asyncio.Event()

    function.script = script
    async with listening(make_app()) as port:
        for path, fields, num_sequences in GENERATIONS.values():
            async with connected(port) as (_, writer):
                post(writer, path, fields)
                for _ in range(num_sequences):
                    await reached.acquire()
                leave(writer)
                for generation in function.generations[-num_sequences:]:
                    await asyncio.wait_for(generation.left.wait(), timeout=10)
                    assert isinstance(generation.left_with, asyncio.CancelledError)
                    assert generation.record.num_output_tokens == num_tokens
    assert function.num_running == 0
    assert len(function.generations) == sum(number for _, _, number in GENERATIONS.values())
    left = "client_disconnects_total"
    assert metrics_of(metrics)[left, "streaming"] == num_streaming
    assert metrics_of(metrics)[left, "waiting"] == len(GENERATIONS) - num_streaming


def metrics_of(metrics: Metrics) -> dict[tuple[str, str], float]:
    """Return the figures that have a phase, by name and phase; others are 0."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            name = sample.name.removeprefix("coldspark_")
            found[name, sample.labels.get("phase", "")] += sample.value
    return found


@ways_to_leave
async def test_leaving_ends_an_embedding(
    make_app: AppMaker, function: FakeFunction, leave: Leave
) -> None:
    function.pooling = Pooling(mode="mean", normalize=True, size=4, shorter=(), max_tokens=None)
    function.may_embed.clear()
    async with listening(make_app()) as port, connected(port) as (_, writer):
        post(writer, EMBEDDINGS, {"model": "tiny", "input": "hello"})
        await function.entered.wait()
        leave(writer)
        await asyncio.wait_for(function.embeddings[0].left.wait(), timeout=10)


async def test_client_that_never_reads_holds_the_engine_back_and_is_dropped(
    make_app: AppMaker, function: FakeFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalls, "WRITE_TIMEOUT_S", 0.2)
    num_asked = 0

    def endless(request: GenerationRequest) -> Iterable[Step]:
        nonlocal num_asked
        while True:
            num_asked += 1
            yield TokenChunk([104] * 1000)

    function.script = endless
    async with listening(make_app()) as port, connected(port) as (_, writer):
        send(writer, stream=True)
        await function.entered.wait()
        await asyncio.wait_for(function.generations[0].left.wait(), timeout=10)
    assert num_asked < 1000


async def test_large_chunked_upload_is_answered_before_it_ends(make_app: AppMaker) -> None:
    app = make_app(max_body_bytes=4096)
    async with listening(app) as port, connected(port) as (reader, writer):
        writer.write(request_head("Transfer-Encoding: chunked"))
        for _ in range(8):
            writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
        status = await asyncio.wait_for(reader.readline(), timeout=10)
        assert b"413" in status
        rest = await asyncio.wait_for(reader.read(), timeout=10)
        assert b"connection: close" in rest
        assert b"body_too_large" in rest


async def test_connection_is_reused_after_a_stream(
    make_app: AppMaker, function: FakeFunction
) -> None:
    async with listening(make_app()) as port, connected(port) as (reader, writer):
        for _ in range(2):
            send(writer, stream=True)
            await asyncio.wait_for(reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n"), timeout=10)
    assert [each.record.outcome for each in function.generations] == ["stop", "stop"]
