"""How many starts are under way on this node at a time, and who is next.

A start imports torch, unless a standby has, and reads weights. Many at once take the cores and the
disk from each other, and from those that serve. Waking is no start. Event loop only; nothing here
waits: who gets no place asks again when poked.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice

from controller.clock import Clock

LONGEST_S = 60.0
"""A start that takes longer is likely to hang, and must not keep others from theirs."""

Poke = Callable[[], None]


def usual_limit() -> int:
    """Return how many starts the cores of this machine carry at a time."""
    return max(2, len(os.sched_getaffinity(0)) // 2)


class Starts:
    """The places for starts, and the line for them: those with clients first, as they came.

    Args:
        limit: How many places there are.
        clock: The node's clock.
    """

    def __init__(self, limit: int, clock: Clock) -> None:
        self._limit = limit
        self._clock = clock
        self._under_way: dict[str, float] = {}  # since when, by what is started; oldest first
        self._urgent: dict[str, Poke] = {}
        self._patient: dict[str, Poke] = {}

    def take(self, name: str, what: str, *, is_urgent: bool, poke: Poke) -> bool:
        """Take a place if it is one's turn, else a place in the line, until one asks or leaves.

        Args:
            name: Who asks.
            what: The replica or runtime to start; the place is its until `done`.
            is_urgent: Whether clients wait for it now.
            poke: Called when it may be one's turn.
        """
        line = self._urgent if is_urgent else self._patient
        other = self._patient if is_urgent else self._urgent
        other.pop(name, None)
        line.setdefault(name, poke)
        if name not in self._next():
            return False
        del line[name]
        self._under_way[what] = self._clock.monotonic()
        return True

    def leave(self, name: str) -> None:
        """Ask for nothing any more; harmless for one that is not in the line."""
        if self.is_waiting(name):
            self._urgent.pop(name, None)
            self._patient.pop(name, None)
            self.look_again()

    def done(self, what: str) -> None:
        """Note that a start is over, however it ended; harmless if it had no place."""
        if self._under_way.pop(what, None) is not None:
            self.look_again()

    def look_again(self) -> None:
        """Have those ask again whose turn it may be."""
        for poke in [self._urgent.get(one) or self._patient[one] for one in self._next()]:
            poke()

    def is_waiting(self, name: str) -> bool:
        """Return whether somebody is in the line."""
        return name in self._urgent or name in self._patient

    def counts(self) -> Mapping[str, int]:
        """Return how many are under way and waiting, and the limit."""
        num_waiting = len(self._urgent) + len(self._patient)
        return {
            "under_way": len(self._under_way),
            "waiting": num_waiting,
            "limit": self._limit,
        }

    def _next(self) -> Iterator[str]:
        """Return whose turn it is."""
        too_old = self._clock.monotonic() - LONGEST_S
        while self._under_way and next(iter(self._under_way.values())) <= too_old:
            del self._under_way[next(iter(self._under_way))]
        num_free = max(self._limit - len(self._under_way), 0)
        return islice(chain(self._urgent, self._patient), num_free)
