"""Runtimes without a model, everything imported and no device touched, for whoever starts next.

The pool keeps a number of them for each backend in use. Taking one is a decision and costs
nothing; making another is work that waits until what was taken has had time to load.
"""

import asyncio
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from controller.backends.base import BackendError, RuntimeBackend, RuntimeInfo, RuntimeSpec
from controller.scaling.background import Background
from controller.scaling.link import Connect, RuntimeLink
from controller.scaling.policy import backoff_s
from controller.scaling.starts import Starts
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRpcError

log = structlog.get_logger(__name__)

STARTUP_TIMEOUT_S = 120.0
REFILL_DELAY_S = 2.0
"""Imports compete with the load of what was just taken for the same cores."""


@dataclass(slots=True, kw_only=True, eq=False)
class Standby:
    """One runtime without a model, its connection open."""

    runtime_id: str
    backend: RuntimeBackend
    link: RuntimeLink

    @property
    def is_ready(self) -> bool:
        """Whether it can fork an engine at once."""
        return self.link.status.state == pb.RUNTIME_STATE_STANDBY


@dataclass(slots=True, kw_only=True)
class _Shelf:
    """What the pool knows of one backend."""

    members: dict[str, Standby] = field(default_factory=dict)
    coming: set[str] = field(default_factory=set)
    num_failures: int = 0
    last_error: str = ""

    @property
    def size(self) -> int:
        return len(self.members) + len(self.coming)


