"""What one function tells the ledger, the journal and the metrics."""

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Sequence
from decimal import Decimal
from statistics import median
from typing import TYPE_CHECKING

import structlog

from controller.clock import unix_us
from controller.ledger.intervals import LedgerState
from controller.scaling.activation import Activation, ColdStart, PhaseTiming
from controller.scaling.generation import GenerationRecord
from controller.scaling.journal import TransitionEntry, UsageEntry
from controller.scaling.lifecycle import COMING, ReplicaState, Tier, Transition
from controller.scaling.replica import Replica
from snapshots.profiles import ColdStartTimes

if TYPE_CHECKING:
    from controller.scaling.function import Function

log = structlog.get_logger(__name__)

LEDGER_STATES = {
    ReplicaState.STARTING: LedgerState.STARTING,
    ReplicaState.LOADING: LedgerState.LOADING,
    ReplicaState.PARKING: LedgerState.IDLE,
    ReplicaState.PARKED: LedgerState.PARKED,
    ReplicaState.DRAINING: LedgerState.DRAINING,
    ReplicaState.FAILED: LedgerState.FAILED,
}
"""What a replica's state is to the ledger; ready is active or idle by its leases."""

DEFAULT_ETA_S = {"parked": 1.0, "standby": 2.0, "stopped": 6.0}
"""Expected cold starts before any has been measured, here or by whoever made the profile."""

WAITS = frozenset({"queue", "room"})
"""Phases that tell of others, and nothing of how long a replica takes to come up."""

NUM_LATEST = 20  # cold starts whose medians are kept


