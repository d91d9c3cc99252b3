"""The runtime server's side of one engine process: calls, streams, status, and its obituary."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Self, TypeVar

from google.protobuf.message import Message

from runtime.engine_stream import EngineStream
from runtime.errors import EngineDied, RuntimeFault, ZygoteDied, decode_fault
from runtime.fork_server import EngineChild, ForkServer
from runtime.ipc import Frame, FrameConnection, FrameKind
from runtime.linux import describe_exit
from runtime.log_tail import LogTail
from runtime.rpc import inference_pb2 as pb

EXIT_GRACE_S = 1.0

ResponseT = TypeVar("ResponseT", bound=Message)


class EngineHandle:
    """One living engine; made by `start`.

    Args:
        child: The forked process.
        tail: Follows its output.
        on_status: Called with each status the engine sends.
        on_lost: Called once when the connection ends, unless `close` was called.
    """

    def __init__(
        self,
        child: EngineChild,
        tail: LogTail,
        *,
        on_status: Callable[[pb.RuntimeStatus], None],
        on_lost: Callable[["EngineHandle"], None],
    ) -> None:
        self._child = child
        self._tail = tail
        self._on_status = on_status
        self._on_lost = on_lost
        self._connection = FrameConnection(on_frame=self._receive, on_closed=self._lose)
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._streams: dict[int, EngineStream] = {}
        self._is_closed = False
        self._fault: RuntimeFault | None = None

    @classmethod
    async def start(
        cls,
        fork_server: ForkServer,
        *,
        on_status: Callable[[pb.RuntimeStatus], None],
        on_lost: Callable[["EngineHandle"], None],
    ) -> Self:
        """Fork an engine process and connect to it.

        Raises:
            ZygoteDied: No engine can be forked.
        """
        with ExitStack() as ours, ExitStack() as theirs:
            try:
                our_socket, their_socket = socket.socketpair()
                ours.callback(our_socket.close)
                theirs.callback(their_socket.close)
                read_end, write_end = os.pipe()
            except OSError as error:
                raise ZygoteDied(f"no engine can be forked: {error}") from error
            ours.callback(os.close, read_end)
            theirs.callback(os.close, write_end)
            child = await fork_server.fork(their_socket, write_end)
            ours.pop_all()
        tail = await LogTail.follow(read_end)
        handle = cls(child, tail, on_status=on_status, on_lost=on_lost)
        await handle._connection.connect(our_socket)
        return handle

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._child.pid

    async def call(
        self, kind: FrameKind, request: Message, response_type: type[ResponseT]
    ) -> ResponseT:
        """Ask the engine for an operation and wait for its answer, without a time limit.

        Raises:
            RuntimeFault: The engine refused, or died.
        """
        return await self._call(next(self._ids), kind, request, response_type)

    async def embed(self, request: pb.EmbedRequest) -> pb.EmbedResponse:
        """Have texts embedded; a caller that is cancelled takes them along.

        Raises:
            RuntimeFault: The engine refused, or died.
        """
        call_id = next(self._ids)
        try:
            return await self._call(call_id, FrameKind.EMBED, request, pb.EmbedResponse)
        except asyncio.CancelledError:
            self._connection.write(Frame(FrameKind.CANCEL_CALL, call_id))
            raise

    async def _call(
        self, call_id: int, kind: FrameKind, request: Message, response_type: type[ResponseT]
    ) -> ResponseT:
        if self._fault is not None:
            raise self._fault
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        self._connection.write(Frame(kind, call_id, request.SerializeToString()))
        response = response_type()
        try:
            response.ParseFromString(await answer)
        finally:
            self._calls.pop(call_id, None)  # a caller that leaves is not there for the reply
        return response

    def open_stream(self) -> EngineStream:
        """Return a new stream to this engine."""
        stream = EngineStream(next(self._ids), self._connection, on_closed=self._forget_stream)
        self._streams[stream.stream_id] = stream
        return stream

    def fail_streams(self, fault: RuntimeFault) -> None:
        """End all streams with a fault."""
        for stream in list(self._streams.values()):
            stream.fail(fault)

    def fail_calls(self, fault: RuntimeFault) -> None:
        """Answer all open calls with a fault, and those that come yet: the engine is no more."""
        self._fault = fault
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(fault)
        self._calls.clear()

    def close(self) -> None:
        """Kill the process and forget it; `on_lost` is not called any more."""
        self._is_closed = True
        self._connection.close()
        self._kill()

    async def obituary(self) -> EngineDied:
        """Wait until the process is gone, killing it if it lingers, and say how it ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_GRACE_S):
                await asyncio.shield(self._child.exited)
        self._kill()
        code = await asyncio.shield(self._child.exited)
        await self._tail.ended()
        return EngineDied(f"the engine process ended ({describe_exit(code)}): {self._tail.text}")

    def _kill(self) -> None:
        # Until the zygote has reaped it, its number cannot belong to another process.
        if not self._child.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGKILL)

    def _receive(self, frame: Frame) -> None:
        match frame.kind:
            case FrameKind.STEP_OUTPUT:
                if stream := self._streams.get(frame.id):
                    stream.push(frame.payload)
            case FrameKind.STREAM_REFUSAL:
                if stream := self._streams.get(frame.id):
                    stream.fail(decode_fault(frame.payload))
            case FrameKind.STATUS:
                self._on_status(pb.RuntimeStatus.FromString(frame.payload))
            case FrameKind.REPLY:
                if answer := self._calls.pop(frame.id, None):  # its caller may have left
                    answer.set_result(frame.payload)
            case FrameKind.REFUSAL:
                if answer := self._calls.pop(frame.id, None):
                    answer.set_exception(decode_fault(frame.payload))
            case _:
                raise AssertionError(f"{frame.kind!r} is never sent by an engine")

    def _lose(self) -> None:
        if not self._is_closed:
            self._on_lost(self)

    def _forget_stream(self, stream: EngineStream) -> None:
        del self._streams[stream.stream_id]
