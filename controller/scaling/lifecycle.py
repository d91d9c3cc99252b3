"""The life of one replica as a state machine: which moves are legal, and what has happened.

starting → loading → ready ⇄ parking → parked → loading …
ready, parked → draining → stopped        any → failed → stopped

Pure: it knows no clock, no backend and no request. Waking a parked replica is `loading` again.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

HISTORY_LENGTH = 32


class ReplicaState(StrEnum):
    """Where a replica stands."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    PARKING = "parking"
    PARKED = "parked"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


class Tier(StrEnum):
    """How much of a function is warm, warmest first."""

    READY = "ready"
    PARKED = "parked"
    STANDBY = "standby"
    STOPPED = "stopped"


_S = ReplicaState
_NEXT: dict[ReplicaState, frozenset[ReplicaState]] = {
    _S.STARTING: frozenset({_S.LOADING, _S.DRAINING, _S.FAILED}),
    _S.LOADING: frozenset({_S.READY, _S.DRAINING, _S.FAILED}),
    _S.READY: frozenset({_S.PARKING, _S.DRAINING, _S.FAILED}),
    _S.PARKING: frozenset({_S.PARKED, _S.READY, _S.DRAINING, _S.FAILED}),
    _S.PARKED: frozenset({_S.LOADING, _S.DRAINING, _S.FAILED}),
    _S.DRAINING: frozenset({_S.STOPPED, _S.FAILED}),
    _S.FAILED: frozenset({_S.STOPPED}),
    _S.STOPPED: frozenset(),
}

COMING = frozenset({_S.STARTING, _S.LOADING})
"""States that end in ready without a further decision."""

ENDING = frozenset({_S.DRAINING, _S.FAILED, _S.STOPPED})
"""States that no replica comes back from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One move, with the monotonic second it happened at and why."""

    at: float
    source: ReplicaState | None
    target: ReplicaState
    reason: str


class IllegalTransition(Exception):
    """A move the machine does not know; carries the replica's history."""

    def __init__(self, target: ReplicaState, history: Iterable[Transition]) -> None:
        self.history = tuple(history)
        steps = " → ".join(f"{move.target} ({move.reason})" for move in self.history)
        super().__init__(f"a replica cannot become {target}; its history: {steps}")


class Lifecycle:
    """One replica's state and the moves that led to it."""

    def __init__(
        self, *, at: float, reason: str, state: ReplicaState = ReplicaState.STARTING
    ) -> None:
        first = Transition(at=at, source=None, target=state, reason=reason)
        self._history: deque[Transition] = deque([first], maxlen=HISTORY_LENGTH)

    @property
    def state(self) -> ReplicaState:
        """The state now."""
        return self._history[-1].target

    @property
    def since(self) -> float:
        """The monotonic second the state was entered."""
        return self._history[-1].at

    @property
    def is_waking(self) -> bool:
        """Whether it loads what was parked."""
        return self.state is ReplicaState.LOADING and self._history[-1].source is _S.PARKED

    @property
    def history(self) -> tuple[Transition, ...]:
        """The last moves, oldest first."""
        return tuple(self._history)

    def move(self, target: ReplicaState, *, at: float, reason: str) -> Transition:
        """Enter another state.

        Raises:
            IllegalTransition: The machine has no such move.
        """
        if target not in _NEXT[self.state]:
            raise IllegalTransition(target, self._history)
        transition = Transition(at=at, source=self.state, target=target, reason=reason)
        self._history.append(transition)
        return transition

    def undo(self) -> Transition:
        """Take back the last move, which nobody has acted on; returns it."""
        assert len(self._history) > 1, "the first state cannot be taken back"
        return self._history.pop()
