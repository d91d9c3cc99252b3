"""Functions that share one GPU, with real runtimes around engines that only pretend."""

import asyncio
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from controller.backends.process import RUNTIME_COMMAND, ProcessBackend
from controller.errors import ActivationFailed
from controller.scaling.function import Function
from controller.scaling.lifecycle import ReplicaState, Tier
from controller.scaling.node import Node
from controller.scaling.standby import StandbyPool
from runtime.rpc.client import RuntimeClient
from tests.conftest import REPOSITORY
from tests.fakes.engine import Script
from tests.fakes.world import World, collect, deployment, spec_of
from tests.runtime.conftest import FAKE_FACTORY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

GPU = "GPU-0"
CHECKPOINTS = "COLDSPARK_RUNTIME_CHECKPOINTS=tests.fakes.checkpoints:StoppingCheckpoints"
SOON_S = 30.0


@dataclass
class Machine:
    """One machine with one GPU that is not there, and real runtimes."""

    home: Path
    world: World
    node: Node
    backend: ProcessBackend
    functions: list[Function]

    @asynccontextmanager
    async def function(self, name: str, script: Script | None = None) -> AsyncIterator[Function]:
        """Run a function that needs the whole GPU."""
        snapshot = f"{name}@0123456789ab"
        (script or Script()).write(self.home / "snapshots" / snapshot)
        spec = spec_of(
            name=name,
            resources={"gpus": 1},
            scaling={"idle_timeout": None, "max_replicas": 1},
            timeouts={"startup": 20, "drain": 1},
        )
        deployed = replace(deployment(spec, runtime_hash=name), snapshot=snapshot)
        function = Function(deployed, self.backend, self.node, created=0)
        self.functions.append(function)
        owner = asyncio.create_task(function.run(), name=f"own {name}")
        sweeper = asyncio.create_task(self._sweep(function), name=f"sweep {name}")
        try:
            yield function
        finally:
            sweeper.cancel()
            await function.stop()
            owner.cancel()
            await asyncio.wait([owner, sweeper])
            self.functions.remove(function)

    async def _sweep(self, function: Function) -> None:
        while True:
            await asyncio.sleep(0.25)
            function.sweep()

    def home_of(self, function: Function) -> Path:
        """Return the home directory of a function's only runtime, which tells its fake driver."""
        (runtime_id,) = function.runtime_ids
        return self.home / "runtimes" / runtime_id

    def poke_all(self) -> None:
        """Have every function look again."""
        for function in self.functions:
            function.poke()

    def processes(self) -> list[psutil.Process]:
        """Return everything that runs for this machine."""
        return [p for p in psutil.Process().children(recursive=True) if self._is_ours(p)]

    def server_of(self, function: Function) -> psutil.Process:
        """Return the runtime server of a function's only replica."""
        (runtime_id,) = function.runtime_ids
        return self.server(runtime_id)

    def server(self, runtime_id: str) -> psutil.Process:
        """Return a runtime's server."""
        (found,) = [
            process
            for process in psutil.process_iter()
            if "runtime.main" in (line := cmdline(process)) and runtime_id in line
        ]
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        return any(str(self.home) in part for part in cmdline(process))


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


@pytest.fixture
async def machine(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Machine]:
    """A machine that keeps one standby; nothing is left of it."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    home = Path(tempfile.mkdtemp(prefix="cs-", dir="/tmp"))
    (home / "snapshots").mkdir()
    command = ("env", CHECKPOINTS, *RUNTIME_COMMAND, "--engine-factory", FAKE_FACTORY)
    backend = ProcessBackend(home / "runtimes", cluster="test", command=command)
    world = World(num_gpus=1)
    standbys = StandbyPool(
        size=1, connect=RuntimeClient, snapshot_store=home / "snapshots", gpus=(GPU,)
    )
    node = replace(
        world.node, connect=RuntimeClient, snapshot_store=home / "snapshots", standbys=standbys
    )
    machine = Machine(home=home, world=world, node=node, backend=backend, functions=[])
    node.memory.on_release(machine.poke_all)
    node.contention.among(lambda: (one.tenancy for one in machine.functions))
    standbys.use([backend])
    yield machine
    await standbys.close(remove=True)
    await backend.close()
    await until(lambda: not machine.processes(), "the end of all processes")
    shutil.rmtree(home)


async def until(is_so: Callable[[], object], what: str) -> None:
    for _ in range(int(SOON_S / 0.02)):
        if is_so():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"waited {SOON_S:g} s for {what}")


async def test_random_calls_to_functions_on_one_gpu_get_their_own_answers(
    machine: Machine,
) -> None:
    chance = random.Random(0)
    offsets = {f"f{number}": 1000 * number for number in range(5)}
    most_at_once = 0

    async def watch() -> None:
        nonlocal most_at_once
        while True:
            held = machine.node.memory.held(GPU)
            loaded = [
                link.status.memory.weights_bytes
                for function in machine.functions
                for link in function.links.values()
                if link.status.memory.weights_bytes
            ]
            most_at_once = max(most_at_once, len(loaded))
            assert sum(held.values()) <= 100 << 30
            await asyncio.sleep(0.005)

    async def caller(functions: list[Function]) -> None:
        for _ in range(8):
            function = chance.choice(functions)
            first = 3 + offsets[function.name]
            answer = await collect(function, num_prompt=3, max_tokens=3)
            # The prompt of `collect` begins with 1.
            assert answer == [first - 1, first, first + 1], function.name

    async with AsyncExitStack() as stack:
        functions = [
            await stack.enter_async_context(
                machine.function(name, Script(offset=offset, load_s=0.02))
            )
            for name, offset in offsets.items()
        ]
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(caller(functions) for _ in range(3)))
        watching.cancel()
        await asyncio.wait([watching])
        assert watching.cancelled(), watching.exception()
        assert sum(len(function.set.replicas) for function in functions) >= 4, "they were parked"
    assert most_at_once == 1


async def bring_to(machine: Machine, function: Function, state: str) -> psutil.Process:
    """Bring a function's replica into a state; return its runtime server."""
    if state != "starting":
        await until(lambda: machine.node.standbys.has_ready(machine.backend), "a standby")
    if state == "standby":
        (runtime_id,) = machine.node.standbys.runtime_ids
        return machine.server(runtime_id)
    if state not in ("starting", "loading"):
        await collect(function)
    if state in ("parked", "waking"):
        await function.park()
    if state in ("starting", "loading", "waking"):
        begin(collect(function))
    elif state == "parking":
        (machine.home_of(function) / "hang").touch()
        begin(function.park())
    elif state == "draining":
        begin(collect(function, max_tokens=1 << 20))
        await until(lambda: function.set.in_flight, "a request in flight")
        begin(function.stop())
    now = {"waking": ReplicaState.LOADING}.get(state) or ReplicaState(state)
    await until(lambda: {r.state for r in function.set.replicas.values()} == {now}, state)
    if state == "parking":
        server = machine.server_of(function)
        await until(lambda: victim(server, "engine").status() == psutil.STATUS_STOPPED, "a stop")
    if state == "starting":
        await until(lambda: function.runtime_ids and server_is_there(machine, function), "a server")
    return machine.server_of(function)


