from pathlib import Path

import pytest

from controller.backends.base import BackendUnavailable, RuntimeSpec
from controller.scaling.last_logs import MAX_BYTES, MAX_LINES, LastLogs
from tests.fakes.backend import FakeBackend


@pytest.fixture
async def backend(tmp_path: Path) -> FakeBackend:
    backend = FakeBackend()
    for number in range(2):
        spec = RuntimeSpec(
            runtime_id=f"r{number}", function="f", revision="1", epoch=1, snapshot_store=tmp_path
        )
        await backend.create(spec)
    return backend


async def test_the_end_of_the_last_log_is_kept(tmp_path: Path, backend: FakeBackend) -> None:
    logs = LastLogs(tmp_path / "logs")
    assert await logs.lines("f", tail=10) == []
    for runtime_id in ("r0", "r1"):
        for number in range(3):
            backend.machine.log(runtime_id, f"{runtime_id} {number}")
        await logs.keep("f", backend, runtime_id)
    assert await logs.lines("f", tail=2) == ["r1 1", "r1 2"]
    assert await logs.lines("f", tail=0) == []
    await logs.forget("f")
    await logs.forget("f")
    assert await logs.lines("f", tail=10) == []


async def test_a_log_is_kept_within_its_bounds(tmp_path: Path, backend: FakeBackend) -> None:
    logs = LastLogs(tmp_path)
    for number in range(MAX_LINES + 10):
        backend.machine.log("r0", f"{number} {'é' * 1000}")
    await logs.keep("f", backend, "r0")
    assert (tmp_path / "f.log").stat().st_size <= MAX_BYTES
    assert (await logs.lines("f", tail=1))[0].startswith(f"{MAX_LINES + 9} ")


async def test_a_log_that_cannot_be_had_or_kept_stops_nobody(
    tmp_path: Path, backend: FakeBackend
) -> None:
    (tmp_path / "file").touch()
    backend.machine.log("r0", "hello")
    await LastLogs(tmp_path / "file").keep("f", backend, "r0")
    backend.error = BackendUnavailable("away")
    await LastLogs(tmp_path).keep("f", backend, "r0")
    assert await LastLogs(tmp_path).lines("f", tail=1) == []
