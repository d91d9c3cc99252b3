"""What only the process backend promises; the rest is in tests/contracts."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import uvloop

from controller.backends.base import BackendError, RuntimeInfo, RuntimePhase
from controller.backends.log_reader import LogReader
from controller.backends.process import ProcessBackend
from tests.contracts.harnesses import ProcessHarness, lines_of, names_in, spec, tell

SOON_S = 20.0


@pytest.fixture
def runtimes_dir(tmp_path: Path) -> Path:
    return tmp_path / "runtimes"


@pytest.fixture
async def harness(runtimes_dir: Path) -> AsyncIterator[ProcessHarness]:
    opened = ProcessHarness(runtimes_dir)
    yield opened
    await opened.close()


@pytest.fixture
def bystander() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


async def test_a_runtime_gets_no_secret_of_its_controller(
    harness: ProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setenv("COLDSPARK_API_KEY", "canary")
    info = await harness.backend.create(replace(spec(), env={"EXTRA": "given"}))
    environment = await environment_of(info)
    assert "canary" not in environment.values()
    assert environment["EXTRA"] == "given"
    assert environment["HOME"] == str(Path(info.endpoint.removeprefix("unix://")).parent)


@pytest.mark.parametrize("uuids", [(), ("GPU-1", "GPU-2")])
async def test_a_runtime_sees_its_devices_alone(
    harness: ProcessHarness, uuids: tuple[str, ...]
) -> None:
    info = await harness.backend.create(replace(spec(), device_uuids=uuids))
    assert info.device_uuids == uuids
    assert (await environment_of(info))["CUDA_VISIBLE_DEVICES"] == ",".join(uuids)


async def test_runtimes_share_what_they_compile(
    harness: ProcessHarness, runtimes_dir: Path
) -> None:
    for runtime_id in ("a", "b"):
        info = await harness.backend.create(replace(spec(), runtime_id=runtime_id))
        cache = Path((await environment_of(info))["TRITON_CACHE_DIR"])
        assert cache.parent == runtimes_dir.parent


async def test_a_runtime_has_its_own_session_and_no_files_of_ours(
    harness: ProcessHarness, tmp_path: Path
) -> None:
    with (tmp_path / "open").open("w") as ours:
        ours.write("x")
        info = await harness.backend.create(spec())
        source = (
            "import os; answer = os.getsid(0) == os.getpid(), sorted(os.listdir('/proc/self/fd'))"
        )
        answer = await tell(info, source)
    # Standard streams, the listener, the connection, and the directory it lists.
    assert answer == "(True, ['0', '1', '2', '3', '4', '5'])"


async def test_directories_are_private_and_removed(
    harness: ProcessHarness, runtimes_dir: Path
) -> None:
    await harness.backend.create(spec())
    assert (runtimes_dir / "r-1").stat().st_mode & 0o777 == 0o700
    await harness.backend.delete("r-1")
    assert names_in(runtimes_dir) == []


async def test_a_long_socket_path_is_refused_before_anything_starts(tmp_path: Path) -> None:
    root = tmp_path / ("d" * 100)
    backend = ProcessBackend(root, cluster="test")
    with pytest.raises(BackendError, match="shorter home") as raised:
        await backend.create(spec())
    assert not raised.value.temporary
    assert not root.exists()
    await backend.close()


async def test_a_command_that_does_not_exist_leaves_nothing(runtimes_dir: Path) -> None:
    before = psutil.Process().children()
    backend = ProcessBackend(runtimes_dir, cluster="test", command=["/nonexistent/python"])
    with pytest.raises(BackendError, match="cannot start '/nonexistent/python'") as raised:
        await backend.create(spec())
    assert not raised.value.temporary
    assert await backend.list() == []
    assert names_in(runtimes_dir) == []
    assert psutil.Process().children() == before
    await backend.close()


async def test_a_signal_becomes_a_shell_s_exit_code(harness: ProcessHarness) -> None:
    exits = harness.backend.watch()
    info = await harness.backend.create(spec())
    await tell(info, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    async with asyncio.timeout(SOON_S):
        assert (await anext(exits)).exit_code == 128 + signal.SIGKILL


async def test_the_exit_code_is_known_to_the_next_controller(harness: ProcessHarness) -> None:
    exits = harness.backend.watch()
    info = await harness.backend.create(spec())
    await harness.exit(info, 3)
    async with asyncio.timeout(SOON_S):
        told = await anext(exits)
    await harness.backend.close()
    harness.backend = harness.reopen()
    assert await harness.backend.list() == [told]


async def test_deleting_asks_before_it_kills(harness: ProcessHarness) -> None:
    info = await harness.backend.create(spec())
    await harness.print(info, "ready\n")
    seen = []
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as tasks:
        async for line in harness.backend.logs("r-1", follow=True):
            seen.append(line)
            if line == "ready":
                tasks.create_task(harness.backend.delete("r-1"))
    assert seen == ["ready", "leaving"]


async def test_what_outlives_a_crash_is_killed_by_deleting(harness: ProcessHarness) -> None:
    exits = harness.backend.watch()
    info = await harness.backend.create(spec())
    end = await harness.hold(info)
    await harness.exit(info, 1)
    async with asyncio.timeout(SOON_S):
        await anext(exits)
    assert not end.done()
    await harness.backend.delete("r-1")
    async with asyncio.timeout(SOON_S):
        await end


async def test_a_reused_process_number_is_not_mistaken_for_the_runtime(
    harness: ProcessHarness, runtimes_dir: Path, bystander: "subprocess.Popen[bytes]"
) -> None:
    info = await harness.backend.create(spec())
    await harness.backend.close()
    await harness.exit(info, 0)
    change_record(
        runtimes_dir, lambda record: record["process"].update(pid=bystander.pid, start_ticks=1)
    )

    harness.backend = harness.reopen()
    assert (await harness.backend.inspect("r-1")).phase is RuntimePhase.EXITED
    await harness.backend.delete("r-1", grace_s=0.0)
    assert bystander.poll() is None


async def test_a_runtime_started_but_not_yet_recorded_is_adopted(
    harness: ProcessHarness, runtimes_dir: Path
) -> None:
    info = await harness.backend.create(spec())
    incarnation = await harness.incarnation(info)
    await harness.backend.close()
    change_record(runtimes_dir, lambda record: record.update(process=None, writer=None))

    harness.backend = harness.reopen()
    assert await harness.backend.list() == [info]
    assert await harness.incarnation(info) == incarnation
    end = await harness.hold(info)
    await harness.backend.delete("r-1")
    async with asyncio.timeout(SOON_S):
        await end


async def test_an_intention_without_a_start_has_exited(
    harness: ProcessHarness, runtimes_dir: Path
) -> None:
    await harness.backend.create(spec())
    await harness.backend.delete("r-1")
    await harness.backend.close()
    (runtimes_dir / "r-1").mkdir()
    directories = harness.backend._directories  # type: ignore[attr-defined]  # what a crash leaves
    directories.write(directories.record_of(spec()))

    harness.backend = harness.reopen()
    assert [info.phase for info in await harness.backend.list()] == [RuntimePhase.EXITED]
    await harness.backend.delete("r-1")
    assert names_in(runtimes_dir) == []


async def test_an_unreadable_record_does_not_hide_the_others(
    harness: ProcessHarness, runtimes_dir: Path
) -> None:
    (runtimes_dir / "r-0").mkdir(parents=True)
    (runtimes_dir / "r-0" / "runtime.json").write_text("{")
    info = await harness.backend.create(spec())
    assert await harness.backend.list() == [info]


async def test_a_flood_of_output_stays_within_bounds(
    harness: ProcessHarness, runtimes_dir: Path
) -> None:
    info = await harness.backend.create(spec())
    flood = "import sys\nfor _ in range(64): sys.stdout.write(('x' * 1023 + chr(10)) * 1024)"
    await tell(info, f"{flood}\nsys.stdout.write('end' + chr(10)); sys.stdout.flush()")
    async with asyncio.timeout(SOON_S):
        async for line in harness.backend.logs("r-1", follow=True):
            if line == "end":
                break
    kept = sum(path.stat().st_size for path in (runtimes_dir / "r-1").glob("log*"))
    assert (4 << 20) < kept <= (16 << 20) + (2 << 16)
    assert len(await lines_of(harness.backend.logs("r-1", tail=10_000))) > 4096


async def test_a_log_that_is_given_up_is_closed_after_its_last_read(
    harness: ProcessHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = await harness.backend.create(spec())
    await harness.incarnation(info)
    is_reading = threading.Event()
    events: list[str] = []
    tail, close = LogReader.tail, LogReader.close

    def slow_tail(reader: LogReader, num_lines: int, *, is_over: bool) -> list[str]:
        is_reading.set()
        time.sleep(0.2)
        lines = tail(reader, num_lines, is_over=is_over)
        events.append("read")
        return lines

    def noted_close(reader: LogReader) -> None:
        close(reader)
        events.append("closed")

    monkeypatch.setattr(LogReader, "tail", slow_tail)
    monkeypatch.setattr(LogReader, "close", noted_close)
    reading = asyncio.create_task(lines_of(harness.backend.logs(info.runtime_id)))
    await asyncio.to_thread(is_reading.wait)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert events == ["read", "closed"]


async def test_no_process_or_file_is_left(harness: ProcessHarness) -> None:
    process = psutil.Process()
    before, num_fds = process.children(), process.num_fds()
    for number in range(3):
        await harness.backend.create(spec(f"r-{number}"))
    assert len(process.children()) == len(before) + 6
    for number in range(3):
        await harness.backend.delete(f"r-{number}", grace_s=0.0)
    assert process.children() == before
    assert process.num_fds() == num_fds


def test_exits_are_seen_on_uvloop(runtimes_dir: Path) -> None:
    async def scenario() -> RuntimeInfo:
        harness = ProcessHarness(runtimes_dir)
        exits = harness.backend.watch()
        await harness.exit(await harness.backend.create(spec()), 3)
        async with asyncio.timeout(SOON_S):
            told = await anext(exits)
        await harness.close()
        return told

    assert uvloop.run(scenario()).exit_code == 3


async def environment_of(info: RuntimeInfo) -> dict[str, str]:
    """Return the environment a runtime was started with."""
    answer = await tell(info, "import json, os; answer = json.dumps(dict(os.environ))")
    return dict(json.loads(answer))


def change_record(runtimes_dir: Path, change: object) -> None:
    """Rewrite the record of r-1."""
    assert callable(change)
    path = runtimes_dir / "r-1" / "runtime.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
