"""Unload: the engine ends, the runtime stays and can load again."""

import asyncio

import pytest

from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRefused
from tests.fakes.engine import Script
from tests.runtime.conftest import TIMEOUT_S, Process, submit

ENDLESS = 1_000_000
OWNER = pb.Owner(replica_id="chat-1", function="chat", revision="0123456789ab")


async def load_for(server: Process, owner: pb.Owner, name: str = "fake") -> None:
    request = pb.LoadRequest(
        snapshot=server.snapshot(name), owner=owner, device_uuids=["GPU-0", "GPU-1"]
    )
    await server.client.load(request, timeout_s=TIMEOUT_S)


async def test_an_unloaded_runtime_is_in_standby_and_keeps_nothing_of_the_engine(
    server: Process,
) -> None:
    await load_for(server, OWNER)
    engine = server.engine()
    loaded = await server.status()
    assert (loaded.owner, list(loaded.device_uuids)) == (OWNER, ["GPU-0", "GPU-1"])
    await server.client.unload(timeout_s=TIMEOUT_S)
    assert not engine.is_running(), "its memory must be free when the call returns"
    status = await server.status()
    assert status.state == pb.RUNTIME_STATE_STANDBY
    assert not status.HasField("owner")
    assert (status.snapshot, list(status.device_uuids), status.engine_pid) == ("", [], 0)
    assert status.memory.weights_bytes == 0


async def test_an_unloaded_runtime_loads_another_snapshot_from_the_same_zygote(
    server: Process,
) -> None:
    await server.load()
    zygote = server.zygote()
    await server.client.unload(timeout_s=TIMEOUT_S)
    await load_for(server, OWNER, name="other")
    status = await server.status()
    assert (status.state, status.snapshot) == (pb.RUNTIME_STATE_READY, "other@0123456789ab")
    assert server.zygote() == zygote


async def test_a_parked_engine_is_unloaded_too(server: Process) -> None:
    await server.load()
    await server.client.park(timeout_s=TIMEOUT_S)
    await server.client.unload(timeout_s=TIMEOUT_S)
    assert (await server.status()).state == pb.RUNTIME_STATE_STANDBY


async def test_unloading_ends_running_sequences_with_an_error(server: Process) -> None:
    await server.load()
    attachment = await server.client.attach()
    running = submit(attachment, 1, max_tokens=ENDLESS)
    await running.until(lambda sink: len(sink.tokens) > 0)
    await server.client.unload(timeout_s=TIMEOUT_S)
    await running.until(lambda sink: sink.error is not None)
    assert "the engine was unloaded" in str(running.error)
    await attachment.close()


async def test_a_runtime_that_failed_to_load_is_cleared_by_unloading(server: Process) -> None:
    with pytest.raises(RuntimeRefused):
        await server.load(Script(load_error="chunk 3 is wrong"), name="damaged")
    await server.client.unload(timeout_s=TIMEOUT_S)
    status = await server.status()
    assert (status.state, status.error) == (pb.RUNTIME_STATE_STANDBY, "")


async def test_what_is_not_loaded_or_still_loads_cannot_be_unloaded(server: Process) -> None:
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    with pytest.raises(RuntimeRefused, match=r"cannot unload: the runtime is STANDBY"):
        await server.client.unload(timeout_s=TIMEOUT_S)
    loading = asyncio.create_task(server.load(Script(load_s=0.5)))
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_LOADING)
    with pytest.raises(RuntimeRefused, match=r"cannot unload: the runtime is LOADING"):
        await server.client.unload(timeout_s=TIMEOUT_S)
    await loading


async def test_unloading_without_a_zygote_starts_another_one(server: Process) -> None:
    await server.load()
    zygote = server.zygote()
    zygote.kill()
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_FAILED)
    await server.client.unload(timeout_s=TIMEOUT_S)
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    assert server.zygote() != zygote
