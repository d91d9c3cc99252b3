import asyncio
import signal
from contextlib import aclosing

import psutil
import pytest

from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeUnavailable
from runtime.status_board import REPEAT_S
from tests.fakes.engine import CRASHING_TOKEN, Script
from tests.runtime.conftest import ENDLESS, TIMEOUT_S, Launch, Process, num_fds, submit


async def gone(processes: list[psutil.Process]) -> None:
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, TIMEOUT_S)
    assert alive == []


async def test_a_killed_engine_breaks_its_streams_and_another_may_follow(server: Process) -> None:
    await server.load(name="first")
    attachment = await server.client.attach()
    sink = submit(attachment, 1, max_tokens=ENDLESS)
    await sink.until(lambda sink: len(sink.tokens) > 0)
    engine = server.engine()
    await server.until(lambda status: status.load.num_running == 1)
    engine.kill()
    error = await sink.breakage()
    assert isinstance(error, RuntimeUnavailable)
    assert "killed by SIGKILL" in str(error)
    status = await server.status()
    assert status.state == pb.RUNTIME_STATE_FAILED
    assert "killed by SIGKILL" in status.error
    assert '"event": "loaded"' in status.error, "the end of its log is part of the error"
    assert status.engine_pid == 0
    assert status.load.num_running == 0
    assert status.memory.weights_bytes == 0
    assert status.last_active_unix_us > 0, "what was running ended with the engine"

    await server.load(name="second")
    assert server.engine() != engine
    attachment = await server.client.attach()
    assert (await submit(attachment, 1).end()).reason == pb.FINISH_REASON_LENGTH


async def test_an_engine_that_crashes_leaves_its_traceback(server: Process) -> None:
    await server.load()
    attachment = await server.client.attach()
    error = await submit(attachment, CRASHING_TOKEN).breakage()
    assert "exit code 1" in str(error)
    assert "RuntimeError: the script says: crash" in str(error)


async def test_a_segmentation_fault_names_its_signal(server: Process) -> None:
    await server.load()
    server.engine().send_signal(signal.SIGSEGV)
    status = await server.until(lambda status: status.state == pb.RUNTIME_STATE_FAILED)
    assert "killed by SIGSEGV" in status.error
    assert "Fatal Python error: Segmentation fault" in status.error


async def test_an_engine_that_exits_while_loading_fails_the_load(server: Process) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"(?s)exit code 3.*the script says: die"):
        await server.load(Script(exit_code=3))
    assert (await server.status()).state == pb.RUNTIME_STATE_FAILED


async def test_an_engine_killed_while_waking_fails_the_wake(server: Process) -> None:
    await server.load(Script(load_s=0.3))
    await server.client.park(timeout_s=TIMEOUT_S)
    wake = asyncio.create_task(server.client.wake([], timeout_s=TIMEOUT_S))
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_LOADING)
    server.engine().kill()
    with pytest.raises(RuntimeUnavailable, match="SIGKILL"):
        await wake
    assert (await server.status()).state == pb.RUNTIME_STATE_FAILED


async def test_a_hung_engine_shows_in_the_age_of_its_heartbeat(server: Process) -> None:
    await server.load()
    assert (await server.status()).heartbeat_age_s < TIMEOUT_S
    server.engine().suspend()
    status = await server.until(lambda status: status.heartbeat_age_s > 2.0)
    assert status.state == pb.RUNTIME_STATE_READY
    server.engine().resume()
    await server.until(lambda status: status.heartbeat_age_s < 2.0)


async def test_an_idle_engine_goes_on_reporting(server: Process) -> None:
    await server.load()
    async with aclosing(server.client.watch()) as statuses:
        reports = [await anext(statuses) for _ in range(4)]
    ages = [status.heartbeat_age_s for status in reports[1:]]
    assert max(ages) < REPEAT_S, "each was pushed by a report, not by the server's patience"


async def test_a_killed_zygote_takes_its_engine_along_and_is_replaced(server: Process) -> None:
    await server.load(name="first")
    attachment = await server.client.attach()
    sink = submit(attachment, 1, max_tokens=ENDLESS)
    await sink.until(lambda sink: len(sink.tokens) > 0)
    old = server.descendants()
    server.zygote().kill()
    assert isinstance(await sink.breakage(), RuntimeUnavailable)
    await gone(old)
    status = await server.until(lambda status: status.state == pb.RUNTIME_STATE_FAILED)
    assert "killed by SIGKILL" in status.error
    await server.load(name="second")
    assert (await server.status()).state == pb.RUNTIME_STATE_READY


async def test_a_zygote_killed_in_standby_is_replaced(server: Process) -> None:
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    zygote = server.zygote()
    zygote.kill()
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STARTING)
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    assert server.zygote() != zygote


async def test_a_killed_server_leaves_no_process_behind(server: Process) -> None:
    await server.load()
    attachment = await server.client.attach()
    sink = submit(attachment, 1, max_tokens=ENDLESS)
    await sink.until(lambda sink: len(sink.tokens) > 0)
    descendants = server.descendants()
    assert sorted(p.name() for p in descendants) == ["engine", "zygote"]
    server.popen.kill()
    assert isinstance(await sink.breakage(), RuntimeUnavailable)
    await gone(descendants)


async def test_a_stopped_server_closes_its_streams_and_its_children(server: Process) -> None:
    await server.load()
    attachment = await server.client.attach()
    sink = submit(attachment, 1, max_tokens=ENDLESS)
    await sink.until(lambda sink: len(sink.tokens) > 0)
    descendants = server.descendants()
    server.popen.terminate()
    error = await sink.breakage()
    # Its message says why, unless the connection is gone before that is read.
    assert isinstance(error, RuntimeUnavailable)
    assert await server.exited() == 0
    assert not server.socket.exists()
    await gone(descendants)
    assert "Traceback" not in server.log


async def test_a_server_stops_although_its_engine_hangs(server: Process) -> None:
    await server.load()
    descendants = server.descendants()
    server.engine().suspend()
    server.popen.terminate()
    assert await server.exited() == 0
    await gone(descendants)


async def test_a_server_stops_while_a_load_waits_for_the_zygote(
    launch: Launch, server: Process
) -> None:
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    load = asyncio.create_task(server.load(Script(load_s=TIMEOUT_S)))
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_LOADING)
    server.popen.terminate()
    with pytest.raises(RuntimeUnavailable):
        await load
    assert await server.exited() == 0


async def test_signals_that_follow_the_first_do_not_cut_the_end_short(server: Process) -> None:
    await server.load()
    while server.popen.poll() is None:
        server.popen.terminate()
        await asyncio.sleep(0.001)
    assert server.popen.returncode == 0
    assert not server.socket.exists()


async def test_signals_meant_for_the_server_do_not_end_its_children(server: Process) -> None:
    await server.load()
    for process in server.descendants():
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
    attachment = await server.client.attach()
    assert (await submit(attachment, 1).end()).reason == pb.FINISH_REASON_LENGTH


@pytest.mark.timeout(180)
async def test_fifty_engines_and_streams_leave_no_descriptor_or_process(server: Process) -> None:
    counts = []
    for number in range(50):
        await server.load(name=f"snapshot-{number}")
        attachment = await server.client.attach()
        assert (await submit(attachment, 1).end()).reason == pb.FINISH_REASON_LENGTH
        await attachment.close()
        server.engine().kill()
        await server.until(lambda status: status.state == pb.RUNTIME_STATE_FAILED)
        assert [p.name() for p in server.descendants()] == ["zygote"]
        counts.append((num_fds(server.popen.pid), num_fds(server.zygote().pid)))
    assert counts[-1] == counts[5], counts
