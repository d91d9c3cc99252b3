"""The replicas of one function and the requests that wait for them: every decision, no effect.

One owner calls this from one thread, so acquiring and reaping can never cross: both look at the
same state and change it in the same call. `plan` is level-triggered. It compares what is with
what is needed and returns the moves to make; the state has already moved when it returns, so
calling it again asks for nothing twice.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from controller.errors import ActivationFailed, ApiError, QueueFull
from controller.scaling.lifecycle import (
    COMING,
    ENDING,
    Lifecycle,
    ReplicaState,
    Tier,
    Transition,
)
from controller.scaling.policy import needed_replicas
from controller.scaling.replica import (
    Backoff,
    Instruction,
    ParkReplica,
    Replica,
    StartReplica,
    StopReplica,
    Waiter,
    WakeReplica,
)
from functions.spec import FunctionSpec

STABLE_S = 5.0
"""A replica that is lost sooner after its start was of no use."""
_ROUTABLE = frozenset({ReplicaState.READY})


HOLD_RETRY_AFTER_S = 10.0


@dataclass(slots=True, kw_only=True)
class _Queue:
    waiters: deque[Waiter] = field(default_factory=deque)
    num_bytes: int = 0


class ReplicaSet:
    """Replicas, queue and decisions of one function.

    Args:
        spec: The current revision.
        runtime_hash: Hash of the parts of `spec` a running runtime cannot change.
        new_id: Makes ids that no runtime has had before.
    """

    def __init__(self, spec: FunctionSpec, runtime_hash: str, *, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self.spec = spec
        self.runtime_hash = runtime_hash
        self.floor = 0
        self.is_closing = False
        self.backoff = Backoff()
        self._hold_reason = ""
        self._early_losses = Backoff()
        self._is_retrying = False  # the last start to end was killed and is made once more
        self.replicas: dict[str, Replica] = {}
        self.transitions: list[tuple[Replica, Transition]] = []
        self._queue = _Queue()
        self._surplus_since: float | None = None

    @property
    def in_flight(self) -> int:
        """Leases out, over all replicas."""
        return sum(replica.in_flight for replica in self.replicas.values())

    @property
    def num_queued(self) -> int:
        """Requests that wait for a lease."""
        return len(self._queue.waiters)

    @property
    def num_ready(self) -> int:
        """Replicas that take new requests."""
        return sum(1 for _ in self._routable())

    @property
    def has_place(self) -> bool:
        """Whether a request would get a lease at once."""
        limit = self.spec.scaling.max_concurrency
        return self.num_queued == 0 and any(
            replica.in_flight < limit for replica in self._routable()
        )

    @property
    def tier(self) -> Tier:
        """The warmest tier a new request would find."""
        if self.num_ready:
            return Tier.READY
        states = {replica.state for replica in self._current()}
        is_waking = any(replica.is_waking for replica in self._current())
        # One that is ready and takes no requests will be parked.
        if is_waking or states & {ReplicaState.PARKED, ReplicaState.PARKING, ReplicaState.READY}:
            return Tier.PARKED
        return Tier.STOPPED

    def update(self, spec: FunctionSpec, runtime_hash: str) -> None:
        """Take a new revision; replicas it does not fit are put away once they are idle.

        This ends a `hold`.
        """
        self._hold_reason = ""
        self.spec = spec
        self.runtime_hash = runtime_hash
        self.backoff = self._early_losses = Backoff()
        self._is_retrying = False

    @property
    def is_held(self) -> bool:
        """Whether `hold` keeps replicas from being brought up."""
        return bool(self._hold_reason)

    def hold(self, reason: str) -> list[Waiter]:
        """Bring no replica up until there is a new revision; those that are up serve on.

        Returns:
            The requests that fail by it.
        """
        self._hold_reason = reason
        return [] if self._has_hope() else self.fail_waiters(self._failure(0.0))

    def admit(self, waiter: Waiter, *, now: float) -> None:
        """Give a request a lease at once, or a place in the queue.

        Raises:
            QueueFull: No place is left, by count or bytes.
            ActivationFailed: Nothing is ready, and the last start failed a moment ago or none may
                be tried.
        """
        if self.num_queued == 0 and self._lease(waiter):
            return
        if (self._hold_reason or self.backoff.holds(now)) and not self._has_hope():
            raise self._failure(now)
        limits = self.spec.queue
        if self.num_queued >= limits.max_requests:
            raise QueueFull(
                f"{self.spec.name!r} has {self.num_queued} requests waiting, its "
                "queue.max_requests; retry later or raise the limit",
                retry_after_s=1.0,
            )
        if self._queue.num_bytes + waiter.num_bytes > limits.max_bytes:
            raise QueueFull(
                f"the requests waiting for {self.spec.name!r} hold {self._queue.num_bytes} bytes "
                "and queue.max_bytes leaves no room for this one; retry later",
                retry_after_s=1.0,
            )
        self._queue.waiters.append(waiter)
        self._queue.num_bytes += waiter.num_bytes

    def readmit(self, waiter: Waiter) -> list[Waiter]:
        """Put a request whose replica died before its first token at the head of the queue.

        Returns:
            The requests that fail, since no replica may be brought up.
        """
        waiter.replica = None
        self._queue.waiters.appendleft(waiter)
        self._queue.num_bytes += waiter.num_bytes
        if self._hold_reason and not self._has_hope():
            return self.fail_waiters(self._failure(0.0))
        return []

    def abandon(self, waiter: Waiter) -> None:
        """Take a request out of the queue; harmless when it is not in it."""
        if waiter in self._queue.waiters:
            self._queue.waiters.remove(waiter)
            self._queue.num_bytes -= waiter.num_bytes

    def grant(self) -> list[Waiter]:
        """Give leases to waiting requests, first come first served; returns who got one."""
        granted = []
        while self._queue.waiters and self._lease(self._queue.waiters[0]):
            waiter = self._queue.waiters.popleft()
            self._queue.num_bytes -= waiter.num_bytes
            granted.append(waiter)
        return granted

    def release(self, replica: Replica, *, now: float) -> None:
        """Take a lease back; the idle clock starts with the last one."""
        assert replica.in_flight > 0, f"replica {replica.id} has no lease out"
        replica.in_flight -= 1
        replica.idle_since = now

    def plan(self, now: float) -> list[Instruction]:
        """Return the moves to make now; their states are entered before this returns."""
        return [*self._put_away(now), *self._bring_up(now)]

    def next_deadline(self, now: float) -> float | None:
        """Return the next monotonic second at which an idle, park or back-off limit is reached."""
        return min((at for at in self._deadlines() if at > now), default=None)

    def adopt(self, replica: Replica) -> None:
        """Take over a runtime that was already there."""
        self.replicas[replica.id] = replica
        self.transitions.append((replica, replica.lifecycle.history[-1]))

    def loading(self, replica: Replica, *, now: float, reason: str) -> None:
        """Note that a started runtime answers and loads."""
        self._move(replica, ReplicaState.LOADING, now, reason)

    def ready(self, replica: Replica, *, now: float) -> None:
        """Note that a replica can serve."""
        self._move(replica, ReplicaState.READY, now, "loaded")
        replica.idle_since = now
        if replica.up_since is None:
            replica.up_since = now
        self.backoff = Backoff()
        self._is_retrying = False

    def parked(self, replica: Replica, *, now: float) -> None:
        """Note that a replica has given its memory back."""
        self._move(replica, ReplicaState.PARKED, now, "memory given back")
        replica.parking = Backoff()

    def park_refused(self, replica: Replica, *, now: float, reason: str) -> None:
        """Note that a runtime would not park; it serves on, and is asked again after a while."""
        self._move(replica, ReplicaState.READY, now, reason)
        replica.parking = replica.parking.after_failure(now, reason)
        replica.idle_since = now

    def failed(
        self,
        replica: Replica,
        *,
        now: float,
        reason: str,
        is_start: bool,
        was_killed: bool = False,
    ) -> list[Waiter]:
        """Note that a replica is lost; returns the requests that fail with it.

        Args:
            replica: The lost one.
            now: Monotonic seconds.
            reason: What happened, for the history and the waiting clients.
            is_start: Whether it was lost while starting. Then, or while none may be brought up,
                waiting requests fail at once unless another replica could serve them, and the next
                start waits for a back-off.
                Otherwise a new replica takes its place; it waits too, from the second time on, if
                they are lost as soon as they are ready.
            was_killed: Whether it did not fail by itself: such a start is made once more, at once.
        """
        if is_start and replica.runtime_hash != self.runtime_hash:
            self._move(replica, ReplicaState.FAILED, now, reason)
            return []  # which says nothing of the revision that requests wait for
        is_early = replica.up_since is not None and now - replica.up_since < STABLE_S
        self._move(replica, ReplicaState.FAILED, now, reason)
        may_retry = was_killed and not replica.is_retry and not self.backoff.holds(now)
        has_failed = is_start and not may_retry
        if is_start:
            self._is_retrying = may_retry
        if has_failed:
            self.backoff = self.backoff.after_failure(now, reason)
        elif is_early:
            self.backoff = self._early_losses = self._early_losses.after_early_loss(now, reason)
        if self._has_hope() or not (has_failed or self._hold_reason):
            return []
        return self.fail_waiters(self._failure(now))

    def stopped(self, replica: Replica, *, now: float) -> None:
        """Forget a replica whose runtime is gone."""
        self._move(replica, ReplicaState.STOPPED, now, "runtime removed")
        del self.replicas[replica.id]

    def unplace(self, replica: Replica, *, parked: bool) -> None:
        """Undo a start or wake for which no device was free; `plan` will ask again."""
        move = (replica, replica.lifecycle.history[-1])
        self.transitions = [entry for entry in self.transitions if entry != move]
        if parked:
            replica.lifecycle.undo()
        else:
            del self.replicas[replica.id]

    def drain(self, replica: Replica, *, now: float, reason: str) -> StopReplica | None:
        """Begin to stop a replica, unless it is on its way out already."""
        if replica.state in ENDING:
            return None
        self._move(replica, ReplicaState.DRAINING, now, reason)
        return StopReplica(replica=replica)

    def park_now(self, *, now: float, reason: str) -> list[Instruction]:
        """Park every replica that is ready and idle, whatever its idle timeout."""
        idle = [
            replica
            for replica in self.replicas.values()
            if replica.state is ReplicaState.READY and replica.in_flight == 0
        ]
        return [self._park(replica, now, reason) for replica in idle]

    def evict(
        self, replica: Replica, *, now: float, reason: str, may_park: bool = True
    ) -> Instruction | None:
        """Park an idle replica or stop a parked one; None if it must stay or is neither any more.

        An idle one that may not be parked is stopped too.
        """
        is_idle = replica.state is ReplicaState.READY and replica.in_flight == 0
        is_parked = replica.state is ReplicaState.PARKED
        if not (is_idle or is_parked) or self.is_needed(replica):
            return None
        if is_idle and may_park:
            return self._park(replica, now, reason)
        return self.drain(replica, now=now, reason=reason)

    def yield_place(self, replica: Replica) -> bool:
        """Ask a ready replica to run empty; says whether it will, which one that must stay won't."""
        if replica.state is not ReplicaState.READY or self.is_needed(replica):
            return False
        replica.is_yielding = True
        return True

    def yields(self, replica: Replica) -> bool:
        """Return whether a replica runs empty for others: it was asked to and need not stay."""
        return replica.is_yielding and not self.is_needed(replica)

    def is_needed(self, replica: Replica) -> bool:
        """Return whether a replica must stay ready for the sake of the floor.

        Those are as many as the floor says, first those that serve, then those called last.
        """
        ready = [one for one in self._current() if one.state is ReplicaState.READY]
        ready.sort(key=lambda one: (one.is_yielding, one.in_flight == 0, -one.idle_since))
        return replica in ready[: self.floor]

    def _current(self) -> Iterator[Replica]:
        for replica in self.replicas.values():
            if replica.runtime_hash == self.runtime_hash and not replica.is_cordoned:
                yield replica

    def _routable(self) -> Iterator[Replica]:
        """Yield the replicas that take new requests."""
        for replica in self._current():
            if replica.state in _ROUTABLE and not self.yields(replica):
                yield replica

    def _lease(self, waiter: Waiter) -> bool:
        limit = self.spec.scaling.max_concurrency
        free = [replica for replica in self._routable() if replica.in_flight < limit]
        if not free:
            return False
        waiter.replica = min(free, key=lambda replica: replica.in_flight)
        waiter.replica.in_flight += 1
        return True

    def _has_hope(self) -> bool:
        hopeful = COMING | {ReplicaState.READY} if self._hold_reason else set(ReplicaState) - ENDING
        return any(replica.state in hopeful for replica in self._current())

    def _failure(self, now: float) -> ActivationFailed:
        if self._hold_reason:
            return ActivationFailed(
                f"{self.spec.name!r} cannot be started: {self._hold_reason}",
                retry_after_s=HOLD_RETRY_AFTER_S,
            )
        wait_s = max(self.backoff.retry_at - now, 0.0)
        return ActivationFailed(
            f"{self.spec.name!r} could not be started: {self.backoff.reason}; the next attempt is "
            f"possible in {wait_s:.0f} s; `coldspark logs {self.spec.name}` may say more",
            retry_after_s=wait_s,
        )

    def fail_waiters(self, failure: ApiError) -> list[Waiter]:
        """Empty the queue for one reason; returns who was in it."""
        lost = list(self._queue.waiters)
        for waiter in lost:
            waiter.failure = failure
        self._queue = _Queue()
        return lost

    def _needed(self) -> int:
        if self.is_closing:
            return 0
        # Requests on replicas that are on their way out are served there and ask for nothing new.
        carried = sum(r.in_flight for r in self._current() if r.state not in ENDING)
        load = carried + self.num_queued
        return needed_replicas(self.spec.scaling, load=load, floor=self.floor)

    def _bring_up(self, now: float) -> list[Instruction]:
        if self.is_closing or self._hold_reason:
            return []
        current = list(self._current())
        up = [r for r in current if r.state in COMING | {ReplicaState.READY}]
        on_the_way = [r for r in current if r.state is ReplicaState.PARKING]
        missing = self._needed() - len(up) - self._uncordon(self._needed() - len(up))
        instructions: list[Instruction] = []
        parked = [r for r in current if r.state is ReplicaState.PARKED]
        for replica in sorted(parked, key=lambda r: -r.idle_since)[: max(missing, 0)]:
            self._move(replica, ReplicaState.LOADING, now, "requests wait")
            instructions.append(WakeReplica(replica=replica))
        if self.backoff.holds(now):
            return instructions
        # A replica that is just being parked is woken as soon as it is: cheaper than a start.
        still_missing = missing - len(instructions) - len(on_the_way)
        room = self.spec.scaling.max_replicas - sum(r.state not in ENDING for r in current)
        for _ in range(min(still_missing, room)):
            instructions.append(StartReplica(replica=self._create(now)))
        return instructions

    def _uncordon(self, missing: int) -> int:
        """Take cordoned replicas back into service, the cheapest there are; returns how many."""
        spare = [
            replica
            for replica in self.replicas.values()
            if replica.is_cordoned
            and replica.state is ReplicaState.READY
            and not replica.is_yielding
            and replica.runtime_hash == self.runtime_hash
        ][: max(missing, 0)]
        for replica in spare:
            replica.is_cordoned = False
        return len(spare)

    def _create(self, now: float) -> Replica:
        replica = Replica(
            id=self._new_id(),
            runtime_hash=self.runtime_hash,
            lifecycle=Lifecycle(at=now, reason="requests wait"),
            idle_since=now,
            is_retry=self._is_retrying,
        )
        self.replicas[replica.id] = replica
        self.transitions.append((replica, replica.lifecycle.history[-1]))
        return replica

    def _put_away(self, now: float) -> list[Instruction]:
        self._choose_surplus(now)
        instructions: list[Instruction] = []
        for replica in list(self.replicas.values()):
            is_old = replica.runtime_hash != self.runtime_hash
            may_go = replica.state in (ReplicaState.READY, ReplicaState.PARKED)
            if replica.in_flight > 0 or not (may_go or (is_old and replica.state in COMING)):
                continue
            if self.is_closing:
                instructions += self._stop(replica, now, "function deleted")
            elif is_old:
                instructions += self._stop(replica, now, "replaced by a newer revision")
            elif replica.state is ReplicaState.PARKED:
                if self._is_expired(replica, now):
                    instructions += self._stop(replica, now, "park timeout")
            elif replica.parking.holds(now):
                continue
            elif self.yields(replica):
                instructions.append(self._park(replica, now, "another function needs its device"))
            elif replica.is_cordoned:
                instructions.append(self._park(replica, now, "more replicas than needed"))
            elif self._is_idle(replica, now):
                instructions.append(self._park(replica, now, "idle timeout"))
        return instructions

    def _choose_surplus(self, now: float) -> None:
        """Cordon the least busy replica once there has been one too many for long enough."""
        ready = [r for r in self._current() if r.state is ReplicaState.READY]
        if len(ready) <= max(self._needed(), 1):
            self._surplus_since = None
            return
        if self._surplus_since is None:
            self._surplus_since = now
        if now - self._surplus_since >= self.spec.scaling.scale_down_delay:
            min(ready, key=lambda r: (r.in_flight, r.idle_since)).is_cordoned = True
            self._surplus_since = None

    def _is_idle(self, replica: Replica, now: float) -> bool:
        timeout = self.spec.scaling.idle_timeout
        if timeout is None or self.num_queued > 0:
            return False
        ready = sum(r.state is ReplicaState.READY for r in self._current())
        return ready > self.floor and now - replica.idle_since >= timeout

    def _is_expired(self, replica: Replica, now: float) -> bool:
        timeout = self.spec.scaling.park_timeout
        if timeout is None or self.num_queued > 0:
            return False
        return now - replica.lifecycle.since >= timeout

    def _deadlines(self) -> Iterator[float]:
        scaling = self.spec.scaling
        for replica in self.replicas.values():
            is_idle = replica.state is ReplicaState.READY and replica.in_flight == 0
            if is_idle and scaling.idle_timeout is not None:
                yield max(replica.idle_since + scaling.idle_timeout, replica.parking.retry_at)
            if replica.state is ReplicaState.PARKED and scaling.park_timeout is not None:
                yield replica.lifecycle.since + scaling.park_timeout
        if self._surplus_since is not None:
            yield self._surplus_since + scaling.scale_down_delay
        if self.backoff.num_failures:
            yield self.backoff.retry_at

    def _park(self, replica: Replica, now: float, reason: str) -> ParkReplica:
        replica.is_cordoned = replica.is_yielding = False
        self._move(replica, ReplicaState.PARKING, now, reason)
        return ParkReplica(replica=replica)

    def _stop(self, replica: Replica, now: float, reason: str) -> list[Instruction]:
        instruction = self.drain(replica, now=now, reason=reason)
        return [] if instruction is None else [instruction]

    def _move(self, replica: Replica, target: ReplicaState, now: float, reason: str) -> None:
        self.transitions.append((replica, replica.lifecycle.move(target, at=now, reason=reason)))