class Books:
    """Keeps one function's books; every method is quick and does no I/O."""

    def __init__(self, function: "Function") -> None:
        self._function = function
        self._node = function.node
        self._activations: dict[str, Activation] = {}
        self._last: dict[str, Activation] = {}
        self._latest: defaultdict[str, deque[ColdStart]] = defaultdict(
            lambda: deque(maxlen=NUM_LATEST)
        )

    @property
    def rate_usd_per_hour(self) -> Decimal:
        """What one of the function's devices costs."""
        price = self._function.spec.cost.gpu_hour_usd
        return self._node.gpu_hour_usd if price is None else price

    def began(self, replica: Replica, tier: Tier, *, room_s: float = 0.0) -> Activation:
        """Note that bringing a replica up begins, after a wait for room; returns the stopwatch."""
        clock = self._node.clock
        activation = Activation(
            from_tier=tier, monotonic=clock.monotonic, started_us=unix_us(clock.now())
        )
        activation.waited(room_s)
        self._activations[replica.id] = activation
        return activation

    def served(self, replica: Replica, *, waiting_since: float) -> None:
        """Note a first token since the monotonic second its request was admitted."""
        self._finish(replica, lap="first_token", outcome="ready", waiting_since=waiting_since)

    def timeline(
        self, replica: Replica, *, received_at: float | None, admitted_at: float
    ) -> Sequence[PhaseTiming]:
        """Return the phases of a replica's last cold start that a request saw of it until now.

        None if it was up when the request was admitted, whatever the function's tier was then.
        """
        activation = self._last.get(replica.id)
        if activation is None:
            return ()
        seen = activation.seen(admitted_at, self._node.clock.monotonic())
        if not seen or received_at is None:
            return seen
        return (PhaseTiming("gateway", admitted_at - received_at), *seen)

    def ready(self, replica: Replica) -> None:
        """Note that a replica came up and nobody waits for its first token."""
        self._finish(replica, lap="", outcome="ready", waiting_since=None)

    def failed(self, replica: Replica, *, waiting_since: float | None) -> None:
        """Note that a replica was lost, possibly while it came up.

        Args:
            replica: The lost one.
            waiting_since: Monotonic second the first of those began to wait whom it leaves
                waiting; None when nobody waits.
        """
        self._node.metrics.runtime_crashed(self._function.name)
        self._finish(replica, lap="failed", outcome="failed", waiting_since=waiting_since)

    def used(self, record: GenerationRecord) -> None:
        """Note a request that is over."""
        started_us = unix_us(self._node.clock.now()) - int(record.duration_s * 1e6)
        self._node.journal.add(UsageEntry(started_us=started_us, record=record))
        self._node.metrics.generation_finished(record)

    def eta_s(self, tier: str, waited_s: float) -> float | None:
        """Return the expected rest of a cold start after some seconds of waiting.

        None while it waits for the starts of others, or takes longer than expected: nobody knows
        then, for want of a device, say.
        """
        if self._node.starts.is_waiting(self._function.name):
            return None
        now = self._node.clock.monotonic()
        own_s = max((now - one.placed_at for one in self._activations.values()), default=waited_s)
        left_s = self.reload_s(tier) - min(waited_s, own_s)
        return left_s if left_s > 0 else None

    def reload_s(self, tier: str) -> float:
        """Return how long bringing a replica up from a tier takes, waits for others left out.

        The median of those seen here, else what the snapshot's profile says, else a guess.
        """
        if latest := self._latest.get(tier):
            return median(map(_own_s, latest))
        known = self._function.deployment.reload_s.get(tier)
        return DEFAULT_ETA_S.get(tier, 0.0) if known is None else known

    def cold_start_times(self) -> dict[str, ColdStartTimes]:
        """Return the medians of the cold starts seen here, by tier."""
        return {tier: _times(latest) for tier, latest in self._latest.items()}

    def publish(self) -> None:
        """Tell everybody the moves made since the last time."""
        replica_set = self._function.set
        moves, replica_set.transitions = replica_set.transitions, []
        for replica, move in moves:
            self._record(replica, move)
            self.account(replica)
        name, metrics = self._function.name, self._node.metrics
        metrics.set_load(name, in_flight=replica_set.in_flight, queued=replica_set.num_queued)
        if moves:
            states = (str(replica.state) for replica in replica_set.replicas.values())
            metrics.set_replicas(name, Counter(states))

    def account(self, replica: Replica) -> None:
        """Tell the ledger what a replica's devices are doing now."""
        if replica.state is ReplicaState.STOPPED:
            self._node.ledger.drop_claim(replica.id)
            self._activations.pop(replica.id, None)  # of one that was stopped while it came up
            self._last.pop(replica.id, None)
        home = self._function.homes.get(replica.id)
        if home is None or replica.id not in self._function.set.replicas:
            return
        state = LEDGER_STATES.get(
            replica.state, LedgerState.ACTIVE if replica.in_flight else LedgerState.IDLE
        )
        self._node.ledger.set_claim(
            replica.id,
            function=self._function.name,
            devices=home.device_ids,
            state=state,
            rate_usd_per_hour=self.rate_usd_per_hour,
        )

    def _record(self, replica: Replica, move: Transition) -> None:
        name = self._function.name
        if move.target not in COMING:
            self._node.starts.done(replica.id)
        if move.target in (ReplicaState.PARKED, ReplicaState.STOPPED):
            self._node.metrics.replica_reaped(function=name, to_tier=str(move.target))
        log.info(
            "replica moved",
            function=name,
            replica_id=replica.id,
            state=str(move.target),
            reason=move.reason,
        )
        self._node.journal.add(
            TransitionEntry(
                function=name,
                replica_id=replica.id,
                at_us=unix_us(self._node.clock.now()),
                from_state=move.source,
                to_state=move.target,
                reason=move.reason,
                epoch=self._node.epoch,
            )
        )

    def _finish(
        self, replica: Replica, *, lap: str, outcome: str, waiting_since: float | None
    ) -> None:
        activation = self._activations.pop(replica.id, None)
        if activation is None:
            return
        self._last[replica.id] = activation
        if lap:
            activation.lap(lap)
        cold_start = activation.finish(
            function=self._function.name,
            replica_id=replica.id,
            outcome=outcome,
            waiting_since=waiting_since,
        )
        if outcome != "failed":
            self._latest[cold_start.from_tier].append(cold_start)
        self._node.journal.add(cold_start)
        self._node.metrics.cold_start_finished(
            function=cold_start.function,
            from_tier=cold_start.from_tier,
            outcome=outcome,
            seconds=cold_start.total_s,
            phases={phase.name: phase.seconds for phase in cold_start.phases},
        )


def _own_s(cold_start: ColdStart) -> float:
    waits = (phase.seconds for phase in cold_start.phases if phase.name in WAITS)
    return cold_start.total_s - sum(waits)


def _times(cold_starts: Collection[ColdStart]) -> ColdStartTimes:
    phases: defaultdict[str, list[float]] = defaultdict(list)
    for cold_start in cold_starts:
        for phase in cold_start.phases:
            if phase.name not in WAITS:
                phases[phase.name].append(phase.seconds)
    return ColdStartTimes(
        count=len(cold_starts),
        total_s=round(median(map(_own_s, cold_starts)), 6),
        phases={name: round(median(seconds), 6) for name, seconds in phases.items()},
    )
