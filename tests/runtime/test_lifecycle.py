import asyncio
import os
from pathlib import Path

import psutil
import pytest

from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRefused, RuntimeTimedOut, RuntimeUnavailable
from tests.fakes.engine import Script
from tests.runtime.conftest import ENDLESS, TIMEOUT_S, Launch, Process, submit

MIB = 1 << 20


def gate(home: Path) -> Path:
    path = home / "gate"
    os.mkfifo(path)
    return path


async def test_a_loaded_runtime_streams_tokens(server: Process) -> None:
    await server.load()
    attachment = await server.client.attach()
    sink = submit(attachment, 10, max_tokens=3)
    finished = await sink.end()
    assert sink.tokens == [11, 12, 13]
    assert finished == pb.Finished(
        sequence_id=sink.sequence_id,
        reason=pb.FINISH_REASON_LENGTH,
        num_prompt_tokens=1,
        num_output_tokens=3,
    )
    await attachment.close()


async def test_load_waits_for_a_zygote_that_still_imports(launch: Launch, home: Path) -> None:
    path = gate(home)
    server = launch(
        factory="tests.fakes.gated_engine:FakeEngineFactory", env={"TEST_GATE": str(path)}
    )
    await server.client.wait_reachable(TIMEOUT_S)
    assert (await server.status()).state == pb.RUNTIME_STATE_STARTING
    load = asyncio.create_task(server.load())
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_LOADING)
    assert not load.done()
    path.write_text("")
    await load
    assert (await server.status()).state == pb.RUNTIME_STATE_READY


async def test_the_imports_lead_to_standby(server: Process) -> None:
    status = await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    assert [phase.name for phase in status.phases] == ["runtime_import"]
    assert status.runtime_id == "test-1"
    assert status.build
    assert status.engine_pid == 0


async def test_a_load_reports_phases_memory_and_limits(server: Process) -> None:
    response = await server.load(Script(weights_bytes=8 * MIB, kv_cache_bytes=4 * MIB))
    names = "runtime_import fork open profile weights_map kv_alloc warm_up weights_read weights_verify build"
    assert [phase.name for phase in response.phases] == names.split()
    assert response.memory.weights_bytes == 8 * MIB
    assert response.memory.kv_cache_bytes == 4 * MIB
    assert response.max_model_len == Script().max_model_len
    assert response.num_kv_blocks == 64
    status = await server.status()
    assert status.state == pb.RUNTIME_STATE_READY
    assert status.snapshot == "fake@0123456789ab"
    assert status.memory.weights_bytes == 8 * MIB
    assert list(status.phases) == list(response.phases)
    assert status.max_model_len == response.max_model_len
    assert status.engine_pid == server.engine().pid


async def test_the_host_memory_of_all_its_processes_is_told_in_every_state(
    server: Process,
) -> None:
    standby = await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    assert standby.memory.host_rss_bytes > 5 * MIB
    await server.load(Script(weights_bytes=96 * MIB))
    told = (await server.status()).memory.host_rss_bytes
    runtime = psutil.Process(server.popen.pid)
    memories = [one.memory_info() for one in (runtime, *server.descendants())]
    assert told == pytest.approx(sum(one.rss - one.shared for one in memories), abs=5 * MIB)
    assert told > 100 * MIB


async def test_the_request_configures_the_engine(server: Process) -> None:
    request = pb.LoadRequest(
        snapshot=server.snapshot("fake"), engine=pb.EngineConfig(max_model_len=100)
    )
    response = await server.client.load(request, timeout_s=TIMEOUT_S)
    assert response.max_model_len == 100


async def test_parking_gives_memory_back_and_waking_takes_it_again(server: Process) -> None:
    await server.load(Script(weights_bytes=96 * MIB, kv_cache_bytes=32 * MIB))
    engine = server.engine()
    rss_awake, awake = engine.memory_info().rss, await server.status()
    parked = await server.client.park(timeout_s=TIMEOUT_S)
    assert parked.freed_bytes == 128 * MIB
    assert [phase.name for phase in parked.phases] == ["release"]
    assert parked.memory.weights_bytes == parked.memory.kv_cache_bytes == 0
    assert engine.memory_info().rss < rss_awake - 120 * MIB
    status = await server.status()
    assert status.state == pb.RUNTIME_STATE_PARKED
    assert status.memory.weights_bytes == 0
    assert status.memory.host_rss_bytes < awake.memory.host_rss_bytes - 120 * MIB

    woken = await server.client.wake([], timeout_s=TIMEOUT_S)
    assert [phase.name for phase in woken.phases] == [
        "weights_map", "kv_alloc", "warm_up", "weights_read", "weights_verify",
    ]  # fmt: skip
    assert woken.memory.weights_bytes == 96 * MIB
    assert server.engine() == engine
    attachment = await server.client.attach()
    sink = submit(attachment, 5)
    await sink.end()
    assert sink.tokens == [6, 7, 8]
    await attachment.close()


