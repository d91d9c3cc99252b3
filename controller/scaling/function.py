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
    Conflict,
)
from controller.scaling.books import Books
from controller.scaling.deployment import Deployment
from controller.scaling.effects import DEFECT_PAUSE_S, Effects
from controller.scaling.embedding import EmbeddingRequest, Pooling
from controller.scaling.embedding_call import FunctionEmbedding
from controller.scaling.engine_figures import EngineFigures
from controller.scaling.generation import FunctionLoad, GenerationRequest
from controller.scaling.leases import Leases
from controller.scaling.lifecycle import COMING, ENDING, Lifecycle, ReplicaState, Tier
from controller.scaling.link import RuntimeLink
from controller.scaling.node import Home, Node
from controller.scaling.policy import Floor, replica_floor
from controller.scaling.profiles import Profiles
from controller.scaling.replica import (
    Instruction,
    ParkReplica,
    Replica,
    StartReplica,
    WakeReplica,
)
from controller.scaling.replica_set import ReplicaSet
from controller.scaling.serving import FunctionGeneration
from controller.scaling.tenancy import Tenancy
from functions.spec import FunctionSpec

log = structlog.get_logger(__name__)

TIMER_RESOLUTION_S = 0.001


class Function:
    """A deployed function with a snapshot, and its replicas; its requests are in `leases`.

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
        self.leases = Leases(self)
        self._effects = Effects(self)
        self._changed = asyncio.Event()
        self._known_floor: Floor | None = None

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
        return FunctionLoad(
            num_ready=self.set.num_ready,
            in_flight=self.set.in_flight,
            num_queued=self.set.num_queued,
            wake_s=self.books.reload_s(self.tier),
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
        return FunctionGeneration(self.leases, request)

    def embed(self, request: EmbeddingRequest) -> FunctionEmbedding:
        """Prepare one call to embed; nothing happens until it is entered."""
        return FunctionEmbedding(self.leases, request)

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
            self._leave_lines()
            self.leases.close()
            await self.profiles.close()
            await self._effects.close()

    def poke(self) -> None:
        """Have the owner look again."""
        self._changed.set()

    def sweep(self) -> None:
        """Look at every deadline; called on a tick."""
        self.leases.check_deadlines()
        self.poke()

    async def warm(self) -> None:
        """Return once a replica is ready; its idle clock starts anew.

        Raises:
            ApiError: It could not be brought up in time.
        """
        await self.leases.warm()

    async def park(self) -> None:
        """Park every ready replica now and return when it is done.

        Raises:
            Conflict: Requests are in flight or waiting, replicas must be kept ready, the host has
                too little memory, or a runtime refuses.
        """
        busy = self.set.in_flight + self.set.num_queued
        if busy:
            raise Conflict(f"{self.name!r} has {busy} requests; park it when they are done")
        if self._floor() > 0:
            raise Conflict(
                f"{self.name!r} keeps {self._floor()} replicas ready; lower scaling.min_replicas "
                "or wait for its schedule to end"
            )
        for replica in self.set.replicas.values():
            is_ready = replica.state is ReplicaState.READY
            if is_ready and (obstacle := self.tenancy.park_obstacle(replica)):
                raise Conflict(f"{self.name!r} is not parked: {obstacle}; stop it instead")
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
        self._leave_lines()  # before another function may have the name, and its place in them
        self.set.is_closing = True
        self.leases.shut()
        now = self.clock.monotonic()
        for replica in list(self.set.replicas.values()):
            instruction = self.set.drain(replica, now=now, reason="function deleted")
            if instruction is not None:
                self.execute([instruction])
        self.poke()

    async def finish_requests(self, timeout_s: float) -> None:
        """Take no more requests and give the running ones time; replicas stay as they are."""
        self.leases.shut()
        deadline = self.clock.monotonic() + timeout_s
        while self.leases.num_live and self.clock.monotonic() < deadline:
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
        self.leases.notify(self.set.hold(reason))
        self.poke()

    def snapshot_unusable(self, replica: Replica, reason: str) -> None:
        """Note that a replica's runtime found its snapshot missing or damaged."""
        self._on_snapshot_unusable(self.homes[replica.id].deployment.snapshot, reason)

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
        for replica_id in [k for k in self.homes if self._lives_in(k, info.runtime_id)]:
            replica = self.set.replicas[replica_id]
            code = "" if info.exit_code is None else f" with status {info.exit_code}"
            log_tail = await self._effects.log_tail(replica)
            if self._lives_in(replica_id, info.runtime_id):
                self.lost(
                    replica,
                    f"the runtime exited{code}",
                    log_tail=log_tail,
                    was_killed=info.was_killed,
                )

    # Facts: called by the effects.

    def lost(
        self, replica: Replica, reason: str, *, log_tail: str = "", was_killed: bool = False
    ) -> None:
        """Note that a replica is gone or useless, and have it removed.

        Args:
            replica: The lost one.
            reason: Why; clients are told.
            log_tail: The end of its log, which only the operator gets to see.
            was_killed: Whether it went without a reason of its own: if it was starting, another
                one is started for the same callers, once.
        """
        if replica.state in ENDING or replica.id not in self.set.replicas:
            return
        is_start = replica.state in COMING and not replica.is_waking
        log.warning("replica lost", function=self.name, replica_id=replica.id, reason=reason)
        self.last_error = f"{reason}; its log ends: {log_tail}" if log_tail else reason
        self.books.failed(replica, waiting_since=self.leases.waiting_since(replica))
        now = self.clock.monotonic()
        waiters = self.set.failed(
            replica, now=now, reason=reason, is_start=is_start, was_killed=was_killed
        )
        self.leases.notify(waiters)
        self.books.publish()
        self._effects.run(replica, self._effects.remove(replica))

    def ready(self, replica: Replica) -> None:
        """Note that a replica can serve."""
        self.set.ready(replica, now=self.clock.monotonic())
        self.last_error = ""
        self.leases.grant()
        if replica.in_flight == 0:
            self.books.ready(replica)
        self.changed()

    def changed(self) -> None:
        """Publish moves the effects made, and have the owner look again."""
        self.books.publish()
        self.poke()

    # Inside.

    def _leave_lines(self) -> None:
        if not self.set.is_closing:
            self.node.starts.leave(self.name)
            self.tenancy.leave_line()

    def _turn(self) -> None:
        self.set.floor = 0 if self.leases.is_shut else self._floor()
        self.leases.grant()
        may_act = not self.leases.is_shut or self.set.is_closing
        instructions = self.set.plan(self.clock.monotonic()) if may_act else []
        has_start = any(isinstance(one, StartReplica) for one in instructions)
        if not has_start and not self.set.is_closing:
            self.node.starts.leave(self.name)
        if self.execute(instructions) and not self.set.is_closing:
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

    def _lives_in(self, replica_id: str, runtime_id: str) -> bool:
        """Return whether a replica is gone when that runtime is.

        One that is still being fitted with a standby is not: it finds out and gets another runtime.
        """
        home, replica = self.homes.get(replica_id), self.set.replicas.get(replica_id)
        if home is None or replica is None or home.runtime_id != runtime_id:
            return False
        return home.standby is None or replica.state is not ReplicaState.STARTING

    def _begin(self, instruction: Instruction) -> bool:
        """Begin to carry one out; says whether its replica has a place."""
        replica = instruction.replica
        if isinstance(instruction, StartReplica):
            home = self.tenancy.settle(replica)
            if home is None:
                self.set.unplace(replica, parked=False)
                return False
            self.homes[replica.id] = home
            effect = self._effects.start(replica, self.tenancy.leave_line())
        elif isinstance(instruction, WakeReplica):
            if not self.tenancy.reclaim(replica):
                self.set.unplace(replica, parked=True)
                may_start = not self.set.backoff.holds(self.clock.monotonic())
                if may_start and self.tenancy.has_room_elsewhere(replica):
                    self._move_on(replica)
                return False
            effect = self._effects.wake(replica, self.tenancy.leave_line())
        elif isinstance(instruction, ParkReplica):
            if obstacle := self.tenancy.park_obstacle(replica):
                reason = f"not parked: {obstacle}"
                self.set.drain(replica, now=self.clock.monotonic(), reason=reason)
                effect = self._effects.stop(replica)
            else:
                self.tenancy.parks(replica)
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
