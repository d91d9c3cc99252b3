"""What every backend promises, over each of them: see controller/backends/base.py."""

import asyncio

import pytest

from controller.backends.base import (
    BackendError,
    RuntimeInfo,
    RuntimeNotFound,
    RuntimePhase,
)
from tests.contracts.harnesses import Harness, lines_of, spec

SOON_S = 20.0


async def test_a_created_runtime_runs_under_its_labels(harness: Harness) -> None:
    info = await harness.backend.create(spec("r-1"))
    assert info == RuntimeInfo(
        runtime_id="r-1",
        function="smollm2",
        revision="abc123",
        epoch=7,
        phase=RuntimePhase.RUNNING,
        endpoint=info.endpoint,
    )
    await harness.incarnation(info)
    assert await harness.backend.inspect("r-1") == info
    assert await harness.backend.list() == [info]


async def test_creating_twice_returns_the_first(harness: Harness) -> None:
    first = await harness.backend.create(spec())
    incarnation = await harness.incarnation(first)
    assert await harness.backend.create(spec()) == first
    assert await harness.incarnation(first) == incarnation


async def test_creating_at_once_starts_one(harness: Harness) -> None:
    infos = await asyncio.gather(*(harness.backend.create(spec()) for _ in range(4)))
    assert len(set(infos)) == 1
    assert await harness.backend.list() == infos[:1]


