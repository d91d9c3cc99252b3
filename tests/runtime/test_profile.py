"""What an engine process takes from its snapshot's profile, and what it tells for the next one."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from runtime.config import EngineConfig
from runtime.profile import EngineProfile
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRefused, RuntimeRpcError
from snapshots.profiles import (
    KernelFile,
    MemoryPlan,
    Profile,
    StepSize,
    kernel_files,
    write_profile,
)
from tests.fakes.engine import FakeRunner, Script
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


def test_a_profile_that_may_not_be_read_stops_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> Profile:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("runtime.profile.find_profile", forbidden)
    config = EngineConfig()
    profile = EngineProfile(tmp_path, config, FakeRunner(Script(), config))
    profile.apply()
    assert not profile.use.is_used
    assert "Permission denied" in profile.use.reason


def test_kernels_come_before_the_first_one_runs_and_are_bounded(tmp_path: Path) -> None:
    class RecordedKernels:
        num_compilations = 3

        def seed(self, files: Iterable[KernelFile], read: Callable[[KernelFile], bytes]) -> None:
            taken.extend(read(file) for file in files)

        def collect(self) -> dict[str, bytes]:
            return contents

    class CompilingRunner(FakeRunner):
        kernels = RecordedKernels()

        def prefer_steps(self, steps: Sequence[StepSize]) -> None:
            taken.extend(steps)

    taken: list[object] = []
    path = f"{'A' * 52}/k.cubin"
    contents = {path: b"machine code"}
    runner = CompilingRunner(Script(), EngineConfig())
    first = EngineProfile(tmp_path, EngineConfig(), runner)
    first.started(pb.Memory(), 0)
    assert first.use.num_compilations == 3
    learned = first.record(pb.ProfileRequest(with_kernels=True))
    assert {file.path: file.content for file in learned.kernels} == contents
    assert not first.record(pb.ProfileRequest()).kernels
    step = StepSize(num_tokens=4, num_tiles=0, count=1)
    memory = MemoryPlan(weights_bytes=0, kv_cache_bytes=0, num_kv_blocks=0, max_model_len=0)
    made = Profile(
        fingerprint=dict(learned.fingerprint),
        memory=memory,
        steps=(step,),
        kernels=kernel_files(contents),
    )
    write_profile(tmp_path, made, contents)
    EngineProfile(tmp_path, EngineConfig(), runner).apply()
    assert taken == [b"machine code", step]
    contents["../elsewhere.so"] = b""
    assert not first.record(pb.ProfileRequest(with_kernels=True)).kernels


async def test_a_caller_that_leaves_before_the_reply_does_the_engine_no_harm(
    server: Process,
) -> None:
    await server.load()
    engine = server.engine()
    engine.suspend()
    with pytest.raises(RuntimeRpcError):
        await server.client.profile(with_kernels=True, timeout_s=0.3)
    engine.resume()
    await recorded(server)  # which the engine answers after the one nobody waits for
    assert server.engine() == engine
    assert (await server.status()).state == pb.RUNTIME_STATE_READY
