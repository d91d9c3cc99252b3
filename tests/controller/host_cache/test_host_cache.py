"""The holder as a real process, and what it locks as the kernel counts it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from controller.host_cache import host_cache as host_cache_module
from controller.host_cache.choice import Candidate
from controller.host_cache.host_cache import HOLDER, HostCache
from runtime.host_cache.protocol import ask_for

pytestmark = pytest.mark.timeout(60)

SIZE = 1 << 20
MEMFD = ("--memory", "tests.fakes.host_memory:MemfdMemory")
LATE_MEMORY = ("--memory", "tests.fakes.host_memory:LateMemory")
NO_MEMORY = ("--memory", "tests.fakes.host_memory:NoMemory")
REFUSING = """
import ctypes, sys
from runtime.host_cache import holder, locked
locked._libc.mlock = lambda address, size: ctypes.set_errno(12) or -1
holder.main()
"""


def make_file(path: Path, size: int = SIZE, *, is_for_gpu: bool = False) -> Candidate:
    path.write_bytes(b"x" * size)
    return Candidate(path=str(path), num_bytes=size, reuse_probability=0.0, is_for_gpu=is_for_gpu)


def make_cache(store: Path, budget_bytes: int, *command: str) -> HostCache:
    return HostCache(
        budget_bytes, store, engine_user_id=os.getuid(), command=command or [*HOLDER, *MEMFD]
    )


@asynccontextmanager
async def holding(cache: HostCache) -> AsyncIterator[HostCache]:
    cache.start()
    try:
        yield cache
    finally:
        await cache.close()


async def until(is_done: Callable[[], bool]) -> None:
    async with asyncio.timeout(30.0):
        while not is_done():  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.01)


def holders() -> list[psutil.Process]:
    """Return the holders that run now; other tests may have left children that are not reaped."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE
        and "runtime.host_cache.holder" in " ".join(child.cmdline())
    ]


def holder() -> psutil.Process:
    (process,) = holders()
    return process


def locked_bytes() -> int:
    status = Path(f"/proc/{holder().pid}/status").read_text()
    return 1024 * int(status.split("VmLck:")[1].split()[0])


async def test_wanted_files_are_locked_and_others_let_go(tmp_path: Path) -> None:
    first, second = make_file(tmp_path / "first"), make_file(tmp_path / "second")
    async with holding(make_cache(tmp_path, 2 * SIZE)) as cache:
        cache.want([first, second])
        await until(lambda: cache.view()["held_bytes"] == 2 * SIZE)
        assert locked_bytes() == 2 * SIZE
        cache.want([second])
        await until(lambda: cache.view()["held_bytes"] == SIZE)
        assert locked_bytes() == SIZE
        held_by = holder()
    assert not held_by.is_running()


async def test_a_file_that_is_gone_is_told_and_others_are_held(tmp_path: Path) -> None:
    there = make_file(tmp_path / "there")
    gone = Candidate(path=str(tmp_path / "gone"), num_bytes=SIZE, reuse_probability=1.0)
    async with holding(make_cache(tmp_path, 2 * SIZE)) as cache:
        cache.want([gone])
        await until(lambda: cache.view()["reason"] is not None)
        assert "gone: No such file" in cache.view()["reason"]
        cache.want([gone, there])
        await until(lambda: cache.view()["held_bytes"] == SIZE)


async def test_where_locking_is_refused_the_reason_is_told(tmp_path: Path) -> None:
    file = make_file(tmp_path / "file")
    async with holding(make_cache(tmp_path, SIZE, sys.executable, "-c", REFUSING)) as cache:
        cache.want([file])
        await until(lambda: cache.view()["reason"] is not None)
        assert "mlock" in cache.view()["reason"]
        assert cache.view()["held_bytes"] == 0


async def test_a_holder_that_dies_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_cache_module, "RESTART_DELAY_S", 0.01)
    file = make_file(tmp_path / "file")
    async with holding(make_cache(tmp_path, 2 * SIZE)) as cache:
        cache.want([file])
        await until(lambda: cache.view()["held_bytes"] == SIZE)
        holder().kill()
        await until(lambda: "ended" in (cache.view()["reason"] or ""))
        assert cache.view()["held_bytes"] == 0
        await until(lambda: cache.view()["held_bytes"] == SIZE)
        assert cache.view()["reason"] is None


async def test_without_a_budget_no_process_is_started(tmp_path: Path) -> None:
    async with holding(make_cache(tmp_path, 0)) as cache:
        cache.want([make_file(tmp_path / "file")])
        await asyncio.sleep(0.05)
        assert not holders()
        assert cache.view()["held_bytes"] == 0


async def test_what_a_gpu_reads_is_pinned_and_handed_out(tmp_path: Path) -> None:
    file = make_file(tmp_path / "for-gpu", is_for_gpu=True)
    async with holding(make_cache(tmp_path, 2 * SIZE)) as cache:
        cache.want([file])
        await until(lambda: cache.view()["pinned_bytes"] == SIZE)
        assert cache.view()["held_bytes"] == SIZE
        assert locked_bytes() == 0
        held = ask_for(tmp_path, Path("for-gpu"))
        assert held is not None
        held.close()
        cache.want([])
        await until(lambda: cache.view()["held_bytes"] == 0)
        assert ask_for(tmp_path, Path("for-gpu")) is None


async def test_what_cannot_be_pinned_is_locked_and_told(tmp_path: Path) -> None:
    file = make_file(tmp_path / "for-gpu", is_for_gpu=True)
    async with holding(make_cache(tmp_path, SIZE, *HOLDER, *NO_MEMORY)) as cache:
        cache.want([file])
        await until(lambda: cache.view()["held_bytes"] == SIZE)
        assert cache.view()["pinned_bytes"] == 0
        assert "left to pin" in cache.view()["reason"]
        assert locked_bytes() == SIZE


async def test_what_could_not_be_pinned_is_pinned_when_memory_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_cache_module, "RETRY_S", 0.01)
    file = make_file(tmp_path / "for-gpu", is_for_gpu=True)
    async with holding(make_cache(tmp_path, SIZE, *HOLDER, *LATE_MEMORY)) as cache:
        cache.want([file])
        await until(lambda: cache.view()["pinned_bytes"] == SIZE)
        assert cache.view()["reason"] is None
        assert locked_bytes() == 0


async def test_a_locked_file_that_a_gpu_wants_too_is_pinned_instead(tmp_path: Path) -> None:
    file = make_file(tmp_path / "file")
    async with holding(make_cache(tmp_path, SIZE)) as cache:
        cache.want([file])
        await until(lambda: cache.view()["held_bytes"] == SIZE)
        cache.want([replace(file, is_for_gpu=True)])
        await until(lambda: cache.view()["pinned_bytes"] == SIZE)
        assert locked_bytes() == 0