async def test_creating_after_an_exit_returns_the_exited(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    exits = harness.backend.watch()
    await harness.exit(info, 3)
    async with asyncio.timeout(SOON_S):
        exited = await anext(exits)
    assert await harness.backend.create(spec()) == exited


@pytest.mark.parametrize("runtime_id", ["", "../up", "a/b", "Upper", "-r", "r" * 64, "r\n"])
async def test_a_malformed_id_is_refused(harness: Harness, runtime_id: str) -> None:
    with pytest.raises(BackendError, match="is no runtime id"):
        await harness.backend.create(spec(runtime_id))
    assert await harness.backend.list() == []


async def test_what_was_never_created_is_not_found(harness: Harness) -> None:
    with pytest.raises(RuntimeNotFound):
        await harness.backend.inspect("r-1")
    with pytest.raises(RuntimeNotFound):
        await lines_of(harness.backend.logs("r-1"))


async def test_deleting_what_does_not_exist_is_no_error(harness: Harness) -> None:
    await harness.backend.delete("r-1")


async def test_runtimes_are_listed_by_id(harness: Harness) -> None:
    for runtime_id in ("r-2", "r-10", "r-1"):
        await harness.backend.create(spec(runtime_id))
    assert [info.runtime_id for info in await harness.backend.list()] == ["r-1", "r-10", "r-2"]


async def test_an_exit_is_told_to_every_watcher(harness: Harness) -> None:
    watchers = [harness.backend.watch() for _ in range(2)]
    info = await harness.backend.create(spec())
    other = await harness.backend.create(spec("r-2"))
    await harness.exit(info, 3)
    async with asyncio.timeout(SOON_S):
        told = [await anext(watcher) for watcher in watchers]
    assert [(exit.runtime_id, exit.phase, exit.exit_code) for exit in told] == [
        ("r-1", RuntimePhase.EXITED, 3)
    ] * 2
    assert await harness.backend.inspect("r-1") == told[0]
    assert await harness.backend.list() == [told[0], other]


async def test_a_deleted_runtime_is_forgotten(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    incarnation = await harness.incarnation(info)
    await harness.backend.delete("r-1")
    assert await harness.backend.list() == []
    with pytest.raises(RuntimeNotFound):
        await harness.backend.inspect("r-1")
    again = await harness.backend.create(spec())
    assert again == info
    assert await harness.incarnation(again) != incarnation


async def test_an_exited_runtime_can_be_deleted(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    exits = harness.backend.watch()
    await harness.exit(info, 0)
    async with asyncio.timeout(SOON_S):
        await anext(exits)
    await harness.backend.delete("r-1")
    assert await harness.backend.list() == []


async def test_a_runtime_that_will_not_leave_is_killed(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    await harness.ignore_sigterm(info)
    async with asyncio.timeout(SOON_S):
        await harness.backend.delete("r-1", grace_s=0.2)
    assert await harness.backend.list() == []


async def test_descendants_go_with_their_runtime(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    end = await harness.hold(info)
    await harness.incarnation(info)
    assert not end.done()
    await harness.backend.delete("r-1")
    async with asyncio.timeout(SOON_S):
        await end


async def test_a_cancelled_creation_can_be_deleted(harness: Harness) -> None:
    for delay in (0, 1, 2, 5):
        creation = asyncio.create_task(harness.backend.create(spec()))
        for _ in range(delay):
            await asyncio.sleep(0)
        creation.cancel()
        await harness.backend.delete("r-1", grace_s=0.0)
        assert await harness.backend.list() == []


async def test_runtimes_outlive_their_controller_and_are_adopted(harness: Harness) -> None:
    kept = await harness.backend.create(spec("r-1"))
    incarnation = await harness.incarnation(kept)
    await harness.print(kept, "before\n")
    await harness.backend.close()

    harness.backend = harness.reopen()
    exits = harness.backend.watch()
    assert await harness.backend.list() == [kept]
    assert await harness.backend.create(spec("r-1")) == kept
    assert await harness.incarnation(kept) == incarnation
    await until_logged(harness, "r-1", "before")
    await harness.exit(kept, 3)
    async with asyncio.timeout(SOON_S):
        assert (await anext(exits)).runtime_id == "r-1"
    assert (await harness.backend.inspect("r-1")).phase is RuntimePhase.EXITED
    await harness.backend.delete("r-1")
    assert await harness.backend.list() == []


async def test_an_exit_without_a_controller_is_seen_by_the_next(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    await harness.incarnation(info)
    await harness.backend.close()
    await harness.exit(info, 3)
    harness.backend = harness.reopen()
    await until_exited(harness, "r-1")


async def test_another_cluster_is_left_alone(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    other = harness.reopen(cluster="other")
    assert await other.list() == []
    with pytest.raises(RuntimeNotFound):
        await other.inspect("r-1")
    await other.delete("r-1", grace_s=0.0)
    await harness.incarnation(info)
    assert await harness.backend.list() == [info]
    await other.close()


async def test_the_last_lines_of_a_log_are_returned(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    await harness.print(info, "".join(f"line {number}\n" for number in range(200)))
    await until_logged(harness, "r-1", "line 199")
    lines = await lines_of(harness.backend.logs("r-1", tail=3))
    assert lines == ["line 197", "line 198", "line 199"]
    assert await lines_of(harness.backend.logs("r-1", tail=0)) == []
    assert len(await lines_of(harness.backend.logs("r-1"))) == 100


async def test_a_followed_log_ends_with_its_runtime(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    await harness.print(info, "one\n")
    seen = []
    async with asyncio.timeout(SOON_S):
        async for line in harness.backend.logs("r-1", follow=True):
            seen.append(line)
            if line == "one":
                await harness.print(info, "two\n")
            if line == "two":
                await harness.exit(info, 0)
    assert seen == ["one", "two"]


async def test_a_followed_log_ends_when_its_runtime_is_deleted(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    await harness.print(info, "one\n")
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as tasks:
        async for line in harness.backend.logs("r-1", follow=True):
            if line == "one":
                tasks.create_task(harness.backend.delete("r-1"))


async def test_long_lines_are_cut(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    await harness.print(info, "x" * 100_000 + "\nnext\n")
    await until_logged(harness, "r-1", "next")
    assert await lines_of(harness.backend.logs("r-1")) == ["x" * 8192, "next"]


async def until_logged(harness: Harness, runtime_id: str, expected: str) -> None:
    """Follow a log up to a line; what is printed takes a moment to arrive there."""
    async with asyncio.timeout(SOON_S):
        async for line in harness.backend.logs(runtime_id, follow=True):
            if line == expected:
                return
    raise AssertionError(f"{expected!r} never came")


async def until_exited(harness: Harness, runtime_id: str) -> None:
    """Wait until the end of what runs is known; its log ends when it does."""
    async with asyncio.timeout(SOON_S):
        await lines_of(harness.backend.logs(runtime_id, follow=True))
    assert (await harness.backend.inspect(runtime_id)).phase is RuntimePhase.EXITED


async def test_limits_of_a_running_runtime_can_be_set(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    incarnation = await harness.incarnation(info)
    await harness.backend.resize(info.runtime_id, cpu=1.0, memory_bytes=512 << 20)
    await harness.backend.resize(info.runtime_id, cpu=0.5, memory_bytes=1 << 30)
    assert await harness.incarnation(info) == incarnation, "it runs on"


async def test_limits_never_set_need_no_lifting(harness: Harness) -> None:
    info = await harness.backend.create(spec())
    await harness.backend.resize(info.runtime_id, cpu=None, memory_bytes=None)


async def test_limits_of_what_does_not_exist_cannot_be_set(harness: Harness) -> None:
    with pytest.raises(RuntimeNotFound):
        await harness.backend.resize("nobody", cpu=1.0, memory_bytes=None)
