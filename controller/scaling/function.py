"""The one owner of a function: decisions become effects here, and effects become facts.

All state changes happen on the event loop between two awaits, so a request can never land on a
replica that is being reaped. Starting, waking, parking and stopping run as tasks of their own
(see `effects`) and report back here.
"""

import asyncio
import secrets
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import structlog

from controller.backends.base import RuntimeBackend, RuntimeInfo
from controller.clock import Clock, unix_us
from controller.errors import ActivationFailed, Conflict, ShuttingDown
from controller.ledger.intervals import LedgerState
from controller.ledger.ledger import Ledger
from controller.metrics import Metrics
from controller.scaling.activation import Activation, ColdStart
from controller.scaling.effects import Effects, ReplicaLost
from controller.scaling.generation import GenerationRequest
from controller.scaling.journal import Journal, TransitionEntry, UsageEntry
from controller.scaling.lifecycle import COMING, ENDING, Lifecycle, ReplicaState, Tier
from controller.scaling.link import Connect, RuntimeLink
from controller.scaling.placement import DevicePool
from controller.scaling.policy import replica_floor
from controller.scaling.replica_set import (
    Instruction,
    ParkReplica,
    Replica,
    ReplicaSet,
    StartReplica,
    Waiter,
    WakeReplica,
)
from controller.scaling.serving import FunctionGeneration, Ticket
from functions.spec import ColdPolicy, FunctionSpec
from runtime.rpc.client import Attachment

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