def begin(work: Coroutine[Any, Any, object]) -> None:
    """Have something done whose end does not matter here."""
    task = asyncio.create_task(work, name="begun")
    task.add_done_callback(lambda task: task.cancelled() or task.exception())


def server_is_there(machine: Machine, function: Function) -> bool:
    try:
        machine.server_of(function)
    except ValueError:
        return False
    return True


def victim(server: psutil.Process, name: str) -> psutil.Process:
    """Return a process of a runtime's tree."""
    if name == "server":
        return server
    (found,) = [child for child in server.children(recursive=True) if child.name() == name]
    return found


STATES = ["standby", "starting", "loading", "ready", "parking", "parked", "waking", "draining"]
FIRST = ("starting", "loading")
"""Only a first start that fails is told to who waits for it."""


@pytest.mark.parametrize("name", ["server", "zygote", "engine"])
@pytest.mark.parametrize("state", STATES)
async def test_killing_any_process_in_any_state_costs_at_most_the_call_that_started_it(
    machine: Machine, state: str, name: str
) -> None:
    if (state, name) in {("standby", "engine"), ("starting", "engine"), ("starting", "zygote")}:
        pytest.skip("there is none yet")
    async with machine.function("f", Script(load_s=0.5)) as function:
        server = await bring_to(machine, function, state)
        if state in ("loading", "waking"):
            await until(lambda: len(server.children(recursive=True)) == 2, "the engine's fork")
        tree = [server, *server.children(recursive=True)]
        homes = [machine.home / "runtimes" / runtime_id for runtime_id in function.runtime_ids]
        victim(server, name).kill()
        await until(lambda: not victim_is_alive(tree, name), "its death")
        for home in homes:
            (home / "hang").unlink(missing_ok=True)
        try:
            assert await collect(function) == [2, 3, 4, 5]
        except ActivationFailed:
            assert state in FIRST
            await until(lambda: not function.set.replicas, "its removal")
            await asyncio.sleep(1.1)  # the back-off
            assert await collect(function) == [2, 3, 4, 5]
        (replica,) = function.set.replicas.values()
        assert replica.state is ReplicaState.READY
        assert dict(machine.node.memory.held(GPU)).keys() == {replica.id}
        if state != "standby":
            await until(
                lambda: function.tier is Tier.READY and not victim_is_alive(tree, "engine"),
                "the end of the engine that was killed",
            )


async def test_a_function_gets_the_gpu_while_the_driver_still_works_on_the_one_before(
    machine: Machine,
) -> None:
    async with machine.function("a") as before, machine.function("b") as after:
        await collect(before)
        (replica,) = before.set.replicas.values()
        hang = machine.home_of(before) / "hang"
        hang.touch()
        assert await collect(after) == [2, 3, 4, 5]
        assert replica.state is ReplicaState.PARKING
        hang.unlink()
        assert await collect(before) == [2, 3, 4, 5]


async def test_an_engine_that_cannot_be_restored_is_replaced_without_the_client_noticing(
    machine: Machine,
) -> None:
    async with machine.function("f") as function:
        await collect(function)
        server = machine.server_of(function)
        engine = victim(server, "engine")
        await function.park()
        await until(lambda: engine.status() == psutil.STATUS_STOPPED, "its suspension")
        (machine.home_of(function) / "resume").touch()
        assert await collect(function) == [2, 3, 4, 5]
        await until(lambda: not is_alive(engine), "the end of the engine that was lost")
        (replica,) = function.set.replicas.values()
        assert dict(machine.node.memory.held(GPU)).keys() == {replica.id}
        assert machine.server_of(function) != server


def victim_is_alive(tree: list[psutil.Process], name: str) -> bool:
    """Return whether a process of a tree still runs: the server is the first one."""
    if name == "server":
        return is_alive(tree[0])
    return any(is_alive(process) and process_name(process) == name for process in tree[1:])


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def process_name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""
