"""One Attach stream inside the runtime server: requests on to the engine, a bounded way back.

Messages pass as bytes; nothing here parses them.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from runtime.errors import RuntimeFault, StreamOverflow
from runtime.ipc import Frame, FrameConnection, FrameKind

MAX_BACKLOG_BYTES = 4 << 20  # above half a minute of 256 sequences at 60 steps a second


class EngineStream:
    """A context manager; leaving it cancels the stream's sequences.

    Args:
        stream_id: Unique within the engine.
        connection: The way to the engine.
        on_closed: Called once with this stream when it is over.
    """

    def __init__(
        self,
        stream_id: int,
        connection: FrameConnection,
        *,
        on_closed: Callable[["EngineStream"], None],
    ) -> None:
        self.stream_id = stream_id
        self.failed: asyncio.Future[RuntimeFault] = asyncio.get_running_loop().create_future()
        self._connection = connection
        self._on_closed = on_closed
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._arrived = asyncio.Event()
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def forward(self, request: bytes) -> None:
        """Send one AttachRequest to the engine; waits while the engine does not read."""
        if not self._is_closed:
            self._connection.write(Frame(FrameKind.ATTACH_REQUEST, self.stream_id, request))
            await self._connection.drain()

    async def next_output(self) -> bytes:
        """Wait for the next StepOutput; after a failure none comes any more."""
        while not self._backlog:
            self._arrived.clear()
            await self._arrived.wait()
        output = self._backlog.popleft()
        self._backlog_bytes -= len(output)
        return output

    def push(self, output: bytes) -> None:
        """Queue one StepOutput for the reader, or fail with StreamOverflow."""
        if self._is_closed:
            return
        self._backlog.append(output)
        self._backlog_bytes += len(output)
        self._arrived.set()
        if self._backlog_bytes > MAX_BACKLOG_BYTES:
            reason = f"{self._backlog_bytes} bytes wait to be read, over {MAX_BACKLOG_BYTES}"
            self.fail(StreamOverflow(f"the stream is closed: {reason}; read faster"))

    def fail(self, fault: RuntimeFault) -> None:
        """End the stream with a fault, drop what was not read, cancel its sequences."""
        if not self._is_closed:
            self.failed.set_result(fault)
            self.close()

    def close(self) -> None:
        """End the stream and cancel its sequences; again is no error."""
        if self._is_closed:
            return
        self._is_closed = True
        self._backlog.clear()
        self._connection.write(Frame(FrameKind.CLOSE_STREAM, self.stream_id))
        self._on_closed(self)
