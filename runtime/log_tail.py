"""The output of a child process: copied to our stderr, its end remembered for error messages."""

import asyncio
import contextlib
import os
import sys
from typing import Self

TAIL_BYTES = 2048  # fits a gRPC status, whose metadata ends at 8 KiB
LAST_WORDS_S = 1.0


class LogTail(asyncio.Protocol):
    """Reads one pipe until every writer has closed it."""

    def __init__(self) -> None:
        self._tail = b""
        self._ended = asyncio.get_running_loop().create_future()

    @classmethod
    async def follow(cls, descriptor: int) -> Self:
        """Read the pipe from now on; the descriptor is owned."""
        loop = asyncio.get_running_loop()
        _, tail = await loop.connect_read_pipe(cls, os.fdopen(descriptor, "rb", buffering=0))
        return tail

    async def ended(self) -> None:
        """Wait until all output has been read; not for long, a child of the writer's may live on."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await asyncio.shield(self._ended)

    @property
    def text(self) -> str:
        """The last whole lines."""
        text = self._tail.decode(errors="replace")
        if len(self._tail) == TAIL_BYTES:
            text = text.partition("\n")[2] or text
        return text.strip()

    def data_received(self, data: bytes) -> None:
        """Copy and remember (asyncio's callback)."""
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        with contextlib.suppress(OSError):  # nobody reads logs any more; the child goes on
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end (asyncio's callback)."""
        if not self._ended.done():
            self._ended.set_result(None)
