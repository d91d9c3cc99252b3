"""What happened, on its way to the database: transitions, cold starts, usage.

Bounded: while the database is away the oldest entries are dropped and counted, and warm traffic
goes on.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from controller.scaling.activation import ColdStart
from controller.scaling.generation import GenerationRecord

MAX_PENDING = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionEntry:
    """One move of one replica, for the history."""

    function: str
    replica_id: str
    at_us: int
    from_state: str | None
    to_state: str
    reason: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEntry:
    """One finished request, with the wall time it was admitted at."""

    started_us: int
    record: GenerationRecord


Entry = TransitionEntry | ColdStart | UsageEntry


class JournalWriter(Protocol):
    """Writes entries in one transaction."""

    async def __call__(self, entries: list[Entry]) -> None:
        """Store all of them or none."""


class Journal:
    """Collects entries and writes them in batches.

    Args:
        write: Stores a batch; raises when the database is away.
        on_dropped: Told of every entry that is given up.
    """

    def __init__(
        self, write: JournalWriter, *, on_dropped: Callable[[], None] = lambda: None
    ) -> None:
        self._write = write
        self._on_dropped = on_dropped
        self._pending: deque[Entry] = deque()
        self._writing = asyncio.Lock()

    def add(self, entry: Entry) -> None:
        """Take an entry; the oldest goes when there is no room."""
        self._pending.append(entry)
        self._drop_surplus()

    async def flush(self) -> None:
        """Write what is pending; on failure it stays pending and the error is raised.

        A write that has begun goes on when the caller is cancelled; the next flush waits for it.
        """
        await asyncio.shield(asyncio.create_task(self._flush(), name="write journal"))

    async def _flush(self) -> None:
        async with self._writing:
            batch, self._pending = self._pending, deque()
            if not batch:
                return
            try:
                await self._write(list(batch))
            except BaseException:
                self._pending.extendleft(reversed(batch))
                self._drop_surplus()
                raise

    def _drop_surplus(self) -> None:
        while len(self._pending) > MAX_PENDING:
            self._pending.popleft()
            self._on_dropped()
