"""Deploying, deleting and restarting, on fake machines with a real snapshot directory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.backends.base import BackendUnavailable, RuntimeInfo
from controller.errors import (
    ActivationFailed,
    Conflict,
    InvalidSpec,
    ModelNotFound,
    NotFound,
    RuntimeDied,
)
from controller.scaling.entry import StoredFunction
from controller.scaling.lifecycle import Tier
from controller.scaling.placement import CPU_DEVICE_ID, Device
from controller.scaling.plane import REMOVAL_TIMEOUT_S, ControlPlane
from controller.scaling.policy import backoff_s
from controller.scaling.preparation import BuildProgress, PreparationFailed
from controller.scaling.reaper import Reaper
from controller.scaling.standby import REFILL_DELAY_S
from functions.spec import FunctionSpec
from runtime.rpc import inference_pb2 as pb
from snapshots.store import SnapshotStore
from tests.fakes.runtime import FakeConnection, FakeRuntime
from tests.fakes.world import World, collect, request, spec_of

pytestmark = [pytest.mark.looptime, pytest.mark.model]


class MemoryStore:
    """The desired state in a dictionary."""

    def __init__(self) -> None:
        self.functions: dict[str, StoredFunction] = {}

    async def load(self) -> list[StoredFunction]:
        return list(self.functions.values())

    async def put(self, function: StoredFunction) -> None:
        self.functions[function.spec.name] = function

    async def delete(self, name: str) -> None:
        del self.functions[name]


class Machine:
    """What outlives a controller: store, snapshots and the backend's runtimes."""

    def __init__(self, snapshot: Path, *, num_standbys: int = 0, num_gpus: int = 0) -> None:
        self.store = MemoryStore()
        self.snapshot = snapshot
        self.num_standbys, self.num_gpus = num_standbys, num_gpus
        self.used_bytes: int | None = None
        self.world = World(num_standbys=num_standbys, num_gpus=num_gpus)
        self.world.node = replace(self.world.node, snapshot_store=snapshot.parent)
        self.build_error = ""
        self.unforeseen: Exception | None = None
        self.may_build = asyncio.Event()
        self.may_build.set()

    def restart(self) -> None:
        """Forget everything a controller keeps in memory."""
        old, self.world = self.world, World(num_standbys=self.num_standbys, num_gpus=self.num_gpus)
        self.world.backend, self.world.runtimes = old.backend, old.runtimes
        self.world.node = replace(self.world.node, snapshot_store=self.snapshot.parent)

    async def build(
        self, spec: FunctionSpec, store: Path, on_progress: Callable[[BuildProgress], None]
    ) -> str:
        """Pretend to build what is already there."""
        on_progress(BuildProgress(phase="convert", done_bytes=43, total_bytes=100))
        await self.may_build.wait()
        if self.unforeseen is not None:
            raise self.unforeseen
        if self.build_error:
            raise PreparationFailed(self.build_error)
        return self.snapshot.name

    async def measure_used(self, device: Device) -> int | None:
        """Return what is in use of any device."""
        return self.used_bytes

    @asynccontextmanager
    async def controller(self) -> AsyncIterator[ControlPlane]:
        """Run a controller on this machine."""
        backends = {"fake": self.world.backend}
        plane = ControlPlane(
            self.world.node,
            backends,
            self.store,
            Reaper(),
            build=self.build,
            measure_used=self.measure_used,
        )
        await plane.start()
        try:
            yield plane
        finally:
            await plane.stop(stop_runtimes=False)


async def until_built(plane: ControlPlane, name: str = "tiny") -> dict[str, Any]:
    for _ in range(100):
        if (view := plane.view(name))["snapshot_state"] != "building":
            return view
        await asyncio.sleep(0.1)
    raise AssertionError("still building")


