"""The one owner of a function: decisions become effects here, and effects become facts.

All state changes happen on the event loop between two awaits, so a request can never land on a
replica that is being reaped. Starting, waking, parking and stopping run as tasks of their own
(see `effects`) and report back here.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from controller.backends.base import RuntimeBackend, RuntimeInfo
from controller.errors import (
    ActivationFailed,
    ApiError,
    Conflict,
    ModelNotFound,
    QueueFull,
    ShuttingDown,
)
from controller.scaling.books import Books
from controller.scaling.deployment import Deployment
from controller.scaling.effects import DEFECT_PAUSE_S, Effects
from controller.scaling.embedding import EmbeddingRequest, Pooling
from controller.scaling.embedding_call import FunctionEmbedding
from controller.scaling.engine_figures import EngineFigures
from controller.scaling.generation import FunctionLoad, GenerationRequest
from controller.scaling.lifecycle import COMING, ENDING, Lifecycle, ReplicaState, Tier
from controller.scaling.link import RuntimeConnection, RuntimeLink, SequenceStream
from controller.scaling.node import Home, Node
from controller.scaling.policy import Floor, replica_floor
from controller.scaling.profiles import Profiles
from controller.scaling.replica import (
    Instruction,
    ParkReplica,
    Replica,
    StartReplica,
    Waiter,
    WakeReplica,
)
from controller.scaling.replica_set import ReplicaSet
from controller.scaling.serving import FunctionGeneration, LiveRequest, Ticket
from controller.scaling.tenancy import Tenancy
from functions.spec import ColdPolicy, FunctionSpec

log = structlog.get_logger(__name__)

TIMER_RESOLUTION_S = 0.001


class Function:
    """A deployed function with a snapshot: its replicas, its queue, its requests.

    Args:
        deployment: The current revision.
        backend: Starts and stops its runtimes.
        node: What it shares with the others.
        created: Unix seconds of the first deployment.
        on_snapshot_unusable: Told (snapshot, why) when a runtime could not load it.
    """

    def __init__(
        self,
        deployment: Deployment,
        backend: RuntimeBackend,
        node: Node,
        *,
        created: int,
        on_snapshot_unusable: Callable[[str, str], None] = lambda _snapshot, _reason: None,
    ) -> None:
        self.deployment = deployment
        self.backend = backend
        self.created = created
        self.node = node
        self.clock = node.clock
        self._on_snapshot_unusable = on_snapshot_unusable
        self.links: dict[str, RuntimeLink] = {}
        self.homes: dict[str, Home] = {}
        self.set = ReplicaSet(deployment.spec, deployment.runtime_hash, new_id=self._new_replica_id)
        self.last_error = ""
        self.books = Books(self)
        self.tenancy = Tenancy(self)
        self.engines = EngineFigures(deployment.spec.name, node.metrics)
        self.profiles = Profiles(self)
        self._effects = Effects(self)
        self._warming: asyncio.Task[None] | None = None
        self._live: set[LiveRequest] = set()
        self._changed = asyncio.Event()
        self._is_shut = False
        self._known_floor: Floor | None = None
        self._drained: dict[str, asyncio.Event] = {}

    @property
    def name(self) -> str:
        """The function's name; clients call it by its served names."""
        return self.spec.name

    @property
    def spec(self) -> FunctionSpec:
        """The current revision."""
        return self.deployment.spec

    @property
    def runtime_ids(self) -> set[str]:
        """The runtimes its replicas live in."""
        return {home.runtime_id for home in self.homes.values()}

    @property
    def served_names(self) -> tuple[str, ...]:
        """Every model name that reaches this function."""
        return self.spec.served_names

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""
        return self.deployment.max_model_len

    @property
    def load(self) -> FunctionLoad:
        """What it has to do now."""
        tier = self.tier
        return FunctionLoad(
            num_ready=self.set.num_ready,
            in_flight=self.set.in_flight,
            num_queued=self.set.num_queued,
            wake_s=0.0 if tier is Tier.READY else self.eta_s(tier, 0.0) or 0.0,
        )

    @property
    def pooling(self) -> Pooling | None:
        """How it embeds; None for one that generates."""
        return self.deployment.pooling

    @property
    def snapshot_path(self) -> Path:
        """The snapshot's directory."""
        return self.node.snapshot_store / self.deployment.snapshot

    @property
    def tier(self) -> Tier:
        """The warmest tier a new request would find."""
        if self.set.tier is not Tier.STOPPED:
            return self.set.tier
        coming = (r for r in self.set.replicas.values() if r.state in COMING)
        is_warm = any(self.homes[r.id].tier is Tier.STANDBY for r in coming if r.id in self.homes)
        has_standby = is_warm or self.node.standbys.has_ready(self.backend)
        return Tier.STANDBY if has_standby else Tier.STOPPED

    def generate(self, request: GenerationRequest) -> FunctionGeneration:
        """Prepare one generation; nothing happens until it is entered."""
        return FunctionGeneration(self, request)

    def embed(self, request: EmbeddingRequest) -> FunctionEmbedding:
        """Prepare one call to embed; nothing happens until it is entered."""
        return FunctionEmbedding(self, request)

    # Requests: called by FunctionGeneration and FunctionEmbedding.

    def admit(self, ticket: Ticket) -> None:
        """Lease or queue at once, or raise why not.

        Raises:
            QueueFull: No place is left.
            ActivationFailed: No replica can be brought up now.
            ModelNotFound: The function has been deleted.
            ShuttingDown: The controller is stopping.
        """
        if self._is_shut:
            raise self._refusal()
        if not ticket.may_wake and not self.set.has_place:
            raise ActivationFailed(
                f"no replica of {self.name!r} has room now and this request may wake none",
                retry_after_s=1.0,
            )
        if self.tier is not Tier.READY and self.spec.queue.on_cold is ColdPolicy.REJECT:
            self._wake_without_waiting()
            eta = self.eta_s(self.tier, 0.0)
            raise ActivationFailed(
                f"{self.name!r} is {self.tier} and its queue.on_cold is reject; it is being woken",
                retry_after_s=eta,
            )
        now = self.clock.monotonic()
        self.tenancy.called(now)
        try:
            self.set.admit(ticket, now=now)
        except QueueFull as error:
            eta_s = self.eta_s(self.tier, 0.0)  # nobody leaves the queue before a replica is up
            error.retry_after_s = max(error.retry_after_s or 0.0, eta_s or 0.0)
            raise
        self._after_grant(ticket)

    def readmit(self, ticket: Ticket) -> None:
        """Queue again, at the head, after the leased replica was lost; a shut function refuses."""
        if ticket.replica is not None:
            self.lost(ticket.replica, "the connection to the runtime broke")
        self.set.readmit(ticket)
        if self._is_shut:
            self._refuse_waiters()
        self.poke()

    def abandon(self, ticket: Ticket) -> None:
        """Leave the queue."""
        self.set.abandon(ticket)
        self.poke()

    def release(self, replica: Replica) -> None:
        """Give a lease back."""
        self.set.release(replica, now=self.clock.monotonic())
        if replica.in_flight == 0:
            if (drained := self._drained.get(replica.id)) is not None:
                drained.set()
            self.profiles.idle(replica)
        self.books.account(replica)
        self.poke()

    def attachment(self, replica: Replica) -> SequenceStream:
        """Return a leased replica's stream."""
        return self.links[replica.id].attachment

    def connection(self, replica: Replica) -> RuntimeConnection:
        """Return a leased replica's connection."""
        return self.links[replica.id].connection

    def eta_s(self, tier: str, waited_s: float) -> float | None:
        """Return the expected rest of a cold start, from the measured ones."""
        return self.books.eta_s(tier, waited_s)

    def entered(self, generation: LiveRequest) -> None:
        """Note that a request was admitted."""
        self._live.add(generation)

    def first_token(self, generation: LiveRequest, replica: Replica) -> None:
        """Note a request's first token; the first after a cold start closes its books."""
        self.books.served(replica, waiting_since=generation.queued_at)
        if generation.record.tier != Tier.READY:
            generation.record.timeline = self.books.timeline(
                replica, received_at=generation.received_at, admitted_at=generation.admitted_at
            )

    def left(self, generation: LiveRequest) -> None:
        """Note that a request is over; its record is complete."""
        self._live.discard(generation)
        replica = self.set.replicas.get(generation.record.replica_id or "")
        if replica is not None and generation.record.first_token_s is None:
            self.books.ready(replica)
        self.books.used(generation.record)
        self.poke()

    # Operations: called by the control plane.

    async def run(self) -> None:
        """Own the function until it is closed or the task is cancelled; effects end with it."""
        try:
            while not (self.set.is_closing and not self.set.replicas):
                try:
                    self._turn()
                except Exception:
                    # A defect in one decision must not end all that come after it.
                    log.exception("turn failed", function=self.name)
                    await asyncio.sleep(DEFECT_PAUSE_S)
                    continue
                await self._wait_for_change()
        finally:
            self._is_shut = True
            self.tenancy.leave_line()
            self._refuse_waiters()
            if self._warming is not None:
                self._warming.cancel()
            await self.profiles.close()
            await self._effects.close()

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
        if self._is_shut:
            raise self._refusal()
        ticket = Ticket(num_bytes=0)
        now = self.clock.monotonic()
        self.set.admit(ticket, now=now)
        self._after_grant(ticket)
        try:
            async with asyncio.timeout(self.spec.timeouts.startup):
                self.books.ready(await self._lease_of(ticket))
        except TimeoutError as error:
            limit = self.spec.timeouts.startup
            raise ActivationFailed(
                f"{self.name!r} was not ready within timeouts.startup, {limit:g} s"
            ) from error
        finally:
            self.abandon(ticket)
            if ticket.replica is not None:
                self.release(ticket.replica)

    async def park(self) -> None:
        """Park every ready replica now and return when it is done.

        Raises:
            Conflict: Requests are in flight or waiting, replicas must be kept ready, or a runtime
                refuses.
        """
        busy = self.set.in_flight + self.set.num_queued
        if busy:
            raise Conflict(f"{self.name!r} has {busy} requests; park it when they are done")
        if self._floor() > 0:
            raise Conflict(
                f"{self.name!r} keeps {self._floor()} replicas ready; lower scaling.min_replicas "
                "or wait for its schedule to end"
            )
        self.execute(self.set.park_now(now=self.clock.monotonic(), reason="asked to"))
        parking = [r for r in self.set.replicas.values() if r.state is ReplicaState.PARKING]
        await self._effects.settled(parking)
        for replica in parking:
            move = replica.lifecycle.history[-1]
            if (move.source, move.target) == (ReplicaState.PARKING, ReplicaState.READY):
                raise Conflict(f"{self.name!r} was not parked: {move.reason}; it serves on")

    async def stop(self) -> None:
        """Drain and remove every replica and return when they are gone; the function stays."""
        now = self.clock.monotonic()
        replicas = list(self.set.replicas.values())
        instructions = (self.set.drain(replica, now=now, reason="asked to") for replica in replicas)
        self.execute([instruction for instruction in instructions if instruction is not None])
        await self._effects.settled(replicas)

    def close(self) -> None:
        """Take no more requests and remove every replica; `run` returns when they are gone."""
        self._is_shut = True
        self.set.is_closing = True
        self._refuse_waiters()
        now = self.clock.monotonic()
        for replica in list(self.set.replicas.values()):
            instruction = self.set.drain(replica, now=now, reason="function deleted")
            if instruction is not None:
                self.execute([instruction])
        self.poke()

    async def finish_requests(self, timeout_s: float) -> None:
        """Take no more requests and give the running ones time; replicas stay as they are."""
        self._is_shut = True
        self._refuse_waiters()
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
        self._known_floor = None
        self.poke()

    def hold(self, reason: str) -> None:
        """Bring no replica up until `update`; requests that only that could serve fail."""
        self._notify(self.set.hold(reason))
        self.poke()

    def snapshot_unusable(self, reason: str) -> None:
        """Note that a runtime found the snapshot missing or damaged."""
        self._on_snapshot_unusable(self.deployment.snapshot, reason)

    def adopt(
        self,
        replica_id: str,
        runtime_hash: str,
        home: Home,
        link: RuntimeLink,
        state: ReplicaState,
    ) -> None:
        """Take over a runtime that an earlier controller left running."""
        now = self.clock.monotonic()
        replica = Replica(
            id=replica_id,
            runtime_hash=runtime_hash,
            lifecycle=Lifecycle(at=now, reason="adopted", state=state),
            idle_since=now,
        )
        self.links[replica.id] = link
        self.homes[replica.id] = home
        self.tenancy.adopted(replica)
        self.set.adopt(replica)
        self._effects.watch(replica, link)
        self.books.publish()
        self.poke()

    async def exited(self, info: RuntimeInfo) -> None:
        """Hear from a backend that a runtime, of this function or another, has exited."""
        for replica_id in [
            k for k, home in self.homes.items() if home.runtime_id == info.runtime_id
        ]:
            replica = self.set.replicas[replica_id]
            code = "" if info.exit_code is None else f" with status {info.exit_code}"
            log_tail = await self._effects.log_tail(replica)
            self.lost(replica, f"the runtime exited{code}", log_tail=log_tail)

    # Facts: called by the effects.

    def lost(self, replica: Replica, reason: str, *, log_tail: str = "") -> None:
        """Note that a replica is gone or useless, and have it removed.

        Args:
            replica: The lost one.
            reason: Why; clients are told.
            log_tail: The end of its log, which only the operator gets to see.
        """
        if replica.state in ENDING or replica.id not in self.set.replicas:
            return
        is_start = replica.state in COMING and not replica.is_waking
        log.warning("replica lost", function=self.name, replica_id=replica.id, reason=reason)
        self.last_error = f"{reason}; its log ends: {log_tail}" if log_tail else reason
        self.books.failed(replica)
        now = self.clock.monotonic()
        waiters = self.set.failed(replica, now=now, reason=reason, is_start=is_start)
        self._notify(waiters)
        self.books.publish()
        self._effects.run(replica, self._effects.remove(replica))

    def ready(self, replica: Replica) -> None:
        """Note that a replica can serve."""
        self.set.ready(replica, now=self.clock.monotonic())
        self.last_error = ""
        self._grant()
        if replica.in_flight == 0:
            self.books.ready(replica)
        self.changed()

    def changed(self) -> None:
        """Publish moves the effects made, and have the owner look again."""
        self.books.publish()
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
        may_act = not self._is_shut or self.set.is_closing
        if may_act and self.execute(self.set.plan(self.clock.monotonic())):
            self.tenancy.leave_line()
        self.books.publish()
        self.tenancy.show()

    async def _wait_for_change(self) -> None:
        now = self.clock.monotonic()
        deadline = self.set.next_deadline(now)
        wait_s = None if deadline is None else max(deadline - now, TIMER_RESOLUTION_S)
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
            await asyncio.sleep(0)  # first off with the request that was just admitted
        except TimeoutError:
            pass
        self._changed.clear()

    def _floor(self) -> int:
        now = self.clock.now()
        if self._known_floor is None or not self._known_floor.holds(now):
            self._known_floor = replica_floor(self.spec.scaling, self.spec.schedules, now)
        return self._known_floor.num_replicas

    def _grant(self) -> None:
        for waiter in self.set.grant():
            self._after_grant(waiter)

    def _after_grant(self, waiter: Waiter) -> None:
        if waiter.replica is not None:
            self.books.account(waiter.replica)
            self._notify([waiter])
        self.poke()

    def _refusal(self) -> ApiError:
        """Return why a shut function takes no request."""
        if self.set.is_closing:
            return ModelNotFound(f"{self.name!r} was deleted; GET /v1/models lists what is served")
        return ShuttingDown("the controller is stopping; retry elsewhere", retry_after_s=5.0)

    def _refuse_waiters(self) -> None:
        self._notify(self.set.fail_waiters(self._refusal()))

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
        if self._warming is None or self._warming.done():
            self._warming = asyncio.create_task(self._warm_quietly(), name=f"warm {self.name}")

    async def _warm_quietly(self) -> None:
        try:
            await self.warm()
        except ApiError as error:
            log.warning("warm-up failed", function=self.name, error=error.message)

    def execute(self, instructions: Iterable[Instruction]) -> bool:
        """Begin to carry instructions out; says whether every replica got its place."""
        has_place = True
        for instruction in instructions:
            try:
                has_place = self._begin(instruction) and has_place
            except Exception as error:
                # The set has moved the replica already: it must not stay there for nothing.
                replica_id = instruction.replica.id
                log.exception("instruction failed", function=self.name, replica_id=replica_id)
                self.lost(instruction.replica, f"internal error: {error!r}")
        self.books.publish()
        return has_place

    def _begin(self, instruction: Instruction) -> bool:
        """Begin to carry one out; says whether its replica has a place."""
        replica = instruction.replica
        if isinstance(instruction, StartReplica):
            home = self.tenancy.settle(replica)
            if home is None:
                self.set.unplace(replica, parked=False, now=self.clock.monotonic())
                return False
            self.homes[replica.id] = home
            effect = self._effects.start(replica, self.tenancy.leave_line())
        elif isinstance(instruction, WakeReplica):
            if not self.tenancy.reclaim(replica):
                self.set.unplace(replica, parked=True, now=self.clock.monotonic())
                if self.tenancy.has_room_elsewhere(replica):
                    self._move_on(replica)
                return False
            effect = self._effects.wake(replica, self.tenancy.leave_line())
        elif isinstance(instruction, ParkReplica):
            effect = self._effects.park(replica)
        else:
            effect = self._effects.stop(replica)
        self._effects.run(replica, effect)
        return True

    def _move_on(self, replica: Replica) -> None:
        """Stop a parked replica, so that another one is started where there is room."""
        reason = "its device is taken, another has room"
        log.info("replica moves", function=self.name, replica_id=replica.id, reason=reason)
        if self.set.drain(replica, now=self.clock.monotonic(), reason=reason) is not None:
            self._effects.run(replica, self._effects.stop(replica))

    def _new_replica_id(self) -> str:
        return f"{self.name[:40].rstrip('-')}-{secrets.token_hex(4)}"
