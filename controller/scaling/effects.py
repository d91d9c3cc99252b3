"""What is done to one replica: start, wake, park, stop, watch.

Each effect begins after the state has moved and ends by reporting a fact to the function. It may
be cancelled at any await; whatever it had started is then removed by the effect that follows.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import structlog

from controller.backends.base import BackendError, RuntimeSpec
from controller.scaling.lifecycle import ENDING, ReplicaState, Tier
from controller.scaling.link import RuntimeLink
from controller.scaling.replica import Replica
from functions.spec import FunctionSpec
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRefused, RuntimeRpcError

if TYPE_CHECKING:
    from controller.scaling.function import Function

log = structlog.get_logger(__name__)

GPU_BLOCK_SIZE = 64
CPU_BLOCK_SIZE = 16

PARK_TIMEOUT_S = 60.0
LOG_TAIL_LINES = 5
LOG_TIMEOUT_S = 0.5


class ReplicaLost(Exception):
    """The effect could not be done and the replica is of no more use.

    Args:
        reason: Why, for anybody who asks.
        log_tail: The end of the runtime's log, for its operator alone.
    """

    def __init__(self, reason: str, *, log_tail: str = "") -> None:
        super().__init__(reason)
        self.log_tail = log_tail


def load_request(
    spec: FunctionSpec, snapshot: str, max_model_len: int, gpus: Sequence[str]
) -> pb.LoadRequest:
    """Return what a runtime is told to load."""
    engine = spec.engine
    usual_block_size = GPU_BLOCK_SIZE if spec.resources.gpus else CPU_BLOCK_SIZE
    return pb.LoadRequest(
        snapshot=snapshot,
        engine=pb.EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            gpu_memory_utilization=engine.gpu_memory_utilization,
            block_size=engine.block_size or usual_block_size,
            enable_prefix_caching=engine.enable_prefix_caching,
            kv_cache_bytes=engine.kv_cache_memory_bytes or 0,
            tensor_parallel_size=engine.tensor_parallel_size,
            dtype=spec.model.dtype,
        ),
        device_uuids=gpus,
        memory_limit_bytes=spec.resources.memory or 0,
    )


class Effects:
    """The effects on one function's replicas."""

    def __init__(self, function: "Function") -> None:
        self._function = function
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}

    async def start(self, replica: Replica) -> None:
        """Create a runtime, load the snapshot, open the stream."""
        function = self._function
        spec, deployment = function.spec, function.deployment
        home = function.homes[replica.id]
        activation = function.books.began(replica, Tier.STOPPED)
        async with self._translated(replica, limit_s=spec.timeouts.startup):
            info = await home.backend.create(
                RuntimeSpec(
                    runtime_id=replica.id,
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
            self.watch(replica, link)
            now = function.clock.monotonic()
            function.set.loading(replica, now=now, reason="runtime answers")
            function.changed()
            response = await link.connection.load(
                load_request(spec, deployment.snapshot, deployment.max_model_len, home.gpus),
                timeout_s=spec.timeouts.startup,
            )
            activation.lap_call(response.phases, rest="load_other")
            await link.attach()
            activation.lap("attach")
        function.ready(replica)

    async def wake(self, replica: Replica) -> None:
        """Bring a parked runtime back; one that does not come back is replaced by a start."""
        function = self._function
        link = function.links[replica.id]
        activation = function.books.began(replica, Tier.PARKED)
        gpus = function.homes[replica.id].gpus
        try:
            async with self._translated(replica, limit_s=function.spec.timeouts.startup):
                response = await link.connection.wake(
                    gpus, timeout_s=function.spec.timeouts.startup
                )
                activation.lap_call(response.phases, rest="wake_other")
                await link.attach()
                activation.lap("attach")
            function.ready(replica)
        except ReplicaLost as error:
            function.lost(replica, str(error), log_tail=error.log_tail)

    async def park(self, replica: Replica) -> None:
        """Have a runtime give its memory back."""
        function = self._function
        link = function.links[replica.id]
        try:
            async with self._translated(replica, limit_s=PARK_TIMEOUT_S):
                response = await link.connection.park(timeout_s=PARK_TIMEOUT_S)
        except _Refused as error:
            now = function.clock.monotonic()
            function.set.park_refused(replica, now=now, reason=str(error))
        else:
            link.freed_bytes = response.freed_bytes
            function.set.parked(replica, now=function.clock.monotonic())
            function.node.pool.release(replica.id)
        function.changed()

    async def stop(self, replica: Replica) -> None:
        """Wait for the replica's leases, then remove it."""
        await self._function.drained(replica)
        await self.remove(replica)

    async def remove(self, replica: Replica) -> None:
        """Remove a runtime for good and free its devices, trying for as long as that can help."""
        function = self._function
        await self._unwatch(replica)
        link = function.links.get(replica.id)
        if link is not None:
            await link.close()
        backend, delay_s = function.homes[replica.id].backend, 0.1
        await function.node.last_logs.keep(function.name, backend, replica.id)
        while True:
            try:
                await backend.delete(replica.id)
                break
            except BackendError as error:
                log.warning("delete failed", replica_id=replica.id, error=str(error))
                if not error.temporary:
                    break  # the sweep for orphans will find it, should it still be there
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, 10.0)
        function.set.stopped(replica, now=function.clock.monotonic())
        function.changed()
        function.links.pop(replica.id, None)
        function.engines.drop(replica.id)
        del function.homes[replica.id]
        function.node.pool.release(replica.id)

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
            self._function.lost(replica, str(error), log_tail=error.log_tail)
        except Exception as error:
            # A defect in one effect must not end the owner.
            log.exception("effect failed", function=self._function.name, replica_id=replica.id)
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
                if status.state == pb.RUNTIME_STATE_FAILED:
                    self._function.lost(replica, f"the engine died: {status.error}")
            reason = "the runtime closed its connection"
        except RuntimeRpcError as error:
            reason = f"the runtime went away: {error}"
        if replica.state not in ENDING:
            self._function.lost(replica, reason, log_tail=await self.log_tail(replica))

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
        except RuntimeRefused as error:
            if replica.state is ReplicaState.PARKING:
                raise _Refused(str(error)) from error
            raise ReplicaLost(str(error)) from error
        except TimeoutError as error:
            raise ReplicaLost(f"not done within {limit_s:g} s") from error
        except (BackendError, RuntimeRpcError) as error:
            raise ReplicaLost(str(error), log_tail=await self.log_tail(replica)) from error

    async def log_tail(self, replica: Replica) -> str:
        """Return the end of the runtime's log on one line, as far as it is to be had."""
        lines: list[str] = []
        backend = self._function.homes[replica.id].backend
        try:
            async with asyncio.timeout(LOG_TIMEOUT_S):
                async for line in backend.logs(replica.id, tail=LOG_TAIL_LINES):
                    lines.append(line)
        except (BackendError, TimeoutError):
            pass
        return " | ".join(lines)


class _Refused(Exception):
    """The runtime would not park now."""
