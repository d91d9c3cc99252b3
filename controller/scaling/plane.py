"""The control plane: which functions are deployed, and every operation on them.

It keeps the desired state in the store, has snapshots built, and gives each function its owner.
"""

import asyncio
import difflib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from controller.backends.base import BackendError, BackendUnavailable, RuntimeBackend
from controller.clock import unix_us
from controller.errors import (
    ActivationFailed,
    ApiError,
    Conflict,
    InvalidSpec,
    ModelNotFound,
    NotFound,
)
from controller.host_cache.choice import Candidate
from controller.scaling.background import Background
from controller.scaling.deployment import Deployment, deployment_of
from controller.scaling.devices import measure
from controller.scaling.entry import Entry, FunctionStore, SnapshotState, StoredFunction
from controller.scaling.foreign import ForeignMemory
from controller.scaling.function import Function
from controller.scaling.node import Node
from controller.scaling.placement import Device, DeviceKind, Unschedulable, demand_of
from controller.scaling.preparation import (
    BuildProgress,
    PreparationFailed,
    SnapshotBuilder,
    build_snapshot,
)
from controller.scaling.reaper import Reaper
from controller.scaling.rebuilds import Rebuilds
from controller.scaling.reconcile import (
    RESTING,
    Found,
    adopted_claims,
    find_adoptable,
    remove_orphans,
    replace_silent,
)
from controller.scaling.replica_log import replica_log
from controller.scaling.views import entry_view, profile_view
from functions.spec import FunctionSpec, revision
from runtime.version import VERSION
from snapshots.errors import SnapshotError
from snapshots.store import SnapshotStore

log = structlog.get_logger(__name__)

WATCH_RETRY_S = 1.0
STOP_TIMEOUT_S = 60.0
REMOVAL_TIMEOUT_S = 30.0
BUILD_RETRY_AFTER_S = 5.0


