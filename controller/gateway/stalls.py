"""Clients that stop reading, noticed without a timer per write."""

import asyncio
from types import TracebackType
from typing import Self

WRITE_TIMEOUT_S = 60.0


class ClientStalled(Exception):
    """The client has not read for so long that it is as good as gone."""


class StallWatch:
    """A context manager that is left with ClientStalled when writes inside it make no progress.

    A timer per write would cost more than the write, so one timer looks at the oldest write now
    and then.
    """

    __slots__ = ("_num_open", "_patience", "_since", "_time", "_timer")

    def __init__(self) -> None:
        self._num_open = 0
        self._since = 0.0
        self._patience = asyncio.timeout(None)
        self._time = asyncio.get_running_loop().time  # looking up the loop costs a system call
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._patience.__aenter__()
        self._look()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._patience.__aexit__(kind, error, traceback)
        except TimeoutError as expired:
            raise ClientStalled from expired

    def begin(self) -> None:
        """Note that a write begins."""
        if not self._num_open:
            self._since = self._time()
        self._num_open += 1

    def end(self) -> None:
        """Note that a write has ended; the client reads, so others that wait begin anew."""
        self._num_open -= 1
        if self._num_open:
            self._since = self._time()

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        since = self._since if self._num_open else now
        if now - since >= WRITE_TIMEOUT_S:
            self._patience.reschedule(now)
        else:
            self._timer = loop.call_at(since + WRITE_TIMEOUT_S, self._look)