async def test_a_deployed_function_serves_under_its_names(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        spec = spec_of(model={"source": "./model", "served_names": ["tiny", "gpt-x"]})
        assert await plane.deploy(spec, "fake")
        await until_built(plane)
        assert await collect(plane.resolve("gpt-x")) == [3, 4, 5, 6]
        assert plane.resolve("tiny") is plane.resolve("gpt-x")
        assert "tiny" in SnapshotStore(machine.snapshot.parent).pins(machine.snapshot.name)


async def test_the_same_spec_again_changes_nothing(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
        assert not await plane.deploy(spec_of(), "fake")
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        assert len(machine.world.backend.created) == 1


async def test_while_the_snapshot_is_built_requests_are_told_so(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        machine.may_build.clear()
        await plane.deploy(spec_of(), "fake")
        await asyncio.sleep(0.1)
        assert plane.view("tiny")["build"]["done_bytes"] == 43
        with pytest.raises(ActivationFailed, match=r"being built \(convert, 43 %\)") as told:
            plane.resolve("tiny")
        assert told.value.retry_after_s is not None
        machine.may_build.set()
        await until_built(plane)
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]


async def test_a_failed_build_is_told_and_tried_again_by_the_next_deploy(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        machine.build_error = "no such directory './model'"
        await plane.deploy(spec_of(), "fake")
        view = await until_built(plane)
        assert view["snapshot_state"] == "failed"
        with pytest.raises(ActivationFailed, match="no such directory"):
            plane.resolve("tiny")
        machine.build_error = ""
        await plane.deploy(spec_of(), "fake")
        assert (await until_built(plane))["snapshot_state"] == "ready"


async def test_too_much_context_is_refused_with_the_models_limit(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        spec = spec_of(model={"source": "./model", "max_model_len": 1 << 20})
        await plane.deploy(spec, "fake")
        view = await until_built(plane)
        assert view["snapshot_state"] == "failed"
        assert "8192" in view["last_error"]


@pytest.mark.parametrize(
    ("spec", "backend", "message"),
    [
        (spec_of(), "nomad", "unknown backend 'nomad'"),
        (spec_of(resources={"gpus": 1}), "fake", "this machine has 0"),
    ],
)
async def test_what_can_never_run_is_refused(
    smollm2_snapshot: Path, spec: FunctionSpec, backend: str, message: str
) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        with pytest.raises(InvalidSpec, match=message):
            await plane.deploy(spec, backend)
        assert plane.views() == []


async def test_a_replica_over_several_gpus_is_refused(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    machine.world = World(num_gpus=2)
    spec = spec_of(resources={"gpus": 2}, engine={"tensor_parallel_size": 2})
    async with machine.controller() as plane:
        with pytest.raises(InvalidSpec, match="not spread over several GPUs"):
            await plane.deploy(spec, "fake")


async def test_two_functions_cannot_serve_one_name(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        thief = spec_of(model={"source": "./model", "served_names": ["tiny"]})
        with pytest.raises(Conflict, match="'tiny' already serves"):
            await plane.deploy(thief.model_copy(update={"name": "thief"}), "fake")


async def test_a_deleted_function_is_gone_with_its_runtimes(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
        await plane.delete("tiny")
        assert not machine.world.backend.machine.runtimes
        with pytest.raises(ModelNotFound, match="no function serves"):
            plane.resolve("tiny")
        with pytest.raises(NotFound):
            await plane.delete("tiny")
        assert "tiny" not in SnapshotStore(machine.snapshot.parent).pins(machine.snapshot.name)


async def test_an_unknown_model_names_its_neighbours(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        with pytest.raises(ModelNotFound, match="did you mean 'tiny'"):
            plane.resolve("tinny")


async def test_a_new_controller_adopts_what_fits_and_removes_the_rest(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot)
    (built,) = (
        s for s in SnapshotStore(smollm2_snapshot.parent).list() if s.path == smollm2_snapshot
    )
    async with machine.controller() as plane:
        await plane.deploy(spec_of(model={"source": built.manifest.source.location}), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
    (kept,) = machine.world.backend.created
    stranger = replace(kept, runtime_id="stranger", revision="old")
    await machine.world.backend.create(stranger)
    machine.world.backend.machine.log("stranger", "what it said last")
    machine.restart()
    async with machine.controller() as plane:
        assert list(machine.world.backend.machine.runtimes) == [kept.runtime_id]
        assert plane.view("tiny")["tier"] == "ready"
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        assert machine.world.backend.created == [kept, stranger]
        assert await plane.node.last_logs.lines("tiny", tail=9) == ["what it said last"]


async def test_orphans_are_removed_and_replicas_are_not(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
        (ours,) = machine.world.backend.created
        await machine.world.backend.create(replace(ours, runtime_id="orphan"))
        await plane.reconcile()
        assert list(machine.world.backend.machine.runtimes) == [ours.runtime_id]


async def test_a_silent_engine_is_replaced(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
        machine.world.runtime.heartbeat_age_s = 60.0
        await plane.reconcile()
        await asyncio.sleep(0.1)
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        assert len(machine.world.backend.created) == 2


async def test_a_dead_engine_nobody_told_of_is_replaced(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
        machine.world.runtime.state = pb.RUNTIME_STATE_FAILED
        await plane.reconcile()
        await asyncio.sleep(0.1)
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        assert len(machine.world.backend.created) == 2


@pytest.mark.parametrize("defect", ["silent", "dead", "hung"])
async def test_a_parked_replica_that_cannot_wake_is_found_before_its_next_request(
    smollm2_snapshot: Path, defect: str
) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
        await plane.park("tiny")
        await plane.reconcile()
        assert plane.resolve("tiny").tier is Tier.PARKED
        if defect == "silent":
            machine.world.runtime.heartbeat_age_s = 60.0
        elif defect == "dead":
            machine.world.runtime.state = pb.RUNTIME_STATE_FAILED
        else:
            machine.world.runtime.is_alive = False
        await plane.reconcile()
        await asyncio.sleep(0.1)
        assert plane.resolve("tiny").tier is Tier.STOPPED
        assert not machine.world.backend.machine.runtimes
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]


async def test_an_exit_seen_by_the_backend_ends_the_start(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    machine.world.make_runtime = _slow_runtime
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        waiting = asyncio.create_task(collect(plane.resolve("tiny")))
        await asyncio.sleep(0.5)
        machine.world.backend.exit(machine.world.backend.created[0].runtime_id, exit_code=3)
        with pytest.raises(ActivationFailed, match="status 3"):
            await waiting


def _slow_runtime() -> FakeRuntime:
    return FakeRuntime(load_s=1000.0)


async def test_a_deleted_function_finishes_what_runs_whatever_sweeps_come(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        running = asyncio.create_task(collect(plane.resolve("tiny"), max_tokens=100))
        await asyncio.sleep(1.5)
        deleting = asyncio.create_task(plane.delete("tiny"))
        await asyncio.sleep(0.1)
        await plane.reconcile()
        await plane.sweep()
        assert machine.world.backend.machine.runtimes
        assert len(await running) == 100
        await deleting
        assert not machine.world.backend.machine.runtimes


async def test_a_deleted_function_still_keeps_its_deadlines_and_hears_of_exits(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(timeouts={"stream_idle": 2}), "fake")
        await until_built(plane)
        running = asyncio.create_task(collect(plane.resolve("tiny"), max_tokens=1000))
        await asyncio.sleep(1.5)
        machine.world.runtime.is_stuck = True
        deleting = asyncio.create_task(plane.delete("tiny"))
        for _ in range(10):
            await asyncio.sleep(1.0)
            await plane.sweep()
        with pytest.raises(RuntimeDied, match=r"timeouts\.stream_idle"):
            await running
        await deleting


async def test_a_function_deleted_while_its_backend_is_away_is_removed_when_that_is_back(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot)
    backend, store = machine.world.backend, SnapshotStore(machine.snapshot.parent)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
        backend.error = BackendUnavailable("the engine is away", temporary=True)
        began = asyncio.get_running_loop().time()
        left = await plane.delete("tiny")
        assert asyncio.get_running_loop().time() == began + REMOVAL_TIMEOUT_S
        assert left is not None
        assert [replica["state"] for replica in left["replicas"]] == ["draining"]
        with pytest.raises(NotFound):
            plane.view("tiny")
        assert backend.machine.runtimes
        backend.error = None
        await asyncio.sleep(10.0)  # its longest pause between two tries
        assert not backend.machine.runtimes
        assert "tiny" not in store.pins(machine.snapshot.name)


async def test_a_function_stopped_while_its_backend_is_away_is_stopped_when_that_is_back(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot)
    backend = machine.world.backend
    async with machine.controller() as plane:
        await plane.deploy(spec_of(timeouts={"drain": 5}), "fake")
        await until_built(plane)
        async with plane.resolve("tiny").generate(request(max_tokens=10_000)) as generation:
            await anext(aiter(generation))
            backend.error = BackendUnavailable("the engine is away", temporary=True)
            began = asyncio.get_running_loop().time()
            left = await plane.stop_function("tiny")
            assert asyncio.get_running_loop().time() == began + 5.0 + REMOVAL_TIMEOUT_S
        assert left is not None
        assert [replica["state"] for replica in left["replicas"]] == ["draining"]
        backend.error = None
        assert await plane.stop_function("tiny") is None
        assert not backend.machine.runtimes
        assert plane.view("tiny")["replicas"] == []


async def test_a_function_is_deleted_although_nobody_waits_for_it(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        running = asyncio.create_task(collect(plane.resolve("tiny"), max_tokens=100))
        await asyncio.sleep(1.5)
        deleting = asyncio.create_task(plane.delete("tiny"))
        await asyncio.sleep(0.1)
        deleting.cancel()
        assert len(await running) == 100
        await asyncio.sleep(0.1)
        assert not machine.world.backend.machine.runtimes
        assert "tiny" not in SnapshotStore(machine.snapshot.parent).pins(machine.snapshot.name)


async def test_a_name_deployed_again_keeps_its_pin_when_the_old_one_has_ended(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        running = asyncio.create_task(collect(plane.resolve("tiny"), max_tokens=300))
        await asyncio.sleep(1.5)
        deleting = asyncio.create_task(plane.delete("tiny"))
        await asyncio.sleep(0.1)
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        assert len(await running) == 300
        await deleting
        assert "tiny" in SnapshotStore(machine.snapshot.parent).pins(machine.snapshot.name)
        await plane.reconcile()
        assert len(machine.world.backend.machine.runtimes) == 1


@pytest.mark.parametrize("failure", [OSError("no more processes"), ValueError("what is this?")])
async def test_a_build_that_fails_in_an_unforeseen_way_is_told(
    smollm2_snapshot: Path, failure: Exception
) -> None:
    machine = Machine(smollm2_snapshot)
    machine.unforeseen = failure
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        view = await until_built(plane)
        assert view["snapshot_state"] == "failed"
        assert str(failure) in view["last_error"]


async def test_a_watch_that_breaks_in_an_unforeseen_way_goes_on(
    smollm2_snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(smollm2_snapshot)
    machine.world.make_runtime = _slow_runtime
    watch, calls = machine.world.backend.watch, []

    def breaks_once() -> AsyncIterator[RuntimeInfo]:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a defect")
        return watch()

    monkeypatch.setattr(machine.world.backend, "watch", breaks_once)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        waiting = asyncio.create_task(collect(plane.resolve("tiny")))
        await asyncio.sleep(1.5)
        machine.world.backend.exit(machine.world.backend.created[0].runtime_id, exit_code=3)
        with pytest.raises(ActivationFailed, match="status 3"):
            await waiting


async def test_the_last_log_is_there_when_its_replica_is_gone(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    machine.world.make_runtime = _slow_runtime
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        waiting = asyncio.create_task(collect(plane.resolve("tiny")))
        await asyncio.sleep(0.5)
        (created,) = machine.world.backend.created
        for line in ("loading", "out of memory"):
            machine.world.backend.machine.log(created.runtime_id, line)
        machine.world.backend.exit(created.runtime_id, exit_code=1)
        with pytest.raises(ActivationFailed, match="status 1"):
            await waiting
        await asyncio.sleep(0.1)
        assert not machine.world.backend.machine.runtimes
        told = [line async for line in plane.logs("tiny", tail=100, follow=False)]
        assert told == ["loading", "out of memory"]
        assert [line async for line in plane.logs("tiny", tail=1, follow=True)] == told[1:]
        await plane.delete("tiny")
        assert await plane.node.last_logs.lines("tiny", tail=9) == []


async def test_logs_are_refused_at_once_while_there_is_no_snapshot(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        machine.may_build.clear()
        await plane.deploy(spec_of(), "fake")
        with pytest.raises(ActivationFailed, match="is being built"):
            plane.logs("tiny", tail=1, follow=False)
        with pytest.raises(NotFound):
            plane.logs("nobody", tail=1, follow=False)
        machine.may_build.set()


async def test_a_build_that_fails_is_told_before_what_failed_earlier(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
        machine.world.runtime.crash()
        await asyncio.sleep(0.1)
        assert "runtime" in plane.view("tiny")["last_error"]
        machine.build_error = "no such directory"
        await plane.deploy(spec_of(model={"source": "./other"}), "fake")
        assert (await until_built(plane))["last_error"] == "no such directory"


async def test_replicas_of_a_backend_that_was_away_at_the_start_are_adopted_when_it_is_back(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot)
    (built,) = (
        s for s in SnapshotStore(smollm2_snapshot.parent).list() if s.path == smollm2_snapshot
    )
    async with machine.controller() as plane:
        await plane.deploy(spec_of(model={"source": built.manifest.source.location}), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
    (kept,) = machine.world.backend.created
    machine.restart()
    machine.world.backend.error = BackendUnavailable("the daemon is away", temporary=True)
    async with machine.controller() as plane:
        await plane.reconcile()
        machine.world.backend.error = None
        await plane.reconcile()
        assert list(machine.world.backend.machine.runtimes) == [kept.runtime_id]
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        assert machine.world.backend.created == [kept]


async def test_a_late_look_at_a_backend_leaves_new_replicas_alone(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    machine.world.backend.error = BackendUnavailable("the daemon is away", temporary=True)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        machine.world.backend.error = None
        starting = asyncio.create_task(collect(plane.resolve("tiny")))
        await asyncio.sleep(0.5)
        await plane.reconcile()
        assert await starting == [3, 4, 5, 6]
        assert len(machine.world.backend.created) == 1


async def test_stopping_ends_although_a_runtime_cannot_be_removed(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
        machine.world.backend.error = BackendUnavailable("the daemon is away", temporary=True)
        async with asyncio.timeout(31.0):
            await plane.stop(stop_runtimes=True, timeout_s=30.0)


async def test_the_serving_revision_serves_on_after_a_restart_during_a_build(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot)
    (built,) = (
        s for s in SnapshotStore(smollm2_snapshot.parent).list() if s.path == smollm2_snapshot
    )
    old = spec_of(model={"source": built.manifest.source.location})
    async with machine.controller() as plane:
        await plane.deploy(old, "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
    new = StoredFunction(spec=spec_of(), backend="fake", created_us=0)
    earlier = machine.store.functions["tiny"]
    machine.store.functions["tiny"] = replace(new, earlier=(earlier,))
    machine.restart()
    machine.may_build.clear()
    async with machine.controller() as plane:
        assert plane.view("tiny")["snapshot_state"] == "building"
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        assert len(machine.world.backend.created) == 1
        machine.may_build.set()
        assert (await until_built(plane))["snapshot_state"] == "ready"
        assert plane.view("tiny")["source"] == "./model"
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]


async def test_standbys_and_replicas_in_them_outlive_the_controller(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot, num_standbys=1)
    (built,) = (
        s for s in SnapshotStore(smollm2_snapshot.parent).list() if s.path == smollm2_snapshot
    )
    async with machine.controller() as plane:
        await plane.deploy(spec_of(model={"source": built.manifest.source.location}), "fake")
        await until_built(plane)
        await asyncio.sleep(0.1)
        await collect(plane.resolve("tiny"))
        await asyncio.sleep(REFILL_DELAY_S + 0.1)
        (replica,) = plane.resolve("tiny").set.replicas
        assert (await plane.status())["standbys"] == {"fake": {"ready": 1, "starting": 0}}
    machine.restart()
    async with machine.controller() as plane:
        await plane.reconcile()
        assert plane.resolve("tiny").tier is Tier.READY
        assert set(plane.resolve("tiny").set.replicas) == {replica}, "its books go on"
        assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]
        assert (await plane.status())["standbys"] == {"fake": {"ready": 1, "starting": 0}}
        assert not machine.world.backend.deleted
        assert len(machine.world.backend.created) == 2


async def test_an_exit_seen_by_the_backend_ends_the_wait_for_a_standby(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot, num_standbys=1)
    machine.world.make_runtime = lambda: FakeRuntime(is_alive=False)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await asyncio.sleep(0.1)
        machine.world.make_runtime = FakeRuntime
        machine.world.backend.exit(machine.world.backend.created[0].runtime_id)
        await asyncio.sleep(backoff_s(1) + 0.1)
        assert (await plane.status())["standbys"] == {"fake": {"ready": 1, "starting": 0}}


async def test_standbys_go_with_the_last_function_that_could_use_them(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot, num_standbys=1)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await asyncio.sleep(0.1)
        await plane.delete("tiny")
        await asyncio.sleep(0.1)
        assert not machine.world.backend.machine.runtimes


async def test_a_parked_replica_on_a_gpu_that_is_gone_is_replaced(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot)
    (built,) = (
        s for s in SnapshotStore(smollm2_snapshot.parent).list() if s.path == smollm2_snapshot
    )
    async with machine.controller() as plane:
        await plane.deploy(spec_of(model={"source": built.manifest.source.location}), "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
        await plane.park("tiny")
    (before,) = machine.world.backend.machine.runtimes
    machine.world.runtime.device_uuids = ["GPU-gone"]
    machine.restart()
    async with machine.controller() as plane:
        assert before not in machine.world.backend.machine.runtimes
        async with asyncio.timeout(10.0):
            assert await collect(plane.resolve("tiny")) == [3, 4, 5, 6]


async def test_a_function_deleted_while_its_replica_is_found_is_promised_nothing(
    smollm2_snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(smollm2_snapshot)
    (built,) = (
        s for s in SnapshotStore(smollm2_snapshot.parent).list() if s.path == smollm2_snapshot
    )
    spec = spec_of(
        model={"source": built.manifest.source.location}, resources={"gpus": 0, "memory": "1Mi"}
    )
    async with machine.controller() as plane:
        await plane.deploy(spec, "fake")
        await until_built(plane)
        await collect(plane.resolve("tiny"))
    machine.restart()
    machine.world.backend.error = BackendUnavailable("away")
    health = FakeConnection.health

    async def slow(connection: FakeConnection, *, timeout_s: float) -> pb.RuntimeStatus:
        await asyncio.sleep(1.0)
        return await health(connection, timeout_s=timeout_s)

    monkeypatch.setattr(FakeConnection, "health", slow)
    async with machine.controller() as plane:
        machine.world.backend.error = None
        looking = asyncio.create_task(plane.reconcile())
        await asyncio.sleep(0.5)
        await plane.delete("tiny")
        await looking
        assert not plane.node.memory.held(CPU_DEVICE_ID)
        await plane.reconcile()
        assert not machine.world.backend.machine.runtimes


async def test_what_others_hold_of_a_gpu_is_measured_shown_and_left_to_them(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot, num_gpus=1)

    async def look(plane: ControlPlane, used_bytes: int | None) -> dict[str, Any]:
        machine.used_bytes = used_bytes
        for _ in range(20):
            await plane.look_at_devices()
            await asyncio.sleep(0.25)
        gpu, cpu = (await plane.status())["devices"]
        assert cpu["foreign_bytes"] is None
        shown: dict[str, Any] = gpu
        return shown

    async with machine.controller() as plane:
        spec = spec_of(resources={"gpus": 1}, engine={"gpu_memory_utilization": 0.5})
        await plane.deploy(spec, "fake")
        await until_built(plane)
        assert (await look(plane, None))["foreign_bytes"] is None
        metrics = machine.world.node.metrics
        assert b'device_foreign_bytes{device="GPU-0"}' not in metrics.render()
        await plane.warm("tiny")
        shown = await look(plane, 80 << 30)
        assert (shown["promised_bytes"], shown["foreign_bytes"]) == (50 << 30, 30 << 30)
        assert b'device_foreign_bytes{device="GPU-0"} 3.22' in metrics.render()
        await plane.park("tiny")
        assert (await look(plane, 30 << 30))["foreign_bytes"] == 30 << 30
        assert (await look(plane, 0))["foreign_bytes"] == 0
        assert (await look(plane, None))["foreign_bytes"] is None
        assert b'device_foreign_bytes{device="GPU-0"}' not in metrics.render()


async def test_what_runtimes_hold_of_the_host_is_shown(smollm2_snapshot: Path) -> None:
    machine = Machine(smollm2_snapshot, num_standbys=1)
    machine.world.make_runtime = lambda: FakeRuntime(host_bytes=3)
    async with machine.controller() as plane:
        await plane.deploy(spec_of(), "fake")
        await until_built(plane)
        await plane.warm("tiny")
        await plane.park("tiny")
        await asyncio.sleep(REFILL_DELAY_S + 1.0)
        shown = (await plane.status())["host_memory"]
        assert shown == {
            "available_bytes": 64 << 30,
            "shortage": "",
            "held_bytes": {"standby": 3, "parked": 3},
        }
        await plane.sweep()
        line = b'host_memory_bytes{function="tiny",state="parked"} 3.0'
        assert line in machine.world.node.metrics.render()
        machine.world.available_bytes = 1
        assert "COLDSPARK_PARK_FLOOR_BYTES" in (await plane.status())["host_memory"]["shortage"]


async def test_a_name_deployed_again_keeps_its_place_in_the_lines_while_the_old_one_drains(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot, num_gpus=1)
    machine.world.make_runtime = lambda: FakeRuntime(step_s=0.5)

    def of(name: str, share: float) -> FunctionSpec:
        return spec_of(
            name=name,
            model={"source": "./model", "served_names": [name]},
            resources={"gpus": 1},
            engine={"gpu_memory_utilization": share},
        )

    async with machine.controller() as plane, asyncio.TaskGroup() as clients:
        await plane.deploy(of("busy", 0.5), "fake")
        await until_built(plane, "busy")
        await plane.deploy(of("tiny", 0.2), "fake")
        await until_built(plane)
        ends = asyncio.Event()

        async def call_without_pause() -> None:
            while not ends.is_set():
                await collect(plane.resolve("busy"), max_tokens=10)

        for _ in range(2):
            clients.create_task(call_without_pause())
            await asyncio.sleep(2.5)
        clients.create_task(collect(plane.resolve("tiny"), max_tokens=500))
        await asyncio.sleep(3.0)
        deleting = clients.create_task(plane.delete("tiny"))
        await asyncio.sleep(0.1)
        await plane.deploy(of("tiny", 0.6), "fake")
        await until_built(plane)

        async def sweep() -> None:
            while not ends.is_set():
                await asyncio.sleep(0.25)
                await plane.sweep()

        clients.create_task(sweep())
        async with asyncio.timeout(60.0):  # after 30 the busy one has to give way
            await collect(plane.resolve("tiny"))
        assert not deleting.done(), "the old one is still there"
        ends.set()


async def test_what_others_hold_of_a_gpu_is_known_before_the_first_start(
    smollm2_snapshot: Path,
) -> None:
    machine = Machine(smollm2_snapshot, num_gpus=1)
    async with machine.controller() as plane:
        spec = spec_of(
            resources={"gpus": 1},
            engine={"gpu_memory_utilization": 0.5},
            scaling={"min_replicas": 1},
        )
        await plane.deploy(spec, "fake")
        await until_built(plane)
        await plane.stop(stop_runtimes=True)
    num_before = len(machine.world.backend.created)
    machine.restart()
    machine.used_bytes = 80 << 30
    async with machine.controller() as plane:
        await asyncio.sleep(5.0)
        assert plane.node.memory.foreign_bytes("GPU-0") == 80 << 30
        assert len(machine.world.backend.created) == num_before