async def test_a_stream_lives_through_parking_and_waking(server: Process) -> None:
    await server.load()
    attachment = await server.client.attach()
    await server.client.park(timeout_s=TIMEOUT_S)
    refused = await submit(attachment, 5).end()
    assert refused.reason == pb.FINISH_REASON_ERROR
    assert "parked" in refused.error
    await server.client.wake([], timeout_s=TIMEOUT_S)
    assert (await submit(attachment, 5).end()).reason == pb.FINISH_REASON_LENGTH
    await attachment.close()


async def test_parking_is_refused_while_a_sequence_runs(server: Process) -> None:
    await server.load()
    attachment = await server.client.attach()
    sink = submit(attachment, 1, max_tokens=ENDLESS)
    await sink.until(lambda sink: len(sink.tokens) > 0)
    with pytest.raises(RuntimeRefused, match=r"FAILED_PRECONDITION: sequences are in flight"):
        await server.client.park(timeout_s=TIMEOUT_S)
    assert (await server.status()).state == pb.RUNTIME_STATE_READY
    attachment.cancel(sink.sequence_id)
    assert (await sink.end()).reason == pb.FINISH_REASON_CANCELLED
    await server.client.park(timeout_s=TIMEOUT_S)
    await attachment.close()


async def test_what_the_state_does_not_allow_is_refused(server: Process) -> None:
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    with pytest.raises(RuntimeRefused, match=r"cannot park: the runtime is STANDBY"):
        await server.client.park(timeout_s=TIMEOUT_S)
    with pytest.raises(RuntimeRefused, match=r"cannot wake: the runtime is STANDBY"):
        await server.client.wake([], timeout_s=TIMEOUT_S)
    with pytest.raises(RuntimeRefused, match=r"cannot drain: the runtime is STANDBY"):
        await server.client.drain(0.0)
    with pytest.raises(RuntimeRefused, match=r"cannot attach: the runtime is STANDBY"):
        await server.client.attach()
    await server.load()
    with pytest.raises(RuntimeRefused, match=r"cannot load: the runtime is READY"):
        await server.load(name="other")
    with pytest.raises(RuntimeRefused, match=r"cannot wake: the runtime is READY"):
        await server.client.wake([], timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("name", ["", "fake", "../fake@0123456789ab", "fake@0123456789ab/.."])
async def test_a_malformed_snapshot_reference_is_refused(server: Process, name: str) -> None:
    with pytest.raises(RuntimeRefused, match=r"INVALID_ARGUMENT: .*name@digest12"):
        await server.client.load(pb.LoadRequest(snapshot=name), timeout_s=TIMEOUT_S)


async def test_a_missing_snapshot_leaves_the_runtime_usable(server: Process) -> None:
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    with pytest.raises(RuntimeRefused, match=r"NOT_FOUND: .*no snapshot 'gone@0123456789ab'"):
        await server.client.load(pb.LoadRequest(snapshot="gone@0123456789ab"), timeout_s=TIMEOUT_S)
    assert (await server.status()).state == pb.RUNTIME_STATE_STANDBY
    await server.load()


async def test_a_failed_load_names_the_cause_and_another_may_follow(server: Process) -> None:
    with pytest.raises(RuntimeRefused, match=r"DATA_LOSS: chunk 3 is wrong"):
        await server.load(Script(load_error="chunk 3 is wrong"), name="damaged")
    status = await server.status()
    assert status.state == pb.RUNTIME_STATE_FAILED
    assert status.error == "chunk 3 is wrong"
    assert status.engine_pid == 0
    assert [p.name() for p in server.descendants()] == ["zygote"], "its memory is free"
    await server.load(name="sound")
    status = await server.status()
    assert (status.state, status.error) == (pb.RUNTIME_STATE_READY, "")


async def test_a_failed_wake_leaves_the_runtime_parked(server: Process) -> None:
    await server.load(Script(wake_error="no memory left"))
    await server.client.park(timeout_s=TIMEOUT_S)
    with pytest.raises(RuntimeRefused, match=r"RESOURCE_EXHAUSTED: .*no memory left"):
        await server.client.wake([], timeout_s=TIMEOUT_S)
    status = await server.status()
    assert status.state == pb.RUNTIME_STATE_PARKED
    assert status.memory.weights_bytes == 0


async def test_waking_on_other_devices_is_refused(server: Process) -> None:
    await server.load()
    await server.client.park(timeout_s=TIMEOUT_S)
    with pytest.raises(RuntimeRefused, match=r"bound to devices \[\], not \['GPU-1'\]"):
        await server.client.wake(["GPU-1"], timeout_s=TIMEOUT_S)


async def test_a_load_goes_on_when_its_caller_gives_up(server: Process) -> None:
    request = pb.LoadRequest(snapshot=server.snapshot("slow", Script(load_s=0.5)))
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    with pytest.raises(RuntimeTimedOut):
        await server.client.load(request, timeout_s=0.1)
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_READY)


