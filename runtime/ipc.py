"""Length-prefixed frames between the runtime server and one engine, over a Unix socketpair.

The engine's end is blocking (FrameSocket), the server's is asyncio (FrameConnection). Payloads are
protobuf messages or error texts; nothing here looks into them.

    0        4      5        8              16
    | size   | kind | unused | id           | payload of `size` bytes …
"""

import asyncio
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple, cast

HEADER = struct.Struct("<IB3xQ")
MAX_PAYLOAD_BYTES = 64 << 20
_RECEIVE_BYTES = 1 << 20
_SOCKET_BUFFER_BYTES = 4 << 20


class FrameKind(IntEnum):
    """What a frame means and what its id counts."""

    # Server to engine; the id is a call.
    LOAD = 1
    PARK = 2
    WAKE = 3
    DRAIN = 4
    EMBED = 12
    CANCEL_CALL = 13  # of an EMBED whose caller has left
    PROFILE = 14
    # Server to engine; the id is a stream.
    ATTACH_REQUEST = 5
    CLOSE_STREAM = 6
    # Engine to server; the id is a call.
    REPLY = 7
    REFUSAL = 8
    # Engine to server; the id is a stream.
    STEP_OUTPUT = 9
    STREAM_REFUSAL = 10
    # Engine to server; no id.
    STATUS = 11


class Frame(NamedTuple):
    """One message between server and engine."""

    kind: FrameKind
    id: int
    payload: bytes = b""


class IpcError(Exception):
    """The connection between server and engine cannot go on."""


class PeerClosed(IpcError):
    """The other end is gone."""


class BadFrame(IpcError):
    """Bytes that are no frame of ours; the stream cannot be trusted any further."""


def encode(frame: Frame) -> bytes:
    """Return the bytes of a frame.

    Raises:
        BadFrame: The payload is over MAX_PAYLOAD_BYTES.
    """
    size = len(frame.payload)
    if size > MAX_PAYLOAD_BYTES:
        raise BadFrame(f"a payload of {size} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
    return HEADER.pack(size, frame.kind, frame.id) + frame.payload


class FrameDecoder:
    """Cuts a byte stream into frames, whatever the pieces it arrives in."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that `data` completes; must be exhausted before the next call.

        Raises:
            BadFrame: The header is not one of ours.
        """
        self._pending += data
        start = 0
        try:
            while len(self._pending) - start >= HEADER.size:
                size, kind, id_ = HEADER.unpack_from(self._pending, start)
                if size > MAX_PAYLOAD_BYTES:
                    raise BadFrame(f"a frame announces {size} bytes, over {MAX_PAYLOAD_BYTES}")
                end = start + HEADER.size + size
                if len(self._pending) < end:
                    break
                payload = bytes(memoryview(self._pending)[start + HEADER.size : end])
                start = end
                yield Frame(_kind(kind), id_, payload)
        finally:
            del self._pending[:start]


class FrameSocket:
    """The engine's end: blocking, one thread.

    Args:
        sock: A connected stream socket; owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        self._socket = sock
        self._decoder = FrameDecoder()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def receive(self, timeout_s: float) -> list[Frame]:
        """Return what has arrived, waiting for a first frame at most `timeout_s` seconds.

        With 0 it never waits. Takes at most one buffer full, so that a flood of requests cannot
        hold up the caller.

        Raises:
            PeerClosed: The server is gone.
            BadFrame: The server sent something else than frames.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            remaining_s = max(0.0, deadline - time.monotonic())
            if not self._poll.poll(remaining_s * 1000):
                return []
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except ConnectionError as error:
                raise PeerClosed(str(error)) from error
            if not data:
                raise PeerClosed("the runtime server closed the connection")
            if frames := list(self._decoder.feed(data)):
                return frames

    def send(self, frames: Iterable[Frame]) -> None:
        """Send frames in one write; blocks while the server's buffer is full.

        Raises:
            PeerClosed: The server is gone.
        """
        try:
            self._socket.sendall(b"".join(map(encode, frames)))
        except ConnectionError as error:
            raise PeerClosed(str(error)) from error


class FrameConnection(asyncio.Protocol):
    """The server's end: callbacks on the event loop, no waiting to write.

    Args:
        on_frame: Called with every frame.
        on_closed: Called once, when the other end is gone or sent what is no frame.
    """

    def __init__(self, *, on_frame: Callable[[Frame], None], on_closed: Callable[[], None]) -> None:
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._decoder = FrameDecoder()
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.WriteTransport | None = None

    async def connect(self, sock: socket.socket) -> None:
        """Take over a connected stream socket."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=sock)

    def write(self, frame: Frame) -> None:
        """Queue a frame; after the connection is closed it goes nowhere.

        Raises:
            BadFrame: The payload is over MAX_PAYLOAD_BYTES.
        """
        data = encode(frame)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the engine has taken enough of what is queued, or is gone."""
        await self._writable.wait()

    def close(self) -> None:
        """Close our end and drop what is still queued."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (asyncio's callback)."""
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Hand complete frames on (asyncio's callback)."""
        try:
            for frame in self._decoder.feed(data):
                self._on_frame(frame)
        except BadFrame:
            self.close()

    def pause_writing(self) -> None:
        """Make `drain` wait (asyncio's callback)."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let `drain` go on (asyncio's callback)."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end (asyncio's callback)."""
        self._writable.set()
        self._on_closed()


def _kind(value: int) -> FrameKind:
    try:
        return FrameKind(value)
    except ValueError as error:
        raise BadFrame(f"unknown frame kind {value}") from error
