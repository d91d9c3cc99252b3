"""What is done to one replica: start, wake, park, stop, watch.

Each effect begins after the state has moved and ends by reporting a fact to the function. It may
be cancelled at any await; whatever it had started is then removed by the effect that follows.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from controller.backends.base import BackendError, RuntimeSpec
from controller.scaling.activation import Activation
from controller.scaling.lifecycle import ENDING, ReplicaState, Tier
from controller.scaling.link import RuntimeLink
from controller.scaling.node import Home
from controller.scaling.replica import Replica
from controller.scaling.replica_log import replica_log
from controller.scaling.standby import Standby
from functions.spec import ParkMode
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import (
    RuntimeRefused,
    RuntimeRpcError,
    RuntimeUnavailable,
    SnapshotUnusable,
)

if TYPE_CHECKING:
    from controller.scaling.function import Function

log = structlog.get_logger(__name__)

DEFECT_PAUSE_S = 1.0

GPU_BLOCK_SIZE = 64
CPU_BLOCK_SIZE = 16

PARK_TIMEOUT_S = 60.0
PARK_MODES = {ParkMode.DEEP: pb.PARK_MODE_DEEP, ParkMode.LIGHT: pb.PARK_MODE_LIGHT}
UNLOAD_TIMEOUT_S = 10.0
STANDBY_TIMEOUT_S = 2.0
LOG_TAIL_LINES = 5
LOG_TIMEOUT_S = 0.5


class ReplicaLost(Exception):
    """The effect could not be done and the replica is of no more use.

    Args:
        reason: Why, for anybody who asks.
        log_tail: The end of the runtime's log, for its operator alone.
        was_killed: Whether runtime or engine went away, instead of saying why it could not.
    """

    def __init__(self, reason: str, *, log_tail: str = "", was_killed: bool = False) -> None:
        super().__init__(reason)
        self.log_tail = log_tail
        self.was_killed = was_killed


def load_request(replica: Replica, home: Home, device_memory_bytes: int) -> pb.LoadRequest:
    """Return what a runtime is told to load, for whom, and how much of each GPU it may use."""
    deployment, spec = home.deployment, home.deployment.spec
    engine, pooling = spec.engine, deployment.pooling
    usual_block_size = GPU_BLOCK_SIZE if spec.resources.gpus else CPU_BLOCK_SIZE
    return pb.LoadRequest(
        snapshot=deployment.snapshot,
        engine=pb.EngineConfig(
            max_model_len=deployment.max_model_len,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            gpu_memory_utilization=engine.gpu_memory_utilization,
            block_size=engine.block_size or usual_block_size,
            enable_prefix_caching=engine.enable_prefix_caching,
            kv_cache_bytes=engine.kv_cache_memory_bytes or 0,
            tensor_parallel_size=engine.tensor_parallel_size,
            dtype=spec.model.dtype,
            task="generate" if pooling is None else "embed",
            pooling="" if pooling is None else pooling.mode,
            normalize=pooling is not None and pooling.normalize,
        ),
        device_uuids=home.gpus,
        memory_limit_bytes=spec.resources.memory or 0,
        device_memory_bytes=device_memory_bytes,
        owner=pb.Owner(replica_id=replica.id, function=spec.name, revision=replica.runtime_hash),
    )


class Effects:
    """The effects on one function's replicas."""

    def __init__(self, function: "Function") -> None:
        self._function = function
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}

    async def start(self, replica: Replica, room_s: float) -> None:
        """Get a runtime, load the snapshot, open the stream.

        Args:
            replica: The one to start.
            room_s: How long it has waited for room on its devices.
        """
        function = self._function
        limit_s = function.spec.timeouts.startup
        home = function.homes[replica.id]
        activation = function.books.began(replica, home.tier, room_s=room_s)
        async with self._translated(replica, limit_s=limit_s):
            link = await self._take_over(replica, activation)
            if link is None:
                link = await self._create(replica, activation)
            self.watch(replica, link)
            now = function.clock.monotonic()
            function.set.loading(replica, now=now, reason="runtime answers")
            function.changed()
            response = await link.connection.load(
                load_request(
                    replica, function.homes[replica.id], function.tenancy.promised_bytes(home)
                ),
                timeout_s=limit_s,
            )
            activation.lap_call(response.phases, rest="load_other")
            function.node.metrics.engine_started(
                function=function.name, num_compilations=response.profile.num_compilations
            )
            await _attach(link)
            activation.lap("attach")
        function.ready(replica)

    async def _take_over(self, replica: Replica, activation: Activation) -> RuntimeLink | None:
        """Fit the standby runtime the replica was given, if it was; None if that is of no use."""
        function = self._function
        home = function.homes[replica.id]
        if home.standby is None:
            return None
        link = function.links[replica.id] = home.standby.link
        resources = function.spec.resources
        try:
            await home.backend.resize(
                home.runtime_id, cpu=resources.cpu, memory_bytes=resources.memory
            )
            link.status = await link.connection.health(timeout_s=STANDBY_TIMEOUT_S)
        except (BackendError, RuntimeRpcError) as error:
            log.warning("standby not usable", runtime_id=home.runtime_id, error=str(error))
            await self._delete(home)
            await link.close()
            function.homes[replica.id] = replace(
                home, runtime_id=replica.id, tier=Tier.STOPPED, standby=None, is_generic=False
            )
            activation.from_tier = Tier.STOPPED
            return None
        activation.lap("place")
        return link

    async def _create(self, replica: Replica, activation: Activation) -> RuntimeLink:
        """Start a runtime made for this replica."""
        function, home = self._function, self._function.homes[replica.id]
        spec = function.spec
        info = await home.backend.create(
            RuntimeSpec(
                runtime_id=home.runtime_id,
                function=function.name,
                revision=replica.runtime_hash,
                epoch=function.node.epoch,
                snapshot_store=function.node.snapshot_store,
                device_uuids=home.gpus,
                cpu=spec.resources.cpu,
                memory_bytes=spec.resources.memory,
            )
        )
        link = RuntimeLink(function.node.connect(info.endpoint))
        function.links[replica.id] = link
        activation.lap("place")
        await link.connection.wait_reachable(spec.timeouts.startup)
        activation.lap("container_start")
        return link

    async def wake(self, replica: Replica, room_s: float) -> None:
        """Bring a parked runtime back; one that does not come back is replaced by a start."""
        function = self._function
        link = function.links[replica.id]
        activation = function.books.began(replica, Tier.PARKED, room_s=room_s)
        gpus = function.homes[replica.id].gpus
        limit_s = function.spec.timeouts.startup
        async with self._translated(replica, limit_s=limit_s):
            response = await link.connection.wake(gpus, timeout_s=limit_s)
            activation.lap_call(response.phases, rest="wake_other")
            await _attach(link)
            activation.lap("attach")
        function.ready(replica)

    async def park(self, replica: Replica) -> None:
        """Have a runtime give its memory back."""
        function = self._function
        link = function.links[replica.id]
        try:
            async with self._translated(replica, limit_s=PARK_TIMEOUT_S):
                response = await link.connection.park(
                    timeout_s=PARK_TIMEOUT_S, mode=PARK_MODES[function.spec.scaling.park]
                )
        except _Refused as error:
            now = function.clock.monotonic()
            function.set.park_refused(replica, now=now, reason=str(error))
        else:
            link.freed_bytes = response.freed_bytes
            function.set.parked(replica, now=function.clock.monotonic())
            function.tenancy.parked(replica, response.memory.kept_bytes)
            function.profiles.parked(replica)
        function.changed()

    async def stop(self, replica: Replica) -> None:
        """Wait for the replica's leases, then remove it; its runtime may go back to the pool."""
        await self._function.leases.drained(replica)
        if await self._give_back(replica):
            await self._forget(replica)
        else:
            await self.remove(replica)

    async def remove(self, replica: Replica) -> None:
        """Remove a runtime for good and free its devices, trying for as long as that can help."""
        function = self._function
        await self._unwatch(replica)
        link = function.links.get(replica.id)
        if link is not None:
            await link.close()
        home = function.homes.get(replica.id)
        if home is not None:
            await function.node.last_logs.keep(function.name, home.backend, home.runtime_id)
            await self._delete(home)
        await self._forget(replica)

    async def _give_back(self, replica: Replica) -> bool:
        """End the engine and leave its runtime to the pool, if that wants it and it can be had."""
        function, home = self._function, self._function.homes[replica.id]
        link = function.links.get(replica.id)
        if not home.is_generic or link is None or not function.node.standbys.wants(home.backend):
            return False
        await self._unwatch(replica)
        await function.node.last_logs.keep(function.name, home.backend, home.runtime_id)
        try:
            await link.detach()
            await link.connection.unload(timeout_s=UNLOAD_TIMEOUT_S)
            await home.backend.resize(home.runtime_id, cpu=None, memory_bytes=None)
        except (BackendError, RuntimeRpcError) as error:
            log.info("runtime not reused", runtime_id=home.runtime_id, reason=str(error))
            return False
        if not function.node.standbys.wants(home.backend):
            return False
        unused = RuntimeLink(link.connection)  # what is known of this function is not of the next
        function.node.standbys.give(
            Standby(runtime_id=home.runtime_id, backend=home.backend, link=unused)
        )
        return True

    async def _delete(self, home: Home) -> None:
        """Remove a runtime, trying for as long as that can help."""
        delay_s = 0.1
        while True:
            try:
                await home.backend.delete(home.runtime_id)
                return
            except BackendError as error:
                log.warning("delete failed", runtime_id=home.runtime_id, error=str(error))
                if not error.temporary:
                    return  # the sweep for orphans will find it, should it still be there
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, 10.0)

    async def _forget(self, replica: Replica) -> None:
        """Note that nothing is left of a replica."""
        function = self._function
        function.set.stopped(replica, now=function.clock.monotonic())
        function.changed()
        function.links.pop(replica.id, None)
        function.engines.drop(replica.id)
        function.homes.pop(replica.id, None)
        function.node.memory.release(replica.id)

    def watch(self, replica: Replica, link: RuntimeLink) -> None:
        """Follow what a runtime says about itself until it is removed."""
        task = asyncio.create_task(self._follow(replica, link), name=f"watch {replica.id}")
        self._watches[replica.id] = task

    def run(self, replica: Replica, effect: Coroutine[Any, Any, None]) -> None:
        """Run an effect as the replica's only one: a newer effect ends the older."""
        previous = self._tasks.get(replica.id)
        task = asyncio.create_task(
            self._guard(replica, effect, previous), name=f"effect on {replica.id}"
        )
        self._tasks[replica.id] = task
        self._function.poke()  # the replica has moved, which may ask for another one

    async def settled(self, replicas: Iterable[Replica]) -> None:
        """Return when the effects now running on these replicas are over."""
        tasks = [task for r in replicas if (task := self._tasks.get(r.id)) is not None]
        if tasks:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """End all effects and stop following; runtimes keep running."""
        tasks = [*self._tasks.values(), *self._watches.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for link in self._function.links.values():
            await link.close()

    async def _guard(
        self,
        replica: Replica,
        effect: Coroutine[Any, Any, None],
        previous: asyncio.Task[None] | None,
    ) -> None:
        try:
            if previous is not None and not previous.done():
                previous.cancel()
                await asyncio.wait([previous])
            await effect
        except ReplicaLost as error:
            self._function.lost(
                replica, str(error), log_tail=error.log_tail, was_killed=error.was_killed
            )
        except Exception as error:
            # A defect in one effect must not end the owner.
            log.exception("effect failed", function=self._function.name, replica_id=replica.id)
            if replica.state in ENDING:  # nobody else would remove it
                await asyncio.sleep(DEFECT_PAUSE_S)
                self.run(replica, self.remove(replica))
            else:
                self._function.lost(replica, f"internal error: {error!r}")
        finally:
            effect.close()
            if self._tasks.get(replica.id) is asyncio.current_task():
                del self._tasks[replica.id]
            self._function.poke()

    async def _follow(self, replica: Replica, link: RuntimeLink) -> None:
        try:
            async for status in link.connection.watch():
                link.status = status
                self._function.engines.update(replica.id, status.load)
                self._function.tenancy.reported(replica, status)
                # The call of an effect that is under way fails too, and says more.
                if status.state == pb.RUNTIME_STATE_FAILED and replica.id not in self._tasks:
                    self._function.lost(replica, f"the engine died: {status.error}")
            reason = "the runtime closed its connection"
        except RuntimeRpcError as error:
            reason = f"the runtime went away: {error}"
        if replica.state not in ENDING:
            log_tail = await self.log_tail(replica)
            self._function.lost(replica, reason, log_tail=log_tail, was_killed=True)

    async def _unwatch(self, replica: Replica) -> None:
        task = self._watches.pop(replica.id, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait([task])

    @asynccontextmanager
    async def _translated(self, replica: Replica, *, limit_s: float) -> AsyncIterator[None]:
        """Turn what a backend or runtime raises into ReplicaLost, with the end of its log."""
        try:
            async with asyncio.timeout(limit_s):
                yield
        except SnapshotUnusable as error:
            self._function.snapshot_unusable(replica, str(error))
            raise ReplicaLost(str(error)) from error
        except RuntimeRefused as error:
            if replica.state is ReplicaState.PARKING:
                raise _Refused(str(error)) from error
            raise ReplicaLost(str(error)) from error
        except TimeoutError as error:
            raise ReplicaLost(f"not done within {limit_s:g} s") from error
        except (BackendError, RuntimeRpcError) as error:
            was_killed = isinstance(error, RuntimeUnavailable)
            log_tail = await self.log_tail(replica)
            raise ReplicaLost(str(error), log_tail=log_tail, was_killed=was_killed) from error

    async def log_tail(self, replica: Replica) -> str:
        """Return the end of the runtime's log on one line, as far as it is to be had."""
        lines: list[str] = []
        home = self._function.homes[replica.id]
        try:
            async with asyncio.timeout(LOG_TIMEOUT_S):
                async for line in replica_log(home.backend, home.runtime_id, tail=LOG_TAIL_LINES):
                    lines.append(line)
        except (BackendError, OSError):  # running out of time is an OSError, too
            pass
        return " | ".join(lines)


async def _attach(link: RuntimeLink) -> None:
    """Open the stream to a runtime that has just come up: it refuses if its engine has died."""
    try:
        await link.attach()
    except RuntimeRefused as error:
        raise RuntimeUnavailable(str(error)) from error


class _Refused(Exception):
    """The runtime would not park now."""
