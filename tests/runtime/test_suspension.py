"""Deep parks of real processes; the driver's work is played by signals that stop and continue."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from runtime import suspension as suspension_module
from runtime.memory.checkpoint import KEPT_BYTES, CheckpointFailed
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeUnavailable
from runtime.suspension import Checkpoints, Suspension
from tests.runtime.conftest import TIMEOUT_S, Launch, Process, submit

GPU = "GPU-0"


@pytest.fixture
async def server(launch: Launch, home: Path) -> Process:
    """A runtime whose engines are suspended by signals."""
    path = "tests.fakes.checkpoints:StoppingCheckpoints"
    process = launch(env={"COLDSPARK_RUNTIME_CHECKPOINTS": path, "HOME": str(home)})
    await process.client.wait_reachable(TIMEOUT_S)
    return process


async def load(
    server: Process, name: str = "fake", *, gpus: tuple[str, ...] = (GPU,)
) -> psutil.Process:
    request = pb.LoadRequest(snapshot=server.snapshot(name), device_uuids=gpus)
    await server.client.load(request, timeout_s=TIMEOUT_S)
    return server.engine()


async def until_stopped(engine: psutil.Process, *, is_stopped: bool = True) -> None:
    """Wait for the signal to be taken."""
    for _ in range(200):
        if (engine.status() == psutil.STATUS_STOPPED) is is_stopped:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it runs on" if is_stopped else "it is stopped")


async def answers(server: Process) -> bool:
    attachment = await server.client.attach()
    finished = await submit(attachment, 5).end()
    await attachment.close()
    return finished.num_output_tokens == 3


async def test_a_parked_engine_is_off_its_gpu_and_comes_back(server: Process) -> None:
    engine = await load(server)
    parked = await server.client.park(timeout_s=TIMEOUT_S)
    assert [phase.name for phase in parked.phases] == ["release", "checkpoint"]
    await until_stopped(engine)
    assert (parked.memory.kept_bytes, parked.memory.kept_reason) == (KEPT_BYTES, "")
    status = await server.status()
    assert status.state == pb.RUNTIME_STATE_PARKED
    assert status.memory.kept_bytes == KEPT_BYTES
    woken = await server.client.wake([GPU], timeout_s=TIMEOUT_S)
    assert woken.phases[0] == pb.Phase(name="restore", seconds=0.125)
    assert await answers(server)
    assert server.engine() == engine
    assert (await server.status()).memory.kept_bytes == 0


async def test_what_is_released_is_told_before_the_rest_is_suspended(
    server: Process, home: Path
) -> None:
    engine = await load(server)
    assert (await server.status()).memory.weights_bytes
    (home / "hang").touch()
    park = asyncio.create_task(server.client.park(timeout_s=TIMEOUT_S))
    await until_stopped(engine)
    status = await server.status()
    assert status.state == pb.RUNTIME_STATE_PARKING
    assert (status.memory.weights_bytes, status.memory.kv_cache_bytes) == (0, 0)
    (home / "hang").unlink()
    await park


async def test_no_signs_of_life_are_expected_of_a_suspended_engine(server: Process) -> None:
    await load(server)
    await server.client.park(timeout_s=TIMEOUT_S)
    await asyncio.sleep(2.0)
    assert (await server.status()).heartbeat_age_s == 0.0
    await server.client.wake([GPU], timeout_s=TIMEOUT_S)
    await server.until(lambda status: 0.0 < status.heartbeat_age_s < 2.0)
    server.engine().suspend()
    await server.until(lambda status: status.heartbeat_age_s > 2.0)
    server.engine().resume()


async def test_a_light_park_leaves_the_engine_where_it_is(server: Process) -> None:
    engine = await load(server)
    await server.client.park(timeout_s=TIMEOUT_S, mode=pb.PARK_MODE_LIGHT)
    assert engine.status() != psutil.STATUS_STOPPED
    await server.client.wake([GPU], timeout_s=TIMEOUT_S)
    assert await answers(server)


async def test_an_engine_on_the_cpu_has_nothing_to_suspend(server: Process) -> None:
    engine = await load(server, gpus=())
    await server.client.park(timeout_s=TIMEOUT_S)
    assert engine.status() != psutil.STATUS_STOPPED


async def test_where_it_is_refused_the_light_park_stays_and_says_why(
    server: Process, home: Path
) -> None:
    (home / "suspend").touch()
    await load(server)
    parked = await server.client.park(timeout_s=TIMEOUT_S)
    assert "parked no deeper because told to refuse suspend" in parked.memory.kept_reason
    await server.client.wake([GPU], timeout_s=TIMEOUT_S)
    assert await answers(server)


async def test_an_engine_that_does_not_come_back_is_killed_and_another_can_be_loaded(
    server: Process, home: Path
) -> None:
    engine = await load(server)
    await server.client.park(timeout_s=TIMEOUT_S)
    (home / "resume").touch()
    with pytest.raises(RuntimeUnavailable, match="it cannot be woken: told to refuse resume"):
        await server.client.wake([GPU], timeout_s=TIMEOUT_S)
    assert not engine.is_running()
    status = await server.status()
    assert (status.state, status.engine_pid) == (pb.RUNTIME_STATE_FAILED, 0)
    await server.load(name="other")
    assert await answers(server)


@pytest.mark.parametrize("name", ["engine", "zygote"])
async def test_a_suspended_engine_can_die(server: Process, name: str) -> None:
    engine = await load(server)
    await server.client.park(timeout_s=TIMEOUT_S)
    (engine if name == "engine" else server.zygote()).kill()
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_FAILED)
    assert not engine.is_running()
    await server.client.unload(timeout_s=TIMEOUT_S)
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    await load(server, "other")
    assert (await server.client.park(timeout_s=TIMEOUT_S)).memory.kept_bytes == KEPT_BYTES


async def test_an_engine_that_dies_while_it_is_suspended_leaves_nothing_to_the_next(
    server: Process, home: Path
) -> None:
    engine = await load(server)
    (home / "hang").touch()
    park = asyncio.create_task(server.client.park(timeout_s=TIMEOUT_S))
    await until_stopped(engine)
    engine.kill()
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_FAILED)
    (home / "hang").unlink()
    with pytest.raises(RuntimeUnavailable, match="died while it was parked"):
        await park
    await load(server, "other")
    await server.client.park(timeout_s=TIMEOUT_S, mode=pb.PARK_MODE_LIGHT)
    assert (await server.status()).memory.kept_bytes == 0
    woken = await server.client.wake([GPU], timeout_s=TIMEOUT_S)
    assert "restore" not in [phase.name for phase in woken.phases]
    assert await answers(server)


async def test_an_engine_that_dies_while_it_is_resumed_is_not_waited_for(
    server: Process, home: Path
) -> None:
    engine = await load(server)
    await server.client.park(timeout_s=TIMEOUT_S)
    await until_stopped(engine)
    (home / "hang").touch()
    wake = asyncio.create_task(server.client.wake([GPU], timeout_s=TIMEOUT_S))
    await until_stopped(engine, is_stopped=False)
    engine.kill()
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_FAILED)
    (home / "hang").unlink()
    with pytest.raises(RuntimeUnavailable, match="the engine process ended"):
        await wake


async def test_a_driver_that_hangs_keeps_no_runtime_from_ending(
    server: Process, home: Path
) -> None:
    engine = await load(server)
    (home / "hang").touch()
    park = asyncio.create_task(server.client.park(timeout_s=TIMEOUT_S))
    await until_stopped(engine)
    server.popen.send_signal(signal.SIGTERM)
    assert await server.exited() == 0, "well before the driver's time is over"
    with pytest.raises(RuntimeUnavailable):
        await park


async def test_a_suspended_engine_goes_with_its_server(server: Process) -> None:
    engine = await load(server)
    await server.client.park(timeout_s=TIMEOUT_S)
    os.kill(server.popen.pid, signal.SIGKILL)
    await server.exited()
    for _ in range(200):
        if not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("a stopped engine has outlived its server")


async def test_a_suspended_engine_is_unloaded(server: Process) -> None:
    engine = await load(server)
    await server.client.park(timeout_s=TIMEOUT_S)
    await server.client.unload(timeout_s=TIMEOUT_S)
    assert not engine.is_running()
    assert (await server.status()).state == pb.RUNTIME_STATE_STANDBY


async def test_a_driver_that_is_not_there_is_looked_for_once() -> None:
    looked = 0

    def none() -> Checkpoints:
        nonlocal looked
        looked += 1
        raise CheckpointFailed("there is no CUDA driver")

    suspension = Suspension(none)
    for _ in range(2):
        with pytest.raises(CheckpointFailed, match="no CUDA driver"):
            await suspension.suspend(1)
    assert looked == 1
    suspension.close()


async def test_a_call_that_hangs_is_fatal_and_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_end = threading.Event()

    class Hanging:
        def suspend(self, pid: int) -> list[pb.Phase]:
            if pid == 1:
                may_end.wait()
            return []

        def resume(self, pid: int) -> list[pb.Phase]:
            raise ValueError(f"a defect, at {pid}")

    monkeypatch.setattr(suspension_module, "TIMEOUT_S", 0.05)
    suspension = Suspension(Hanging)
    with pytest.raises(CheckpointFailed, match="did not answer within") as raised:
        await suspension.suspend(1)
    assert raised.value.is_fatal
    assert await suspension.suspend(2) == []
    with pytest.raises(CheckpointFailed, match="a defect, at 2") as raised:
        await suspension.resume(2)
    assert raised.value.is_fatal
    may_end.set()
    suspension.close()