class StandbyPool:
    """Keeps runtimes in standby. Event loop only.

    Args:
        size: How many for each backend in use; 0 keeps none.
        connect: Opens a connection to a runtime.
        places: Those for starts; making one is a start for which nobody waits.
        snapshot_store: Mounted into each, since nobody knows yet what it will load.
        gpus: UUIDs of all GPUs, for the same reason.
        epoch: The controller's.
    """

    def __init__(
        self,
        *,
        size: int,
        connect: Connect,
        places: Starts,
        snapshot_store: Path,
        gpus: tuple[str, ...] = (),
        epoch: int = 0,
    ) -> None:
        self.size = size
        self._connect = connect
        self._places = places
        self._snapshot_store = snapshot_store
        self._gpus = gpus
        self._epoch = epoch
        self._shelves: dict[RuntimeBackend, _Shelf] = {}
        self._in_use: set[RuntimeBackend] = set()
        self._leaving: dict[str, Standby] = {}
        self._starts: dict[str, asyncio.Timeout] = {}
        self._background = Background()
        self._watches: dict[str, asyncio.Task[None]] = {}

    @property
    def runtime_ids(self) -> set[str]:
        """The ids of all, those included that are being made or removed."""
        kept = {one for backend in self._shelves for one in self._ids(backend)}
        return kept | self._leaving.keys()

    def counts(self) -> Mapping[str, Mapping[str, int]]:
        """Return how many are ready and starting, by the backend's name."""
        return {
            backend.name: {
                "ready": (ready := sum(one.is_ready for one in shelf.members.values())),
                "starting": shelf.size - ready,
            }
            for backend, shelf in self._shelves.items()
        }

    @property
    def host_bytes(self) -> int:
        """What they hold of the host's memory, by what they have said last."""
        members = (one for shelf in self._shelves.values() for one in shelf.members.values())
        return sum(one.link.status.memory.host_rss_bytes for one in members)

    def use(self, backends: Iterable[RuntimeBackend]) -> None:
        """Keep runtimes for these backends, and for no others."""
        self._in_use = set(backends)
        for backend in self._in_use:
            self._refill(backend)
        for backend, shelf in self._shelves.items():
            for standby in list(shelf.members.values())[self._wanted(backend) :]:
                self._discard(standby)

    def has_ready(self, backend: RuntimeBackend) -> bool:
        """Return whether one could load at once."""
        shelf = self._shelves.get(backend)
        return shelf is not None and any(one.is_ready for one in shelf.members.values())

    def wants(self, backend: RuntimeBackend) -> bool:
        """Return whether the pool would keep one more; those still to be made do not count."""
        shelf = self._shelves.get(backend)
        return (0 if shelf is None else len(shelf.members)) < self._wanted(backend)

    def take(self, backend: RuntimeBackend) -> Standby | None:
        """Hand over the one that is nearest to ready; None when there is none."""
        shelf = self._shelves.get(backend)
        if shelf is None or not shelf.members:
            return None
        standby = max(shelf.members.values(), key=lambda one: one.is_ready)
        del shelf.members[standby.runtime_id]
        self._unwatch(standby)
        self._refill(backend, delay_s=REFILL_DELAY_S)
        return standby

    def give(self, standby: Standby) -> None:
        """Take one in: unloaded by a function, or left by an earlier controller."""
        self._shelf(standby.backend).members[standby.runtime_id] = standby
        self._watches[standby.runtime_id] = self._background.start(
            self._follow(standby), f"watch {standby.runtime_id}"
        )

    def exited(self, info: RuntimeInfo) -> None:
        """Hear that a runtime, of the pool or not, has exited: it is not waited for any longer."""
        start = self._starts.pop(info.runtime_id, None)
        if start is not None:
            start.reschedule(0.0)

    async def close(self, *, remove: bool) -> None:
        """Make no more, and remove those there are or leave them to the next controller."""
        self._in_use = set()
        leaving = self._leaving.values()
        ids = [(backend, one) for backend in self._shelves for one in self._ids(backend)]
        ids += [(one.backend, one.runtime_id) for one in leaving]
        links = [one.link for shelf in self._shelves.values() for one in shelf.members.values()]
        links += [one.link for one in leaving]
        await self._background.cancel()
        self._leaving.clear()
        self._shelves.clear()
        await asyncio.gather(*(link.close() for link in links))
        if remove:
            await asyncio.gather(*(self._delete(backend, one) for backend, one in ids))

    def _wanted(self, backend: RuntimeBackend) -> int:
        return self.size if backend in self._in_use else 0

    def _shelf(self, backend: RuntimeBackend) -> _Shelf:
        return self._shelves.setdefault(backend, _Shelf())

    def _ids(self, backend: RuntimeBackend) -> list[str]:
        shelf = self._shelf(backend)
        return [*shelf.members, *shelf.coming]

    def _refill(self, backend: RuntimeBackend, *, delay_s: float = 0.0) -> None:
        shelf = self._shelf(backend)
        while shelf.size < self._wanted(backend):
            runtime_id = f"standby-{secrets.token_hex(4)}"
            shelf.coming.add(runtime_id)
            wait_s = max(delay_s, backoff_s(shelf.num_failures))
            _ = self._background.start(
                self._make(backend, runtime_id, wait_s), f"make {runtime_id}"
            )

    async def _make(self, backend: RuntimeBackend, runtime_id: str, delay_s: float) -> None:
        """Bring one up; whatever happens, its place is free again afterwards or taken by it."""
        shelf = self._shelf(backend)
        try:
            await asyncio.sleep(delay_s)
            await self._turn(runtime_id)
            if not self.wants(backend):
                self._places.done(runtime_id)
                return
            standby = await self._start(backend, runtime_id)
            shelf.coming.discard(runtime_id)
            self.give(standby)
            if len(shelf.members) > self._wanted(backend):
                self._discard(standby)
        except Exception as error:
            # Whatever it is: what is not counted as a failure is tried again at once, for ever.
            if not isinstance(error, BackendError | RuntimeRpcError):
                log.exception("standby not made", backend=backend.name, runtime_id=runtime_id)
            self._note_failure(backend, str(error))
            self._places.done(runtime_id)
            await self._delete(backend, runtime_id)
        finally:
            shelf.coming.discard(runtime_id)
            self._refill(backend)

    async def _turn(self, runtime_id: str) -> None:
        """Return when the runtime has a place among the starts."""
        may_ask = asyncio.Event()
        try:
            while not self._places.take(runtime_id, runtime_id, is_urgent=False, poke=may_ask.set):
                await may_ask.wait()
                may_ask.clear()
        finally:
            self._places.leave(runtime_id)

    async def _start(self, backend: RuntimeBackend, runtime_id: str) -> Standby:
        """Return a new runtime that answers."""
        try:
            async with asyncio.timeout(None) as self._starts[runtime_id]:
                standby = self.member(await backend.create(self._spec(runtime_id)), backend)
                try:
                    await standby.link.connection.wait_reachable(STARTUP_TIMEOUT_S)
                except BaseException:
                    await standby.link.close()
                    raise
        except TimeoutError as error:
            raise BackendError("the runtime exited before it answered") from error
        finally:
            self._starts.pop(runtime_id, None)
        return standby

    def member(self, info: RuntimeInfo, backend: RuntimeBackend) -> Standby:
        """Return a runtime that exists as one of ours, its connection opened."""
        link = RuntimeLink(self._connect(info.endpoint))
        return Standby(runtime_id=info.runtime_id, backend=backend, link=link)

    def _spec(self, runtime_id: str) -> RuntimeSpec:
        return RuntimeSpec(
            runtime_id=runtime_id,
            function="",
            revision="",
            epoch=self._epoch,
            snapshot_store=self._snapshot_store,
            device_uuids=self._gpus,
        )

    async def _follow(self, standby: Standby) -> None:
        """Keep its status until it is taken; one that fails, goes away or never is ready is replaced."""
        shelf = self._shelf(standby.backend)
        reason = "the runtime closed its connection"
        try:
            async with asyncio.timeout(STARTUP_TIMEOUT_S) as limit:
                async for status in standby.link.connection.watch():
                    was_ready, standby.link.status = standby.is_ready, status
                    if standby.is_ready:
                        limit.reschedule(None)
                    elif was_ready:  # its zygote has died; there may come another one
                        limit.reschedule(asyncio.get_running_loop().time() + STARTUP_TIMEOUT_S)
                    if standby.is_ready and not was_ready:
                        shelf.num_failures, shelf.last_error = 0, ""
                        self._places.done(standby.runtime_id)
                    if status.state == pb.RUNTIME_STATE_FAILED:
                        reason = status.error
                        break
        except RuntimeRpcError as error:
            reason = str(error)
        except TimeoutError:
            reason = f"it was not ready after {STARTUP_TIMEOUT_S:.0f} s"
        self._note_failure(standby.backend, f"{standby.runtime_id} was lost: {reason}")
        self._watches.pop(standby.runtime_id, None)
        self._discard(standby)
        self._refill(standby.backend)

    def _note_failure(self, backend: RuntimeBackend, error: str) -> None:
        shelf = self._shelf(backend)
        shelf.num_failures += 1
        if error != shelf.last_error:
            log.warning("no standby", backend=backend.name, error=error)
        shelf.last_error = error

    def _discard(self, standby: Standby) -> None:
        self._shelf(standby.backend).members.pop(standby.runtime_id, None)
        self._unwatch(standby)
        self._leaving[standby.runtime_id] = standby
        _ = self._background.start(self._remove(standby), f"remove {standby.runtime_id}")

    def _unwatch(self, standby: Standby) -> None:
        self._places.done(standby.runtime_id)
        watch = self._watches.pop(standby.runtime_id, None)
        if watch is not None:
            watch.cancel()

    async def _remove(self, standby: Standby) -> None:
        try:
            await standby.link.close()
            await self._delete(standby.backend, standby.runtime_id)
        finally:
            self._leaving.pop(standby.runtime_id, None)

    async def _delete(self, backend: RuntimeBackend, runtime_id: str) -> None:
        try:
            await backend.delete(runtime_id)
        except BackendError as error:  # the sweep for orphans will find it
            log.warning("delete failed", runtime_id=runtime_id, error=str(error))
