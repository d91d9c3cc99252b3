"""What replicas learn is kept beside their snapshot, and nobody waits for it."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from controller.errors import Conflict
from controller.scaling.function import Function
from runtime.rpc import inference_pb2 as pb
from snapshots.profiles import (
    MemoryPlan,
    Profile,
    StepSize,
    find_profile,
    kernel_files,
    read_kernel,
    read_profiles,
    write_profile,
)
from tests.fakes.runtime import FakeRuntime
from tests.fakes.world import SNAPSHOT, World, collect, deployment, spec_of

pytestmark = pytest.mark.looptime

HERE = {"device": "a processor"}
KERNELS = {f"{'A' * 52}/k.cubin": b"machine code", f"{'A' * 52}/k.json": b"{}"}
UNUSED = pb.ProfileUse(key="0123456789abcdef", reason="no profile has been recorded yet")


def learned(**sizes: int) -> pb.ProfileResponse:
    return pb.ProfileResponse(
        fingerprint=HERE,
        num_kv_blocks=64,
        steps=[pb.StepSize(num_tokens=int(n[1:]), count=count) for n, count in sizes.items()],
        kernels=[pb.KernelFile(path=path, content=content) for path, content in KERNELS.items()],
    )


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / SNAPSHOT
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    return path


@pytest.fixture
async def world(snapshot: Path) -> World:
    world = World(make_runtime=lambda: FakeRuntime(profile=UNUSED, learned=learned(s4=7)))
    world.node = replace(world.node, snapshot_store=snapshot.parent)
    return world


@pytest.fixture
async def function(world: World) -> AsyncIterator[Function]:
    async with world.function(spec_of(scaling={"idle_timeout": "5s"})) as function:
        yield function


async def written(snapshot: Path, *, num_calls: int, runtime: FakeRuntime) -> Profile:
    """Return the profile once the runtime was asked so often and a thread has written it."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        num_asked = sum(call.startswith("profile") for call in runtime.calls)
        if num_asked >= num_calls and (found := read_profiles(snapshot)):
            return found[0]
    raise AssertionError(f"not recorded after {runtime.calls}")


async def test_the_first_run_records_a_profile(
    function: Function, world: World, snapshot: Path
) -> None:
    await collect(function)
    assert not read_profiles(snapshot)  # nobody has waited for it
    profile = await written(snapshot, num_calls=1, runtime=world.runtime)
    assert profile == find_profile(snapshot, HERE)
    assert profile.memory.num_kv_blocks == 64
    assert profile.steps == (StepSize(num_tokens=4, num_tiles=0, count=7),)
    assert {file.path: read_kernel(snapshot, profile, file) for file in profile.kernels} == KERNELS
    assert profile.cold_starts["stopped"].count == 1
    assert "load" in world.runtime.calls
    assert "read" in profile.cold_starts["stopped"].phases
    assert "queue" not in profile.cold_starts["stopped"].phases


async def test_parking_brings_figures_up_to_date(
    function: Function, world: World, snapshot: Path
) -> None:
    await collect(function)
    await written(snapshot, num_calls=1, runtime=world.runtime)
    world.runtime.learned = learned(s8=9)
    await function.park()
    await collect(function)
    await function.park()
    profile = await written(snapshot, num_calls=3, runtime=world.runtime)
    assert world.runtime.calls.count("profile with kernels") == 1
    while len(profile.cold_starts) < 2:
        profile = await written(snapshot, num_calls=3, runtime=world.runtime)
    assert [step.num_tokens for step in profile.steps] == [8, 4]
    assert len(profile.kernels) == len(KERNELS)
    assert read_kernel(snapshot, profile, profile.kernels[0])


@pytest.mark.parametrize(
    ("use", "is_asked"),
    [
        (pb.ProfileUse(key=UNUSED.key, is_used=True), False),
        (pb.ProfileUse(key=UNUSED.key, is_used=True, num_compilations=1), True),
        (pb.ProfileUse(), False),  # of a version that knows no profiles
    ],
)
async def test_a_start_that_lacked_nothing_is_not_recorded(
    use: pb.ProfileUse, is_asked: bool, function: Function, world: World
) -> None:
    world.make_runtime = lambda: FakeRuntime(profile=use, learned=learned())
    await collect(function)
    await asyncio.sleep(3.0)
    assert ("profile with kernels" in world.runtime.calls) is is_asked


async def test_a_busy_replica_is_not_disturbed(function: Function, world: World) -> None:
    world.make_runtime = lambda: FakeRuntime(profile=UNUSED, learned=learned(), step_s=0.5)
    await collect(function, max_tokens=1)
    await asyncio.sleep(0.6)
    running = asyncio.create_task(collect(function, max_tokens=20))
    await asyncio.sleep(4.0)
    assert not any("profile" in call for call in world.runtime.calls)
    await running


@pytest.mark.parametrize(
    "response",
    [
        pb.ProfileResponse(fingerprint={"x": "y" * 2000}),
        pb.ProfileResponse(kernels=[pb.KernelFile(path="../../../etc/x.so", content=b"")]),
        pb.ProfileResponse(kernels=[pb.KernelFile(path=f"{'A' * 52}/__grp__k.json")]),
    ],
)
async def test_what_a_runtime_should_not_say_is_not_written(
    response: pb.ProfileResponse, function: Function, world: World, snapshot: Path
) -> None:
    world.make_runtime = lambda: FakeRuntime(profile=UNUSED, learned=response)
    await collect(function)
    with pytest.raises(Conflict, match="could not be profiled"):
        await function.profiles.record()
    assert os.listdir(snapshot) == ["manifest.json"]  # noqa: PTH208  # in a test, it may block
    assert await collect(function)  # and it serves on


async def test_without_a_replica_there_is_nothing_to_record(function: Function) -> None:
    with pytest.raises(Conflict, match="no replica to learn from"):
        await function.profiles.record()


async def test_a_snapshot_that_is_gone_is_a_reason(function: Function, snapshot: Path) -> None:
    await collect(function)
    (snapshot / "manifest.json").unlink()
    with pytest.raises(Conflict, match="no snapshot"):
        await function.profiles.record()


async def test_recording_again_keeps_the_times_of_other_tiers(
    function: Function, snapshot: Path
) -> None:
    memory = MemoryPlan(weights_bytes=0, kv_cache_bytes=0, num_kv_blocks=0, max_model_len=0)
    await collect(function)
    first = await function.profiles.record()
    times = first.cold_starts["stopped"]
    older = Profile(
        fingerprint=HERE,
        memory=memory,
        kernels=kernel_files({}),
        cold_starts={"parked": times, "stopped": replace(times, total_s=99.0)},
    )
    write_profile(snapshot, older, {})
    profile = await function.profiles.record()
    assert profile.cold_starts == {"parked": times, "stopped": times}


async def test_the_profile_says_what_a_reload_costs_until_one_was_seen(world: World) -> None:
    known = replace(deployment(spec_of()), reload_s={"parked": 0.25, "stopped": 30.0})
    async with world.function() as function:
        assert function.books.reload_s("stopped") == 6.0  # a guess
        function.deployment = known
        assert function.books.reload_s("stopped") == 30.0
        assert function.books.eta_s("stopped", 10.0) == 20.0
        await collect(function)
        assert function.books.reload_s("stopped") < 2.0  # seen
        assert function.books.reload_s("parked") == 0.25
