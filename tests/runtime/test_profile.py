"""What an engine process takes from its snapshot's profile, and what it tells for the next one."""

from pathlib import Path

import pytest

from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRefused
from snapshots.profiles import MemoryPlan, Profile, write_profile
from tests.runtime.conftest import TIMEOUT_S, Process


async def recorded(server: Process) -> pb.ProfileResponse:
    return await server.client.profile(with_kernels=True, timeout_s=TIMEOUT_S)


def write(snapshot: Path, response: pb.ProfileResponse) -> str:
    memory = MemoryPlan(weights_bytes=0, kv_cache_bytes=0, num_kv_blocks=0, max_model_len=0)
    profile = Profile(fingerprint=dict(response.fingerprint), memory=memory)
    write_profile(snapshot, profile)
    return profile.key


async def again(server: Process, *, max_num_seqs: int = 0) -> pb.ProfileUse:
    """Load the same snapshot again, and return what became of its profile."""
    await server.client.unload(timeout_s=TIMEOUT_S)
    engine = pb.EngineConfig(max_num_seqs=max_num_seqs, enable_prefix_caching=True)
    request = pb.LoadRequest(snapshot="fake@0123456789ab", engine=engine)
    return (await server.client.load(request, timeout_s=TIMEOUT_S)).profile


async def test_a_first_start_has_no_profile_and_tells_what_would_be_in_one(
    server: Process,
) -> None:
    loaded = await server.load()
    assert not loaded.profile.is_used
    assert loaded.profile.reason == "no profile has been recorded yet"
    assert (await server.status()).profile == loaded.profile
    response = await recorded(server)
    assert response.fingerprint["device"] == "pretended"
    assert response.fingerprint["engine.max_num_seqs"] == "256"
    assert response.weights_bytes == loaded.memory.weights_bytes
    assert response.num_kv_blocks == loaded.num_kv_blocks
    await server.client.park(timeout_s=TIMEOUT_S)
    assert await recorded(server) == response  # of what it held when it was loaded


async def test_the_next_start_uses_the_profile(server: Process) -> None:
    await server.load()
    snapshot = server.home / "store" / "fake@0123456789ab"
    key = write(snapshot, await recorded(server))
    use = await again(server)
    assert use == pb.ProfileUse(key=key, is_used=True)
    other = await again(server, max_num_seqs=8)
    assert not other.is_used
    assert other.reason == "the profile is of engine.max_num_seqs '256', here '8'"
    (snapshot / "profiles" / key / "profile.json").write_text("{")
    assert "the profile is damaged" in (await again(server)).reason


async def test_without_an_engine_there_is_nothing_to_profile(server: Process) -> None:
    await server.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    with pytest.raises(RuntimeRefused, match="nothing to profile"):
        await recorded(server)