class ControlPlane:
    """All functions of one controller.

    Args:
        node: What the functions share.
        backends: By name.
        store: The desired state.
        reaper: Runs the schedules; started and stopped by the caller.
        build: Builds a spec's snapshot and returns its directory name.
        on_servable: Called with the directory of each snapshot that a function begins to serve.
        measure_used: Returns the bytes in use on a device; None when they cannot be read.
    """

    def __init__(
        self,
        node: Node,
        backends: Mapping[str, RuntimeBackend],
        store: FunctionStore,
        reaper: Reaper,
        build: SnapshotBuilder = build_snapshot,
        on_servable: Callable[[Path], None] = lambda _: None,
        measure_used: Callable[[Device], Awaitable[int | None]] = measure,
    ) -> None:
        self.node = node
        self._backends = backends
        self._store = store
        self._reaper = reaper
        self._build = build
        self._on_servable = on_servable
        self._measure_used = measure_used
        self._foreign = ForeignMemory(node.memory)
        self._snapshots = SnapshotStore(node.snapshot_store)
        self._entries: dict[str, Entry] = {}
        self._closing: set[Function] = set()  # deleted, and some request still runs
        self._unseen = list(backends.values())  # what runs there is still to be taken over
        self._background = Background()
        self._rebuilds = Rebuilds(
            self._snapshots,
            node.clock,
            entries=self._entries.values,
            prepare=self._prepare_again,
            background=self._background,
        )
        self._deploying = asyncio.Lock()
        node.memory.on_release(self.poke_all)
        node.contention.among(lambda: (one.tenancy for one in self._all_functions()))
        self._is_started = False
        self._started_at = node.clock.monotonic()

    # The registry, as the gateway sees it.

    def resolve(self, model: str) -> Function:
        """Return the function that serves this model name.

        Raises:
            ModelNotFound: None does; the message lists near names.
            ActivationFailed: Its snapshot is being built, or could not be.
        """
        for entry in self._entries.values():
            if model in entry.spec.served_names:
                return self._servable(entry)
        names = [name for entry in self._entries.values() for name in entry.spec.served_names]
        near = difflib.get_close_matches(model, names, n=3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "GET /v1/models lists all"
        raise ModelNotFound(f"no function serves the model {model!r}; {hint}", param="model")

    def served(self) -> Sequence[Function]:
        """Return every function that can take requests, by name."""
        functions = (entry.function for _, entry in sorted(self._entries.items()))
        return [function for function in functions if function is not None]

    def _servable(self, entry: Entry) -> Function:
        if entry.function is not None:
            return entry.function
        name = entry.spec.name
        if entry.snapshot_state is SnapshotState.FAILED:
            raise ActivationFailed(f"the snapshot of {name!r} could not be built: {entry.error}")
        raise ActivationFailed(
            f"the snapshot of {name!r} is being built{_percent(entry.build)}; retry shortly",
            retry_after_s=BUILD_RETRY_AFTER_S,
        )

    # Life of the controller.

    async def start(self) -> None:
        """Load the desired state, take over what runs, and begin to own it."""
        for stored in await self._store.load():
            self._entries[stored.spec.name] = self._restore(stored)
        found = await self._find_adoptable(is_first=True)
        await self.node.ledger.recover(adopted_claims(found))
        _adopt(found)
        for gpu, used in await self._measure_gpus():
            self._foreign.begin(gpu.id, used)
        self._is_started = True
        self._keep_standbys()
        for entry in self._entries.values():
            self._reaper.follow_schedules(entry.spec, _poker(entry))
            if entry.function is not None:
                entry.owner = self._own(entry.function)
            if entry.snapshot_state is not SnapshotState.READY:
                entry.builder = self._prepare_in_background(entry)
        for backend in self._backends.values():
            _ = self._background.start(self._watch(backend), f"watch {backend.name}")

    async def finish_requests(self, timeout_s: float) -> None:
        """Take no more requests; return when the running ones are over or out of time."""
        functions = self._all_functions()
        await asyncio.gather(*(function.finish_requests(timeout_s) for function in functions))

    async def stop(self, *, stop_runtimes: bool, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Let go of everything.

        Args:
            stop_runtimes: Whether to remove the runtimes too; else the next start adopts them.
            timeout_s: How long that may take; what is left then is for the next start to find.
        """
        if stop_runtimes:
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.gather(*(function.stop() for function in self._all_functions()))
            except TimeoutError:
                log.warning("runtimes left running", runtime_ids=sorted(self._runtime_ids()))
        await self.node.standbys.close(remove=stop_runtimes)
        await self._background.cancel()

    async def sweep(self) -> None:
        """Have every function look at its deadlines."""
        self.node.metrics.set_standbys(self.node.standbys.counts())
        self.node.starts.look_again()
        self.node.metrics.set_starts(self.node.starts.counts())
        self.node.metrics.set_host_memory(
            {name: one.tenancy.host_bytes() for name, one in self._functions().items()}
            | {"": {"standby": self.node.standbys.host_bytes}}
        )
        self.node.host_cache.want(self._cacheable())
        for function in self._all_functions():
            function.sweep()

    async def look_at_devices(self) -> None:
        """Learn what processes that are not ours hold of each GPU."""
        for gpu, used in await self._measure_gpus():
            resting = {
                replica.id
                for function in self._all_functions()
                for replica in function.set.replicas.values()
                if replica.state in RESTING
            }
            now = self.node.clock.monotonic()
            self._foreign.note(gpu.id, used, resting=resting, now=now)
            self.node.metrics.set_foreign_memory(gpu.id, self.node.memory.foreign_bytes(gpu.id))

    async def _measure_gpus(self) -> list[tuple[Device, int | None]]:
        """Return what is in use of each; one that does not answer delays the others by little."""
        devices = self.node.memory.devices.values()
        gpus = [device for device in devices if device.kind is DeviceKind.GPU]
        return list(zip(gpus, await asyncio.gather(*map(self._measure_used, gpus)), strict=True))

    async def reconcile(self) -> None:
        """Adopt what a backend that was away has kept, remove orphans, replace hung engines."""
        if self._unseen:
            found = await self._find_adoptable(is_first=False)
            current = self._functions().values()  # one may have been deleted meanwhile
            gone = [one for one in found if one.function not in current]
            _adopt(one for one in found if one not in gone)
            await asyncio.gather(*(one.link.close() for one in gone))
            self._keep_standbys()
        seen = [backend for backend in self._backends.values() if backend not in self._unseen]
        await remove_orphans(seen, self._runtime_ids)
        await asyncio.gather(*(replace_silent(function) for function in self._functions().values()))

    def poke_all(self) -> None:
        """Have every function look again: a device has become free."""
        for function in self._functions().values():
            function.poke()

    # Operations.

    async def deploy(self, spec: FunctionSpec, backend: str) -> bool:
        """Accept a spec; the same one again changes nothing.

        Returns:
            Whether the function is new.

        Raises:
            InvalidSpec: The machine can never run it, or the backend is not known.
            Conflict: Another function serves one of its names.
        """
        if backend not in self._backends:
            known = ", ".join(sorted(self._backends))
            raise InvalidSpec(f"unknown backend {backend!r}; known ones: {known}", param="backend")
        try:
            self.node.memory.check(demand_of(spec))
        except Unschedulable as error:
            raise InvalidSpec(str(error), param=error.param) from error
        if spec.resources.gpus > 1:
            raise InvalidSpec(
                "a replica is not spread over several GPUs in this version; set resources.gpus to "
                "1, or to 0 for the CPU",
                param="resources.gpus",
            )
        async with self._deploying:
            self._check_names(spec)
            previous = self._entries.get(spec.name)
            created_us = previous.created_us if previous else unix_us(self.node.clock.now())
            if previous is not None and _is_same(previous, spec, backend):
                return False
            await self._store.put(StoredFunction(spec=spec, backend=backend, created_us=created_us))
            self._accept(spec, backend, created_us, previous)
        return previous is None

    async def delete(self, name: str) -> dict[str, Any] | None:
        """Forget a function: new requests get 404, running ones finish within the drain timeout.

        Whoever cancels this stops waiting; the function is removed all the same.

        Returns:
            None if nothing is left of it. Else its view: its backend is away, say, and what is
            left is removed as soon as that can be done.
        """
        async with self._deploying:
            entry = self._entry(name)
            await self._store.delete(name)
            del self._entries[name]
        self._keep_standbys()
        self._reaper.forget(name)
        if entry.builder is not None:
            entry.builder.cancel()
        function, owner, drain_s = entry.function, entry.owner, 0.0
        if function is not None and owner is not None:
            self._closing.add(function)
            owner.add_done_callback(lambda _: self._closing.discard(function))
            function.close()
            drain_s = _drain_s(function)
        removal = self._background.start(self._clear_up(entry), f"delete {name}")
        await asyncio.wait([removal], timeout=drain_s + REMOVAL_TIMEOUT_S)
        if not removal.done() or removal.cancelled():
            return entry_view(entry)
        removal.result()
        return None

    async def warm(self, name: str) -> None:
        """Return once a replica is ready."""
        await self._servable(self._entry(name)).warm()

    async def park(self, name: str) -> None:
        """Park every idle replica now."""
        await self._servable(self._entry(name)).park()

    async def stop_function(self, name: str) -> dict[str, Any] | None:
        """Drain and remove every replica; the function stays deployed.

        Whoever cancels this stops waiting; the replicas are removed all the same.

        Returns:
            None if they are gone. Else the function's view, as of `delete`.
        """
        entry = self._entry(name)
        function = self._servable(entry)
        try:
            async with asyncio.timeout(_drain_s(function) + REMOVAL_TIMEOUT_S):
                await function.stop()
        except TimeoutError:
            return entry_view(entry)
        return None

    async def profile(self, name: str) -> dict[str, Any]:
        """Keep what a replica has learned beside the snapshot, and return the profile."""
        function = self._servable(self._entry(name))
        profile = await function.profiles.record()
        return profile_view(function.deployment.snapshot, profile)

    def logs(self, name: str, *, tail: int, follow: bool) -> AsyncIterator[str]:
        """Return log lines of a function's replicas, one replica after the other.

        With `follow` it is the newest replica, and new lines come until it is gone. Without any
        replica it is the end of the last one's log.

        Raises:
            NotFound: No such function is deployed.
            ActivationFailed: It has no snapshot yet.
        """
        return self._log_lines(self._servable(self._entry(name)), tail=tail, follow=follow)

    async def _log_lines(
        self, function: Function, *, tail: int, follow: bool
    ) -> AsyncIterator[str]:
        replica_ids = list(function.homes)
        if not replica_ids:
            for line in await self.node.last_logs.lines(function.name, tail=tail):
                yield line
        for replica_id in replica_ids[-1:] if follow else replica_ids:
            home = function.homes[replica_id]
            lines = replica_log(home.backend, home.runtime_id, tail=tail, follow=follow)
            try:
                async for line in lines:
                    yield line
            except BackendError as error:
                yield f"the log of {replica_id} cannot be read: {error}"

    async def status(self) -> dict[str, Any]:
        """Return the node: its devices and how much is deployed and running."""
        devices = self.node.memory.devices.values()
        used_bytes = await asyncio.gather(*map(self._measure_used, devices))
        functions = self._functions().values()
        return {
            "version": VERSION,
            "uptime_s": round(self.node.clock.monotonic() - self._started_at, 3),
            "devices": [
                {
                    "id": device.id,
                    "kind": str(device.kind),
                    "memory_bytes": device.memory_bytes,
                    "used_bytes": used,
                    "promised_bytes": self.node.memory.promised_bytes(device.id),
                    "foreign_bytes": self.node.memory.foreign_bytes(device.id),
                }
                for device, used in zip(devices, used_bytes, strict=True)
            ],
            "standbys": self.node.standbys.counts(),
            "starts": self.node.starts.counts(),
            "host_memory": self._host_memory(),
            "host_cache": self.node.host_cache.view(),
            "functions": len(self._entries),
            "replicas": sum(len(function.set.replicas) for function in functions),
        }

    def _host_memory(self) -> dict[str, Any]:
        """Return what the machine has left, why that is too little, and who holds how much."""
        held = Counter({"standby": self.node.standbys.host_bytes})
        for function in self._functions().values():
            held.update(function.tenancy.host_bytes())
        return {
            "available_bytes": self.node.host_memory.available_bytes(),
            "shortage": self.node.host_memory.shortage(),
            "held_bytes": dict(held),
        }

    def view(self, name: str) -> dict[str, Any]:
        """Return everything that can be said about a function, as JSON values."""
        return entry_view(self._entry(name))

    def views(self) -> list[dict[str, Any]]:
        """Return every function's view, by name."""
        return [entry_view(entry) for _, entry in sorted(self._entries.items())]

    # Inside.

    def _all_functions(self) -> list[Function]:
        """Return every function with an owner, those included that are being deleted."""
        return [*self._functions().values(), *self._closing]

    def _cacheable(self) -> list[Candidate]:
        """Return the files that starts would read."""
        return [
            Candidate(
                path=path,
                num_bytes=num_bytes,
                reuse_probability=entry.function.tenancy.reuse_probability,
                is_for_gpu=entry.function.deployment.spec.resources.gpus > 0,
            )
            for entry in self._entries.values()
            if entry.function is not None and entry.snapshot_state is SnapshotState.READY
            for path, num_bytes in entry.function.deployment.weight_files.items()
        ]

    async def _find_adoptable(self, *, is_first: bool) -> list[Found]:
        """Return what to take over of the backends that have not been seen yet."""
        found: list[Found] = []
        for backend in list(self._unseen):
            try:
                found += await find_adoptable(
                    backend, self._functions(), self._runtime_ids, self.node
                )
            except BackendError as error:
                # A machine without Docker needs no warning every time.
                if is_first or not isinstance(error, BackendUnavailable):
                    log.warning("cannot look for runtimes", backend=backend.name, error=str(error))
            else:
                self._unseen.remove(backend)
        return found

    def _runtime_ids(self) -> set[str]:
        """Return every runtime that is somebody's: a function's, or the pool's."""
        owned = {one for function in self._all_functions() for one in function.runtime_ids}
        return owned | self.node.standbys.runtime_ids

    def _keep_standbys(self) -> None:
        """Have standbys for the backends that functions run on."""
        self.node.standbys.use(function.backend for function in self._functions().values())

    async def _clear_up(self, entry: Entry) -> None:
        """Let go of what a deleted function held, unless its name has been deployed again."""
        if entry.function is not None and entry.owner is not None:
            await asyncio.wait([entry.owner])
        name, current = entry.spec.name, self._entries.get(entry.spec.name)
        if entry.snapshot is not None and (current is None or current.snapshot != entry.snapshot):
            self._snapshots.unpin(entry.snapshot, owner=name)
        if current is None:
            self.node.metrics.forget(name)
            await self.node.last_logs.forget(name)

    def _functions(self) -> dict[str, Function]:
        entries = self._entries.items()
        return {name: entry.function for name, entry in entries if entry.function is not None}

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            near = difflib.get_close_matches(name, list(self._entries), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise NotFound(f"no function is called {name!r}{hint}")
        return self._entries[name]

    def _check_names(self, spec: FunctionSpec) -> None:
        for other in self._entries.values():
            shared = set(other.spec.served_names) & set(spec.served_names)
            if other.spec.name != spec.name and shared:
                raise Conflict(
                    f"{other.spec.name!r} already serves {sorted(shared)}; choose other "
                    "model.served_names"
                )

    def _restore(self, stored: StoredFunction) -> Entry:
        """Return a function with the newest of its revisions that has a snapshot, if one has."""
        entry = Entry(spec=stored.spec, backend=stored.backend, created_us=stored.created_us)
        for candidate in (stored, *stored.earlier):
            if self._restored(entry, candidate):
                if candidate is not stored:
                    entry.snapshot_state = SnapshotState.BUILDING
                break
        return entry

    def _restored(self, entry: Entry, stored: StoredFunction) -> bool:
        """Install a stored revision; says whether it could be."""
        spec = stored.spec
        try:
            snapshot = self._snapshots.find(
                location=spec.model.location,
                revision=spec.model.revision,
                dtype=spec.model.dtype,
                tensor_parallel_size=spec.engine.tensor_parallel_size,
            )
            if snapshot is None:
                return False
            self._install(entry, deployment_of(spec, stored.backend, snapshot.path))
        except (ApiError, SnapshotError, OSError) as error:
            log.error("snapshot not usable", function=spec.name, error=str(error))
            return False
        return True

    def _accept(
        self, spec: FunctionSpec, backend: str, created_us: int, previous: Entry | None
    ) -> None:
        entry = Entry(spec=spec, backend=backend, created_us=created_us)
        if previous is not None:
            entry.snapshot = previous.snapshot
            # The old revision serves until the new one has its snapshot.
            entry.function, entry.owner = previous.function, previous.owner
            if previous.builder is not None:
                previous.builder.cancel()
        self._entries[spec.name] = entry
        self._reaper.follow_schedules(spec, _poker(entry))
        entry.builder = self._prepare_in_background(entry)

    def _prepare_again(self, entry: Entry) -> None:
        if self._entries.get(entry.spec.name) is entry:
            entry.builder = self._prepare_in_background(entry)

    def _prepare_in_background(self, entry: Entry) -> asyncio.Task[None]:
        return self._background.start(self._prepare(entry), f"prepare {entry.spec.name}")

    async def _prepare(self, entry: Entry) -> None:
        def report(progress: BuildProgress) -> None:
            entry.build = progress

        try:
            ref = await self._build(entry.spec, self.node.snapshot_store, report)
            path = self.node.snapshot_store / ref
            deployment = await asyncio.to_thread(deployment_of, entry.spec, entry.backend, path)
            self._install(entry, deployment)
        except (PreparationFailed, ApiError) as error:
            entry.snapshot_failed(str(error))
            log.error("no snapshot", function=entry.spec.name, error=str(error))
            return
        except Exception as error:
            # The root of the build: nobody else could say that it is over.
            entry.snapshot_failed(f"{error!r}; see the log")
            log.exception("no snapshot", function=entry.spec.name)
            return
        finally:
            entry.build = None
        if entry.function is not None and entry.owner is None:
            entry.owner = self._own(entry.function)

    def _install(self, entry: Entry, deployment: Deployment) -> None:
        self._snapshots.pin(deployment.snapshot, owner=deployment.spec.name)
        if entry.snapshot not in (None, deployment.snapshot):
            self._snapshots.unpin(entry.snapshot, owner=deployment.spec.name)
        entry.snapshot, entry.snapshot_state = deployment.snapshot, SnapshotState.READY
        entry.error = ""
        backend = self._backends[deployment.backend]
        if entry.function is None:
            created = entry.created_us // 1_000_000
            entry.function = Function(
                deployment,
                backend,
                self.node,
                created=created,
                on_snapshot_unusable=self._rebuilds.unusable,
            )
        else:
            entry.function.update(deployment, backend)
        self._on_servable(entry.function.snapshot_path)
        if self._is_started:
            self._keep_standbys()

    def _own(self, function: Function) -> asyncio.Task[None]:
        return self._background.start(function.run(), f"own {function.name}")

    async def _watch(self, backend: RuntimeBackend) -> None:
        """Tell whom it concerns of exits the backend sees, whatever happens to the backend."""
        last_error = ""
        while True:
            try:
                async for info in backend.watch():
                    self.node.standbys.exited(info)
                    for function in self._all_functions():
                        await function.exited(info)
            except BackendError as error:
                if str(error) != last_error:  # an engine that is not there is no news after once
                    log.warning("cannot watch", backend=backend.name, error=str(error))
                last_error = str(error)
            except Exception:
                # A defect in one exit must not hide all that come after it.
                log.exception("watch failed", backend=backend.name)
            await asyncio.sleep(WATCH_RETRY_S)


def _adopt(found: Iterable[Found]) -> None:
    for one in found:
        one.function.adopt(one.replica_id, one.runtime_hash, one.home, one.link, one.state)


def _drain_s(function: Function) -> float:
    """Return how long a function's replicas may take to run empty."""
    return function.spec.timeouts.drain if function.set.in_flight else 0.0


def _poker(entry: Entry) -> Callable[[], None]:
    def poke() -> None:
        if entry.function is not None:
            entry.function.poke()

    return poke


def _is_same(entry: Entry, spec: FunctionSpec, backend: str) -> bool:
    is_usable = entry.snapshot_state is not SnapshotState.FAILED
    return is_usable and entry.backend == backend and revision(entry.spec) == revision(spec)


def _percent(build: BuildProgress | None) -> str:
    if build is None or build.total_bytes == 0:
        return ""
    return f" ({build.phase}, {100 * build.done_bytes // build.total_bytes} %)"
