"""The gateway behind a real server, where clients really hang up."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from controller.gateway import stalls
from controller.scaling.generation import GenerationRequest, TokenChunk
from tests.controller.gateway.conftest import AppMaker
from tests.fakes.function import FakeFunction, Step

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
SMALL_BUFFER = 4096  # so that a client that does not read is soon noticed


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[int]:
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


def request_head(*headers: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", *headers]
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
    body = json.dumps({**HELLO, **fields}).encode()
    writer.write(request_head(f"Content-Length: {len(body)}") + body)


@pytest.mark.parametrize("stream", [False, True])
async def test_socket_closed_during_a_cold_start_ends_the_generation(
    make_app: AppMaker, function: FakeFunction, stream: bool
) -> None:
    never = asyncio.Event()
    function.script = lambda request: [never]
    async with listening(make_app()) as port:
        async with connected(port) as (_, writer):
            send(writer, stream=stream)
            await function.entered.wait()
        await asyncio.wait_for(function.generations[0].left.wait(), timeout=10)
    assert function.num_running == 0


async def test_socket_closed_mid_stream_ends_the_generation(
    make_app: AppMaker, function: FakeFunction, answer_tokens: list[int]
) -> None:
    never = asyncio.Event()
    function.script = lambda request: [TokenChunk(answer_tokens), never]
    async with listening(make_app()) as port:
        async with connected(port) as (reader, writer):
            send(writer, stream=True)
            await reader.readuntil(b"warm")
        await asyncio.wait_for(function.generations[0].left.wait(), timeout=10)


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
