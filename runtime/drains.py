"""Draining inside an engine process: no new sequence, the running ones get their time."""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from runtime.engine.sequence import SequenceKey
from runtime.engine_api import StepEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drain:
    """One call that waits, until a monotonic deadline."""

    call_id: int
    deadline: float


class Drains:
    """All drains of one engine; the first ends its service for good, later ones join.

    Args:
        engine: Told to cancel what is left at a deadline.
    """

    def __init__(self, engine: StepEngine) -> None:
        self.has_begun = False
        self.num_cancelled = 0
        self._engine = engine
        self._waiting: list[_Drain] = []

    def start(self, call_id: int, timeout_s: float) -> None:
        """Let a call wait for the end of all sequences."""
        self.has_begun = True
        self._waiting.append(_Drain(call_id=call_id, deadline=time.monotonic() + timeout_s))

    def advance(self, live: Collection[SequenceKey]) -> Iterator[int]:
        """Cancel what is left at a deadline; yield the calls to answer when nothing is left."""
        if not self._engine.has_work():
            while self._waiting:
                yield self._waiting.pop().call_id
        elif self._is_overdue() and self.num_cancelled == 0:
            self.num_cancelled = len(live)
            for key in live:
                self._engine.cancel(key)

    def _is_overdue(self) -> bool:
        now = time.monotonic()
        return any(now >= drain.deadline for drain in self._waiting)
