"""Who gives way when a replica needs device memory that others hold. Pure.

The least valuable go first: an idle replica is worth the seconds of bringing it back times the
chance that somebody asks for it soon. One with requests in flight is never parked; once it has
had its turn it may be told to take no more, so that it runs empty.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from controller.scaling.lifecycle import ENDING, ReplicaState

LEAVES_WITHIN_S = 5.0
"""One with nothing in flight that is being removed for longer may not be gone for a long time."""

BETWEEN_CALLS_S = 0.1
"""One that has been idle for less is likely between two calls of the same client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A replica that holds memory of a device.

    Attributes:
        replica_id: Which one.
        state: Its lifecycle's.
        kept_bytes: What it would still hold when parked.
        value_s: Seconds of waiting that its removal is expected to cost.
        resident_s: Since it entered its state.
        held_bytes: What it holds of the device in question.
        idle_s: Since its last response.
        is_busy: Whether requests are in flight or about to be.
        is_needed: Whether it must stay, for a minimum of replicas.
        is_yielding: Whether it takes no more requests already.
        may_park: Whether it may be left parked, with what it keeps; else it is stopped.
        refuses_s: How much longer it is not asked to park, since its runtime would not; 0 or less
            if it may be asked.
    """

    replica_id: str
    state: ReplicaState
    kept_bytes: int
    value_s: float
    resident_s: float
    held_bytes: int = 0
    idle_s: float = 0.0
    is_busy: bool = False
    is_needed: bool = False
    is_yielding: bool = False
    may_park: bool = True
    refuses_s: float = 0.0

    def on_device(self, *, held_bytes: int) -> "Tenant":
        """Return it as the tenant of one device."""
        return replace(self, held_bytes=held_bytes)

    @property
    def freed_bytes(self) -> int:
        """What comes free when it gives way: ready ones are parked, parked ones stopped."""
        return max(self.held_bytes - self.kept_bytes, 0) if self.is_left_parked else self.held_bytes

    @property
    def is_left_parked(self) -> bool:
        """Whether giving way ends in parked."""
        return self.may_park and self.state in (ReplicaState.READY, ReplicaState.PARKING)

    @property
    def is_free_to_go(self) -> bool:
        """Whether it would help to send it away and nothing but a request may forbid that."""
        can_go = self.state is ReplicaState.PARKED or (
            self.state is ReplicaState.READY and not (self.is_needed or self.is_yielding)
        )
        return can_go and self.freed_bytes > 0

    @property
    def runs_empty(self) -> bool:
        """Whether it serves what it has and is parked then; a parked one cannot do that."""
        return self.is_yielding and self.state is ReplicaState.READY

    @property
    def leaves_within_s(self) -> float:
        """How much longer it is trusted to give its memory back unasked; 0 or less if it is not.

        A park is quick, and a runtime is removed in a moment, but not before its last response;
        one that resists its removal may stay for good.
        """
        if self.state is ReplicaState.PARKING:
            return math.inf
        if self.state not in ENDING or self.is_busy:
            return 0.0
        return LEAVES_WITHIN_S - min(self.resident_s, self.idle_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How room is made.

    Attributes:
        evict: Replicas to park, or to stop if they are parked, now.
        stop: Idle replicas to stop now, since parked they would hold too much.
        yielding: Busy replicas that are to take no more requests.
        cost_s: What that is expected to cost others.
        is_enough: Whether the room is there once all of it is done.
        is_soon: Whether no response has to end for it, which may take minutes.
        retry_in_s: When to look again if nothing else happens; None for no need.
    """

    evict: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    yielding: tuple[str, ...] = ()
    cost_s: float = 0.0
    is_enough: bool = True
    is_soon: bool = True
    retry_in_s: float | None = None


def make_room(
    tenants: Iterable[Tenant],
    missing_bytes: int,
    *,
    waited_s: float,
    min_residency_s: float,
    turn_s: float,
) -> Room:
    """Decide who gives way on one device.

    Idle ones are parked. If that is not enough, some are stopped instead: as few as will do, and
    those that cannot be stopped now once they are parked.

    Args:
        tenants: Everybody on it but those who ask.
        missing_bytes: What must come free.
        waited_s: How long those who ask have waited.
        min_residency_s: A replica is not parked sooner after it became ready.
        turn_s: A busy replica may serve this long before others who wait as long get its place.
    """
    by_id = {one.replica_id: one for one in tenants}
    decide = partial(
        _make_room,
        missing_bytes=missing_bytes,
        waited_s=waited_s,
        min_residency_s=min_residency_s,
        turn_s=turn_s,
    )
    room = decide(by_id.values())
    parked = (one for one in by_id.values() if one.is_left_parked and not one.is_needed)
    for one in sorted(parked, key=lambda one: (one.is_busy, one.value_s)):
        if room.is_enough:
            break
        by_id[one.replica_id] = replace(one, may_park=False)
        room = decide(by_id.values())
    return room


