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

from controller.backends import log_writer
from controller.backends.process import RUNTIME_COMMAND, ProcessBackend
from controller.errors import RuntimeDied
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

    def writer(self, runtime_id: str) -> psutil.Process:
        """Return the process that writes a runtime's log."""
        log = str(self.home / "runtimes" / runtime_id / "log")
        (found,) = [
            process
            for process in psutil.process_iter()
            if log_writer.__file__ in (line := cmdline(process)) and log in line
        ]
        return found

    async def watch_exits(self) -> None:
        """Tell whom it concerns of exits the backend sees, as the control plane does."""
        async for info in self.backend.watch():
            self.node.standbys.exited(info)
            for function in self.functions:
                await function.exited(info)

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
        size=1,
        connect=RuntimeClient,
        places=world.node.starts,
        snapshot_store=home / "snapshots",
        gpus=(GPU,),
    )
    node = replace(
        world.node, connect=RuntimeClient, snapshot_store=home / "snapshots", standbys=standbys
    )
    machine = Machine(home=home, world=world, node=node, backend=backend, functions=[])
    node.memory.on_release(machine.poke_all)
    node.contention.among(lambda: (one.tenancy for one in machine.functions))
    standbys.use([backend])
    watch = asyncio.create_task(machine.watch_exits(), name="watch exits")
    yield machine
    watch.cancel()
    await asyncio.wait([watch])
    assert watch.cancelled(), watch.exception()
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


@dataclass(kw_only=True)
class Begun:
    """A replica, or a standby, on its way into a state."""

    server: psutil.Process
    writer: psutil.Process
    calls: list[asyncio.Task[Any]]  # what was called for that, in the order of OUTCOMES

    def tree(self) -> list[psutil.Process]:
        """Return every process there is for the runtime; the server is the first one."""
        return [self.server, self.writer, *self.server.children(recursive=True)]

    def victim(self, name: str) -> psutil.Process:
        """Return one of them by its part."""
        match name:
            case "server":
                return self.server
            case "writer":
                return self.writer
            case "zygote":  # whatever it is called as long as it starts
                (zygote,) = self.server.children()
                return zygote
        return engine_of(self.server)


async def bring_to(machine: Machine, function: Function, state: str) -> Begun:
    """Bring a function's replica into a state."""
    calls: list[asyncio.Task[Any]] = []

    def begin(work: Coroutine[Any, Any, object]) -> None:
        calls.append(asyncio.create_task(work, name="begun"))

    if state != "starting":
        await until(lambda: machine.node.standbys.has_ready(machine.backend), "a standby")
    if state == "standby":
        (runtime_id,) = machine.node.standbys.runtime_ids
        return begun_on(machine, runtime_id, calls)
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
    await until(lambda: states(function) == {STATE_OF.get(state, state)}, state)
    if state == "parking":
        server = machine.server_of(function)
        await until(lambda: engine_of(server).status() == psutil.STATUS_STOPPED, "a stop")
    if state == "starting":
        await until(lambda: has_zygote(machine, function), "a zygote")
    (runtime_id,) = function.runtime_ids
    found = begun_on(machine, runtime_id, calls)
    if state in ("loading", "waking"):
        await until(lambda: len(found.server.children(recursive=True)) == 2, "the engine's fork")
    assert states(function) == {STATE_OF.get(state, state)}
    return found


def begun_on(machine: Machine, runtime_id: str, calls: list[asyncio.Task[Any]]) -> Begun:
    server, writer = machine.server(runtime_id), machine.writer(runtime_id)
    return Begun(server=server, writer=writer, calls=calls)


def states(function: Function) -> set[str]:
    return {str(replica.state) for replica in function.set.replicas.values()}


def has_zygote(machine: Machine, function: Function) -> bool:
    try:
        return bool(function.runtime_ids and machine.server_of(function).children())
    except ValueError:
        return False


def engine_of(server: psutil.Process) -> psutil.Process:
    (found,) = [child for child in server.children(recursive=True) if child.name() == "engine"]
    return found


ANSWER, DONE = [2, 3, 4, 5], None
OUTCOMES: dict[str, list[Any]] = {
    "standby": [],
    "starting": [ANSWER],
    "loading": [ANSWER],
    "ready": [],
    "parking": [DONE],
    "parked": [],
    "waking": [ANSWER],
    "draining": [RuntimeDied, DONE],  # the drain timeout is shorter than the answer
}
"""What those hear whose calls have brought the replica into a state, whoever is killed then."""
STATE_OF = {"waking": ReplicaState.LOADING}
WITHOUT_ENGINE = ("standby", "starting")


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (state, name)
        for state in OUTCOMES
        for name in ("server", "writer", "zygote", "engine")
        if not (name == "engine" and state in WITHOUT_ENGINE)
    ],
)
async def test_killing_any_process_in_any_state_costs_at_most_an_answer_that_has_begun(
    machine: Machine, state: str, name: str
) -> None:
    async with machine.function("f", Script(load_s=0.5)) as function:
        begun = await bring_to(machine, function, state)
        tree, killed = begun.tree(), begun.victim(name)
        homes = [machine.home / "runtimes" / runtime_id for runtime_id in function.runtime_ids]
        killed.kill()
        await until(lambda: not is_alive(killed), "its death")
        for home in homes:
            (home / "hang").unlink(missing_ok=True)
        outcomes = await asyncio.gather(*begun.calls, return_exceptions=True)
        for outcome, expected in zip(outcomes, OUTCOMES[state], strict=True):
            assert outcome == expected or type(outcome) is expected
        assert await collect(function) == ANSWER
        (replica,) = function.set.replicas.values()
        assert replica.state is ReplicaState.READY
        assert dict(machine.node.memory.held(GPU)).keys() == {replica.id}
        if name == "writer":
            is_over = state == "draining"
            assert is_over or is_alive(begun.server), "a log is not worth a runtime"
        elif state != "standby":
            await until(
                lambda: (
                    function.tier is Tier.READY
                    and not any(is_alive(one) and process_name(one) == "engine" for one in tree)
                ),
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
        engine = engine_of(server)
        await function.park()
        await until(lambda: engine.status() == psutil.STATUS_STOPPED, "its suspension")
        (machine.home_of(function) / "resume").touch()
        assert await collect(function) == [2, 3, 4, 5]
        await until(lambda: not is_alive(engine), "the end of the engine that was lost")
        (replica,) = function.set.replicas.values()
        assert dict(machine.node.memory.held(GPU)).keys() == {replica.id}
        assert machine.server_of(function) != server


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
