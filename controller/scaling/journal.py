"""What happened, on its way to the database: transitions, cold starts, usage.

Bounded: while the database is away the oldest entries are dropped and counted, and warm traffic
goes on.
"""

from collections import deque
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
    """

    def __init__(self, write: JournalWriter) -> None:
        self._write = write
        self._pending: deque[Entry] = deque()
        self.num_dropped = 0

    def add(self, entry: Entry) -> None:
        """Take an entry; the oldest goes when there is no room."""
        if len(self._pending) >= MAX_PENDING:
            self._pending.popleft()
            self.num_dropped += 1
        self._pending.append(entry)

    async def flush(self) -> None:
        """Write what is pending; on failure it stays pending and the error is raised."""
        batch = list(self._pending)
        if not batch:
            return
        await self._write(batch)
        for _ in batch:
            self._pending.popleft()