def _make_room(
    tenants: Collection[Tenant],
    *,
    missing_bytes: int,
    waited_s: float,
    min_residency_s: float,
    turn_s: float,
) -> Room:
    leaving = [one for one in tenants if one.leaves_within_s > 0]
    missing_bytes -= _freed(leaving)
    running_empty = [one for one in tenants if one.runs_empty and missing_bytes > 0]
    missing_bytes -= _freed(running_empty)
    waits = [one.leaves_within_s for one in leaving if one.leaves_within_s < math.inf]
    if missing_bytes <= 0:
        return Room(is_soon=not running_empty, retry_in_s=min(waits, default=None))
    free_to_go = [one for one in tenants if one.is_free_to_go]
    busy = [one for one in free_to_go if one.is_busy and one.state is ReplicaState.READY]
    idle = [one for one in free_to_go if one not in busy]
    ripe = [one for one in idle if _ripens_in_s(one, min_residency_s) <= 0]
    evicted = cheapest(ripe, missing_bytes)
    if _freed(evicted) >= missing_bytes:
        return _room(evicted, is_soon=not running_empty, retry_in_s=min(waits, default=None))
    young = [one for one in idle if one not in ripe]
    served = [one for one in busy if waited_s >= turn_s and one.resident_s >= turn_s]
    waits += [_ripens_in_s(one, min_residency_s) for one in young]
    waits += [max(turn_s - waited_s, turn_s - one.resident_s) for one in busy if one not in served]
    retry_in_s = min(waits, default=None)
    yielding = cheapest(served, missing_bytes - _freed(ripe) - _freed(young))
    later = _freed(young) + _freed(yielding)
    if _freed(ripe) + later < missing_bytes:
        # Parking some would not help whoever asks, and would cost their next callers a wake.
        return Room(is_enough=False, retry_in_s=retry_in_s)
    evicted = cheapest(ripe, missing_bytes - later)
    is_soon = not (running_empty or yielding)
    return _room(evicted, yielding, is_soon=is_soon, retry_in_s=retry_in_s)


def _ripens_in_s(tenant: Tenant, min_residency_s: float) -> float:
    """Return how much longer an idle tenant is left alone; 0 or less if it can go."""
    if tenant.state is ReplicaState.PARKED:
        return 0.0
    ripens_in_s = max(min_residency_s - tenant.resident_s, BETWEEN_CALLS_S - tenant.idle_s)
    return max(ripens_in_s, tenant.refuses_s) if tenant.may_park else ripens_in_s


def _freed(tenants: Iterable[Tenant]) -> int:
    return sum(one.freed_bytes for one in tenants)


def cheapest(tenants: Sequence[Tenant], missing_bytes: int) -> list[Tenant]:
    """Return tenants of little value that free enough together; all of them if that is too little.

    Greedy by value, then whoever turned out not to be needed is spared, the most valuable first.
    """
    if missing_bytes <= 0:
        return []
    chosen: list[Tenant] = []
    freed = 0
    for one in sorted(tenants, key=lambda one: (one.value_s, -one.idle_s)):
        if freed >= missing_bytes:
            break
        chosen.append(one)
        freed += one.freed_bytes
    for one in sorted(chosen, key=lambda one: -one.value_s):
        if freed - one.freed_bytes >= missing_bytes:
            chosen.remove(one)
            freed -= one.freed_bytes
    return chosen


def _room(
    evicted: Sequence[Tenant],
    yielding: Sequence[Tenant] = (),
    *,
    is_soon: bool,
    retry_in_s: float | None,
) -> Room:
    stopped = [one for one in evicted if one.state is ReplicaState.READY and not one.may_park]
    return Room(
        evict=tuple(one.replica_id for one in evicted if one not in stopped),
        stop=tuple(one.replica_id for one in stopped),
        yielding=tuple(one.replica_id for one in yielding),
        cost_s=sum(one.value_s for one in (*evicted, *yielding)),
        is_soon=is_soon,
        retry_in_s=retry_in_s,
    )