async def test_draining_waits_for_running_sequences_and_refuses_new_ones(server: Process) -> None:
    await server.load()
    attachment = await server.client.attach()
    running = submit(attachment, 1, max_tokens=ENDLESS)
    await running.until(lambda sink: len(sink.tokens) > 0)
    drain = asyncio.create_task(server.client.drain(TIMEOUT_S))
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_DRAINING)
    late = await submit(attachment, 5).end()
    assert late.reason == pb.FINISH_REASON_ERROR
    assert "draining" in late.error
    assert not drain.done()
    attachment.cancel(running.sequence_id)
    assert (await drain).num_cancelled == 0
    assert (await server.status()).state == pb.RUNTIME_STATE_DRAINING
    await attachment.close()


async def test_draining_cancels_what_is_left_at_the_timeout(server: Process) -> None:
    await server.load()
    attachment = await server.client.attach()
    sinks = [submit(attachment, first, max_tokens=ENDLESS) for first in (1, 2)]
    for sink in sinks:
        await sink.until(lambda sink: len(sink.tokens) > 0)
    assert (await server.client.drain(0.0)).num_cancelled == 2
    for sink in sinks:
        assert (await sink.end()).reason == pb.FINISH_REASON_CANCELLED
    assert (await server.client.drain(0.0)).num_cancelled == 2, "a second drain joins the first"
    await attachment.close()


async def test_watch_pushes_changes_of_load(server: Process) -> None:
    await server.load()
    attachment = await server.client.attach()
    sink = submit(attachment, 1, max_tokens=ENDLESS)
    busy = await server.until(lambda status: status.load.num_running == 1)
    assert busy.last_active_unix_us == 0
    attachment.cancel(sink.sequence_id)
    idle = await server.until(lambda status: status.load.num_running == 0)
    assert idle.last_active_unix_us > 0
    await attachment.close()


async def test_watch_ends_as_unavailable_when_the_runtime_stops(server: Process) -> None:
    watch = asyncio.create_task(server.until(lambda _: False))
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    server.popen.terminate()
    with pytest.raises(RuntimeUnavailable):
        await watch


async def test_a_zygote_that_cannot_import_says_why(launch: Launch) -> None:
    server = launch(factory="tests.fakes.no_such_module:FakeEngineFactory")
    await server.client.wait_reachable(TIMEOUT_S)
    status = await server.until(lambda status: status.state == pb.RUNTIME_STATE_FAILED)
    assert "No module named 'tests.fakes.no_such_module'" in status.error
    with pytest.raises(RuntimeUnavailable, match="no_such_module"):
        await server.load()


async def test_a_zygote_with_threads_is_never_forked(launch: Launch) -> None:
    server = launch(factory="tests.fakes.threaded_engine:FakeEngineFactory")
    await server.client.wait_reachable(TIMEOUT_S)
    first = server.zygote()
    with pytest.raises(RuntimeUnavailable, match="the zygote has 2 threads"):
        await server.load()
    assert (await server.status()).state == pb.RUNTIME_STATE_FAILED
    assert not first.is_running(), "the next load gets another one"
    assert server.zygote().children() == []