DEFAULT_ETA_S = {"parked": 1.0, "stopped": 6.0}
"""Expected cold starts before any has been measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What all functions of this controller share."""

    clock: Clock
    connect: Connect
    pool: DevicePool
    ledger: Ledger
    journal: Journal
    metrics: Metrics
    snapshot_store: Path
    gpu_hour_usd: Decimal
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One accepted revision of a function, with what it needs to run.

    Attributes:
        spec: The revision's spec.
        revision: Its content hash.
        snapshot: Directory name of the built snapshot, name@digest12.
        runtime_hash: Hash of what a running runtime cannot change.
        max_model_len: Longest prompt plus output, in tokens.
    """

    spec: FunctionSpec
    revision: str
    snapshot: str
    runtime_hash: str
    max_model_len: int


class Function:
    """A deployed function with a snapshot: its replicas, its queue, its requests.

    Args:
        deployment: The current revision.
        backend: Starts and stops its runtimes.
        node: What it shares with the others.
        created: Unix seconds of the first deployment.
    """

    def __init__(
        self, deployment: Deployment, backend: RuntimeBackend, node: Node, *, created: int
    ) -> None:
        self.deployment = deployment
        self.backend = backend
        self.created = created
        self.node = node
        self.clock = node.clock
        self.links: dict[str, RuntimeLink] = {}
        self.device_ids: dict[str, tuple[str, ...]] = {}
        self.set = ReplicaSet(deployment.spec, deployment.runtime_hash, new_id=self._new_replica_id)
        self.last_error = ""
        self._effects = Effects(self)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._live: set[FunctionGeneration] = set()
        self._activations: dict[str, Activation] = {}
        self._changed = asyncio.Event()
        self._is_shut = False
        self._cold_s: dict[str, float] = {}
        self._drained: dict[str, asyncio.Event] = {}

    @property
    def name(self) -> str:
        """The function's name, also its first served name."""
        return self.spec.name

    @property
    def spec(self) -> FunctionSpec:
        """The current revision."""
        return self.deployment.spec

    @property
    def served_names(self) -> tuple[str, ...]:
        """Every model name that reaches this function."""
        return self.spec.served_names

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self.deployment.max_model_len

    @property
    def snapshot_path(self) -> Path:
        """The snapshot's directory."""
        return self.node.snapshot_store / self.deployment.snapshot

    @property
    def tier(self) -> Tier:
        """The warmest tier a new request would find."""
        return self.set.tier

    def generate(self, request: GenerationRequest) -> FunctionGeneration:
        """Prepare one generation; nothing happens until it is entered."""
        return FunctionGeneration(self, request)

    # Requests: called by FunctionGeneration.

    def admit(self, ticket: Ticket) -> None:
        """Lease or queue at once, or raise QueueFull, ActivationFailed or ShuttingDown."""
        if self._is_shut:
            raise ShuttingDown("the controller is stopping; retry elsewhere", retry_after_s=5.0)
        if self.tier is not Tier.READY and self.spec.queue.on_cold is ColdPolicy.REJECT:
            self._wake_without_waiting()
            eta = self.eta_s(self.tier, 0.0)
            raise ActivationFailed(
                f"{self.name!r} is {self.tier} and its queue.on_cold is reject; it is being woken",
                retry_after_s=eta,
            )
        self.set.admit(ticket, now=self.clock.monotonic())
        self._after_grant(ticket)

    def readmit(self, ticket: Ticket) -> None:
        """Queue again, at the head, after the leased replica was lost."""
        if ticket.replica is not None:
            self.lost(ticket.replica, "the connection to the runtime broke")
        self.set.readmit(ticket)
        self.poke()

    def abandon(self, ticket: Ticket) -> None:
        """Leave the queue."""
        self.set.abandon(ticket)

    def release(self, replica: Replica) -> None:
        """Give a lease back."""
        self.set.release(replica, now=self.clock.monotonic())
        if replica.in_flight == 0 and (drained := self._drained.get(replica.id)):
            drained.set()
        self._account(replica)
        self.poke()

    def attachment(self, replica: Replica) -> Attachment:
        """Return a leased replica's stream."""
        return self.links[replica.id].attachment

    def eta_s(self, tier: str, waited_s: float) -> float | None:
        """Return the expected rest of a cold start, from the measured ones."""
        expected = self._cold_s.get(tier, DEFAULT_ETA_S.get(tier))
        return None if expected is None else max(expected - waited_s, 0.1)

    def entered(self, generation: FunctionGeneration) -> None:
        """Note that a request was admitted."""
        self._live.add(generation)

    def first_token(self, generation: FunctionGeneration, replica: Replica) -> None:
        """Note a request's first token; the first after a cold start closes its books."""
        activation = self._activations.pop(replica.id, None)
        if activation is not None:
            activation.lap("first_token")
            self._record_cold_start(
                activation.finish(
                    function=self.name,
                    replica_id=replica.id,
                    outcome="served",
                    waiting_since=generation.admitted_at,
                )
            )

    def left(self, generation: FunctionGeneration) -> None:
        """Note that a request is over; its record is complete."""
        self._live.discard(generation)
        record = generation.record
        age_us = int(record.duration_s * 1e6)
        started_us = unix_us(self.clock.now()) - age_us
        self.node.journal.add(UsageEntry(started_us=started_us, record=record))
        self.node.metrics.request_finished(record)
        self.poke()

    # Operations: called by the control plane.

    async def run(self) -> None:
        """Own the function until it is closed or the task is cancelled; effects end with it."""
        try:
            while not (self.set.is_closing and not self.set.replicas):
                self._turn()
                await self._wait_for_change()
        finally:
            await self._cancel_effects()

    def poke(self) -> None:
        """Have the owner look again."""
        self._changed.set()

    def sweep(self) -> None:
        """Look at every deadline; called on a tick."""
        now = self.clock.monotonic()
        for generation in list(self._live):
            generation.check_deadlines(now)
        self.poke()

    async def warm(self) -> None:
        """Return once a replica is ready; its idle clock starts anew.

        Raises:
            ApiError: It could not be brought up in time.
        """
        ticket = Ticket(num_bytes=0)
        now = self.clock.monotonic()
        self.set.admit(ticket, now=now)
        self._after_grant(ticket)
        try:
            async with asyncio.timeout(self.spec.timeouts.startup):
                await self._lease_of(ticket)
        except TimeoutError as error:
            limit = self.spec.timeouts.startup
            raise ActivationFailed(
                f"{self.name!r} was not ready within timeouts.startup, {limit:g} s"
            ) from error
        finally:
            self.set.abandon(ticket)
            if ticket.replica is not None:
                self.release(ticket.replica)

    async def park(self) -> None:
        """Park every ready replica now and return when it is done.

        Raises:
            Conflict: Requests are in flight or waiting, or replicas must be kept ready.
        """
        busy = self.set.in_flight + self.set.num_queued
        if busy:
            raise Conflict(f"{self.name!r} has {busy} requests; park it when they are done")
        if self._floor() > 0:
            raise Conflict(
                f"{self.name!r} keeps {self._floor()} replicas ready; lower scaling.min_replicas "
                "or wait for its schedule to end"
            )
        instructions = self.set.park_now(now=self.clock.monotonic(), reason="asked to")
        self._execute(instructions)
        await self._settled([instruction.replica for instruction in instructions])

    async def stop(self) -> None:
        """Drain and remove every replica and return when they are gone; the function stays."""
        now = self.clock.monotonic()
        replicas = list(self.set.replicas.values())
        instructions = (self.set.drain(replica, now=now, reason="asked to") for replica in replicas)
        self._execute([instruction for instruction in instructions if instruction is not None])
        await self._settled(replicas)

    def close(self) -> None:
        """Take no more requests and remove every replica; `run` returns when they are gone."""
        self._is_shut = True
        self.set.is_closing = True
        now = self.clock.monotonic()
        gone = ActivationFailed(f"{self.name!r} was deleted")
        self._notify(self.set.fail_waiters(gone))
        for replica in list(self.set.replicas.values()):
            instruction = self.set.drain(replica, now=now, reason="function deleted")
            if instruction is not None:
                self._execute([instruction])
        self.poke()

    async def finish_requests(self, timeout_s: float) -> None:
        """Take no more requests and give the running ones time; replicas stay as they are."""
        self._is_shut = True
        stopping = ShuttingDown("the controller is stopping; retry elsewhere", retry_after_s=5.0)
        self._notify(self.set.fail_waiters(stopping))
        deadline = self.clock.monotonic() + timeout_s
        while self._live and self.clock.monotonic() < deadline:
            self._changed.clear()
            try:
                async with asyncio.timeout(max(deadline - self.clock.monotonic(), 0.0)):
                    await self._changed.wait()
            except TimeoutError:
                break

    def update(self, deployment: Deployment, backend: RuntimeBackend) -> None:
        """Take a new revision; replicas it does not fit are replaced."""
        self.deployment = deployment
        self.backend = backend
        self.set.update(deployment.spec, deployment.runtime_hash)
        self.poke()

    def adopt(
        self,
        info: RuntimeInfo,
        link: RuntimeLink,
        state: ReplicaState,
        device_ids: tuple[str, ...],
    ) -> None:
        """Take over a runtime that an earlier controller left running."""
        now = self.clock.monotonic()
        replica = Replica(
            id=info.runtime_id,
            runtime_hash=info.revision,
            lifecycle=Lifecycle(at=now, reason="adopted", state=state),
            idle_since=now,
        )
        self.links[replica.id] = link
        self.device_ids[replica.id] = device_ids
        if state is ReplicaState.READY:
            self.node.pool.claim(replica.id, device_ids)
        self.set.adopt(replica)
        self._effects.watch(replica, link)
        self._publish()
        self.poke()

    async def exited(self, info: RuntimeInfo) -> None:
        """Hear from the backend that a runtime has exited."""
        replica = self.set.replicas.get(info.runtime_id)
        if replica is not None:
            code = "" if info.exit_code is None else f" with status {info.exit_code}"
            reason = await self._effects.with_log_tail(replica, f"the runtime exited{code}")
            self.lost(replica, reason)

    # Facts: called by the effects.

    def lost(self, replica: Replica, reason: str) -> None:
        """Note that a replica is gone or useless, and have it removed."""
        if replica.state in ENDING or replica.id not in self.set.replicas:
            return
        is_start = replica.state in COMING and not self._effects.is_waking(replica)
        log.warning("replica lost", function=self.name, replica_id=replica.id, reason=reason)
        self.last_error = reason
        activation = self._activations.pop(replica.id, None)
        if activation is not None:
            activation.lap("failed")
            cold_start = activation.finish(
                function=self.name, replica_id=replica.id, outcome="failed", waiting_since=None
            )
            self._record_cold_start(cold_start)
        now = self.clock.monotonic()
        waiters = self.set.failed(replica, now=now, reason=reason, is_start=is_start)
        self._notify(waiters)
        self._publish()
        self._run_effect(replica, self._effects.remove(replica))

    def started(self, replica: Replica, tier: Tier) -> Activation:
        """Note that bringing a replica up begins; returns the stopwatch."""
        activation = Activation(
            from_tier=tier,
            monotonic=self.clock.monotonic,
            started_us=unix_us(self.clock.now()),
        )
        self._activations[replica.id] = activation
        return activation

    def ready(self, replica: Replica) -> None:
        """Note that a replica can serve."""
        self.set.ready(replica, now=self.clock.monotonic())
        self.last_error = ""
        self._grant()
        activation = self._activations.get(replica.id)
        if activation is not None and replica.in_flight == 0:
            del self._activations[replica.id]
            cold_start = activation.finish(
                function=self.name, replica_id=replica.id, outcome="ready", waiting_since=None
            )
            self._record_cold_start(cold_start)
        self.changed()

    def changed(self) -> None:
        """Publish moves the effects made, and have the owner look again."""
        self._publish()
        self.poke()

    async def drained(self, replica: Replica) -> None:
        """Return when the replica has no lease out or the drain timeout has passed."""
        if replica.in_flight == 0:
            return
        event = self._drained.setdefault(replica.id, asyncio.Event())
        try:
            async with asyncio.timeout(self.spec.timeouts.drain):
                await event.wait()
        except TimeoutError:
            log.warning("drain timeout", function=self.name, replica_id=replica.id)
        finally:
            self._drained.pop(replica.id, None)

    # Inside.

    def _turn(self) -> None:
        self.set.floor = 0 if self._is_shut else self._floor()
        self._grant()
        if not self._is_shut or self.set.is_closing:
            self._execute(self.set.plan(self.clock.monotonic()))
        self._publish()

    async def _wait_for_change(self) -> None:
        now = self.clock.monotonic()
        deadline = self.set.next_deadline(now)
        try:
            async with asyncio.timeout(None if deadline is None else deadline - now):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def _floor(self) -> int:
        return replica_floor(self.spec.scaling, self.spec.schedules, self.clock.now())

    def _grant(self) -> None:
        for waiter in self.set.grant():
            self._after_grant(waiter)

    def _after_grant(self, waiter: Waiter) -> None:
        if waiter.replica is not None:
            self._account(waiter.replica)
            self._notify([waiter])
        self.poke()

    def _notify(self, waiters: Iterable[Waiter]) -> None:
        for waiter in waiters:
            assert isinstance(waiter, Ticket)
            waiter.decided.set()

    async def _lease_of(self, ticket: Ticket) -> Replica:
        await ticket.decided.wait()
        if ticket.failure is not None:
            raise ticket.failure
        assert ticket.replica is not None
        return ticket.replica

    def _wake_without_waiting(self) -> None:
        """Bring a replica up for the sake of later requests."""
        if "warm" not in self._tasks:
            task = asyncio.create_task(self._warm_quietly(), name=f"warm {self.name}")
            self._tasks["warm"] = task
            task.add_done_callback(lambda _: self._tasks.pop("warm", None))

    async def _warm_quietly(self) -> None:
        try:
            await self.warm()
        except ActivationFailed as error:
            log.warning("warm-up failed", function=self.name, error=error.message)

    def _execute(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            replica = instruction.replica
            if isinstance(instruction, StartReplica):
                devices = self.node.pool.reserve(replica.id, self.spec.resources.gpus)
                if devices is None:
                    self.set.unplace(replica, parked=False, now=self.clock.monotonic())
                    continue
                self.device_ids[replica.id] = devices
                effect = self._effects.start(replica)
            elif isinstance(instruction, WakeReplica):
                if not self.node.pool.claim(replica.id, self.device_ids[replica.id]):
                    self.set.unplace(replica, parked=True, now=self.clock.monotonic())
                    continue
                effect = self._effects.wake(replica)
            elif isinstance(instruction, ParkReplica):
                effect = self._effects.park(replica)
            else:
                effect = self._effects.stop(replica)
            self._run_effect(replica, effect)
        self._publish()

    def _run_effect(self, replica: Replica, effect: Coroutine[object, object, None]) -> None:
        """Run an effect as the replica's only one: a newer effect ends the older."""
        previous = self._tasks.get(replica.id)
        task = asyncio.create_task(
            self._guard(replica, effect, previous), name=f"{effect.__name__} {replica.id}"
        )
        self._tasks[replica.id] = task

    async def _guard(
        self,
        replica: Replica,
        effect: Coroutine[object, object, None],
        previous: asyncio.Task[None] | None,
    ) -> None:
        if previous is not None and not previous.done():
            previous.cancel()
            await asyncio.wait([previous])
        try:
            await effect
        except ReplicaLost as error:
            self.lost(replica, str(error))
        except Exception as error:
            # A defect in one effect must not end the owner.
            log.exception("effect failed", function=self.name, replica_id=replica.id)
            self.lost(replica, f"internal error: {error!r}")
        finally:
            if self._tasks.get(replica.id) is asyncio.current_task():
                del self._tasks[replica.id]
            self.poke()

    async def _cancel_effects(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._effects.close()

    async def _settled(self, replicas: Iterable[Replica]) -> None:
        """Wait until the effects now running on these replicas are over."""
        tasks = [task for r in replicas if (task := self._tasks.get(r.id)) is not None]
        if tasks:
            await asyncio.wait(tasks)

    def _publish(self) -> None:
        """Tell journal, ledger and metrics the moves made since the last time."""
        moves, self.set.transitions = self.set.transitions, []
        for replica, move in moves:
            log.info(
                "replica moved",
                state=str(move.target),
                function=self.name,
                replica_id=replica.id,
                reason=move.reason,
            )
            self.node.journal.add(
                TransitionEntry(
                    function=self.name,
                    replica_id=replica.id,
                    at_us=unix_us(self.clock.now()),
                    from_state=move.source,
                    to_state=move.target,
                    reason=move.reason,
                    epoch=self.node.epoch,
                )
            )
            self._account(replica)
        self.node.metrics.set_function(
            self.name,
            in_flight=self.set.in_flight,
            queued=self.set.num_queued,
            states=[str(replica.state) for replica in self.set.replicas.values()],
        )

    def _account(self, replica: Replica) -> None:
        """Tell the ledger what the replica's devices are doing."""
        if replica.state is ReplicaState.STOPPED:
            self.node.ledger.drop_claim(replica.id)
            del self.device_ids[replica.id]
            return
        state = LEDGER_STATES.get(
            replica.state, LedgerState.ACTIVE if replica.in_flight else LedgerState.IDLE
        )
        price = self.spec.cost.gpu_hour_usd
        self.node.ledger.set_claim(
            replica.id,
            function=self.name,
            devices=self.device_ids[replica.id],
            state=state,
            rate_usd_per_hour=self.node.gpu_hour_usd if price is None else price,
        )

    def _record_cold_start(self, cold_start: ColdStart) -> None:
        if cold_start.outcome != "failed":
            tier, seconds = cold_start.from_tier, cold_start.total_s
            self._cold_s[tier] = 0.5 * (self._cold_s.get(tier, seconds) + seconds)
        self.node.journal.add(cold_start)
        self.node.metrics.cold_start(cold_start)

    def _new_replica_id(self) -> str:
        return f"{self.name[:40].rstrip('-')}-{secrets.token_hex(4)}"
