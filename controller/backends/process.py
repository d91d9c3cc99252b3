"""Runtimes as processes of this machine: no isolation, nothing to install.

Limits on processor and memory are not enforced here; a container engine does that.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from controller.backends.base import BackendError, RuntimeInfo, RuntimeNotFound, RuntimeSpec
from controller.backends.directories import Record, RuntimeDirectories
from controller.backends.exits import Exits
from controller.backends.log_reader import LogReader
from controller.backends.processes import (
    ExitWatch,
    ProcessRef,
    is_session_leader,
    kill_marked,
    marked,
)
from controller.backends.serial import SerialOperations
from controller.backends.spawn import spawn_logged

log = structlog.get_logger(__name__)

RUNTIME_COMMAND = (sys.executable, "-P", "-m", "runtime.main")
LOG_NAME = "log"
MARK_NAME = "COLDSPARK_PROCESS_TREE"
PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH")
"""What a runtime inherits; anything else could hold a secret."""
KERNEL_CACHE = "kernel-cache"  # compiled Triton kernels, beside the runtimes and shared by them
FOLLOW_PERIOD_S = 0.2
LOG_SETTLE_S = 0.3
ADOPTION = ""  # no runtime's id


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A record with the pidfds of what still lives of it."""

    record: Record
    process: int | None
    writer: int | None


class _Runtime:
    """One runtime this backend looks after. Event loop only."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.process: ExitWatch | None = None
        self.writer: ExitWatch | None = None
        self.is_unwanted = False

    async def exited(self, timeout_s: float) -> bool:
        """Wait for the end of its first process; return whether it has come."""
        return await _ended(self.process, timeout_s)

    async def has_printed_all(self, timeout_s: float) -> bool:
        """Wait for the end of everything that could print; return whether it has come."""
        return await _ended(self.writer, timeout_s)

    def close(self) -> None:
        for watch in (self.process, self.writer):
            if watch is not None:
                watch.close()


class ProcessBackend:
    """Runs each runtime as a process in its own session. See `RuntimeBackend`.

    Args:
        runtimes_dir: One directory a runtime is made in here.
        cluster: Runtimes of other clusters in the same directory are left alone.
        command: What to start; --runtime-id, --socket and --store are appended.
    """

    name = "process"

    def __init__(
        self, runtimes_dir: Path, *, cluster: str, command: Sequence[str] = RUNTIME_COMMAND
    ) -> None:
        self._directories = RuntimeDirectories(runtimes_dir, backend=self.name, cluster=cluster)
        self._kernel_cache = runtimes_dir.parent / KERNEL_CACHE
        self._command = tuple(command)
        self._runtimes: dict[str, _Runtime] = {}
        self._serial = SerialOperations()
        self._exits = Exits()
        self._is_adopted = False

    async def create(self, spec: RuntimeSpec) -> RuntimeInfo:
        """Start a runtime, or return the one that already has this id."""
        await self._adopt()
        return await self._serial.run(spec.runtime_id, self._create(spec))

    async def resize(self, runtime_id: str, *, cpu: float | None, memory_bytes: int | None) -> None:
        """Do nothing to a runtime that exists: limits are not enforced here."""
        await self._adopt()
        self._find(runtime_id)

    async def delete(self, runtime_id: str, *, grace_s: float = 5.0) -> None:
        """Stop a runtime with all its descendants and remove its directory."""
        await self._adopt()
        await self._serial.run(runtime_id, self._delete(runtime_id, grace_s))

    async def inspect(self, runtime_id: str) -> RuntimeInfo:
        """Return one runtime, running or exited."""
        await self._adopt()
        return self._directories.info(self._find(runtime_id).record)

    async def list(self) -> list[RuntimeInfo]:
        """Return every runtime of this cluster, ordered by id."""
        await self._adopt()
        return [self._directories.info(found.record) for _, found in sorted(self._runtimes.items())]

    def watch(self) -> AsyncIterator[RuntimeInfo]:
        """Yield a runtime each time one exits."""
        return self._watch(self._exits.watch())

    async def logs(
        self, runtime_id: str, *, tail: int = 100, follow: bool = False
    ) -> AsyncIterator[str]:
        """Yield the last lines, then new ones until the runtime has exited."""
        await self._adopt()
        runtime = self._find(runtime_id)
        reader = LogReader(self._directories.path(runtime_id) / LOG_NAME)
        try:
            is_over = await self._has_settled(runtime, 0.0) or not follow
            for line in await _in_thread(reader.tail, tail, is_over=is_over):
                yield line
            while not is_over:
                is_over = await self._has_settled(runtime, FOLLOW_PERIOD_S)
                read = reader.rest if is_over else reader.new_lines
                for line in await _in_thread(read):
                    yield line
        finally:
            reader.close()

    async def close(self) -> None:
        """Stop watching. Runtimes keep running."""
        await self._serial.close()
        for runtime in self._runtimes.values():
            runtime.close()
        self._runtimes.clear()
        self._is_adopted = False

    async def _adopt(self) -> None:
        """Take over, once, what an earlier controller left."""
        if not self._is_adopted:
            await self._serial.run(ADOPTION, self._adopt_all())

    async def _adopt_all(self) -> None:
        if self._is_adopted:
            return
        for opened in await asyncio.to_thread(self._open_all):
            self._add(opened)
        self._is_adopted = True

    def _open_all(self) -> Sequence[_Opened]:
        try:
            return [self._open(record) for record in self._directories.records()]
        except OSError as error:
            raise BackendError(f"cannot look for runtimes: {error}", temporary=True) from error

    def _open(self, record: Record) -> _Opened:
        if record.process is None and not record.has_exited:
            record = replace(record, process=self._started_unrecorded(record.runtime_id))
        process = record.process.open() if record.process and not record.has_exited else None
        writer = record.writer.open() if record.writer else None
        if process is None and not record.has_exited:
            record = replace(record, has_exited=True)
        self._directories.write(record)
        return _Opened(record=record, process=process, writer=writer)

    def _started_unrecorded(self, runtime_id: str) -> ProcessRef | None:
        """Find the runtime of a controller that died right after starting it."""
        return next(filter(is_session_leader, marked(self._mark(runtime_id))), None)

    def _add(self, opened: _Opened) -> _Runtime:
        runtime = _Runtime(opened.record)
        self._runtimes[opened.record.runtime_id] = runtime
        if opened.writer is not None:
            runtime.writer = ExitWatch(opened.writer, lambda _: None)
        if opened.process is not None:
            runtime.process = ExitWatch(opened.process, lambda code: self._exited(runtime, code))
        return runtime

    def _exited(self, runtime: _Runtime, exit_code: int | None) -> None:
        record = replace(runtime.record, has_exited=True, exit_code=exit_code)
        runtime.record = record
        if not runtime.is_unwanted:
            self._exits.publish(self._directories.info(record))
            self._serial.begin(record.runtime_id, self._write(runtime))

    async def _write(self, runtime: _Runtime) -> None:
        if self._runtimes.get(runtime.record.runtime_id) is runtime:
            with contextlib.suppress(OSError):  # costs the next controller the exit code
                await asyncio.to_thread(self._directories.write, runtime.record)

    async def _create(self, spec: RuntimeSpec) -> RuntimeInfo:
        runtime = self._runtimes.get(spec.runtime_id)
        if runtime is None:
            runtime = self._add(await asyncio.to_thread(self._start, spec))
        return self._directories.info(runtime.record)

    def _start(self, spec: RuntimeSpec) -> _Opened:
        record = self._directories.record_of(spec)
        path = self._directories.create(record)
        socket = self._directories.socket(spec.runtime_id)
        command = [*self._command, "--runtime-id", spec.runtime_id, "--socket", str(socket)]
        command += ["--store", str(spec.snapshot_store)]
        try:
            process, writer = spawn_logged(command, self._environment(spec, path), path / LOG_NAME)
            record = replace(record, process=process, writer=writer)
            self._directories.write(record)
        except OSError as error:
            kill_marked(self._mark(spec.runtime_id))
            self._directories.remove(spec.runtime_id)
            raise BackendError(
                f"cannot start {command[0]!r} for {spec.runtime_id!r}: {error}",
                temporary=not isinstance(error, FileNotFoundError | PermissionError),
            ) from error
        return _Opened(record=record, process=process.open(), writer=writer.open())

    def _environment(self, spec: RuntimeSpec, path: Path) -> Mapping[str, str]:
        passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        own = {
            "HOME": str(path),
            "TMPDIR": str(path),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self._kernel_cache),
            "CUDA_VISIBLE_DEVICES": ",".join(spec.device_uuids),  # empty: no GPU at all
        }
        return passed_on | own | dict(spec.env) | {MARK_NAME: str(path)}

    def _mark(self, runtime_id: str) -> str:
        return f"{MARK_NAME}={self._directories.path(runtime_id)}"

    async def _delete(self, runtime_id: str, grace_s: float) -> None:
        runtime = self._runtimes.get(runtime_id)
        if runtime is not None:
            await self._end(runtime, grace_s)
        await asyncio.to_thread(self._directories.remove, runtime_id)
        self._runtimes.pop(runtime_id, None)

    async def _end(self, runtime: _Runtime, grace_s: float) -> None:
        runtime_id = runtime.record.runtime_id
        runtime.is_unwanted = True
        if runtime.process is not None:
            runtime.process.send(signal.SIGTERM)
        await runtime.exited(grace_s)
        survivors = await asyncio.to_thread(kill_marked, self._mark(runtime_id))
        if survivors:
            raise BackendError(
                f"processes {[process.pid for process in survivors]} of {runtime_id!r} do not die;"
                " the kernel is busy for them, most likely in a device driver",
                temporary=True,
            )
        await runtime.exited(LOG_SETTLE_S)
        if not await runtime.has_printed_all(LOG_SETTLE_S) and runtime.writer is not None:
            runtime.writer.send(signal.SIGKILL)
            await runtime.has_printed_all(LOG_SETTLE_S)
        runtime.close()

    def _find(self, runtime_id: str) -> _Runtime:
        try:
            return self._runtimes[runtime_id]
        except KeyError:
            raise RuntimeNotFound(f"no runtime {runtime_id!r}") from None

    async def _watch(self, exits: AsyncIterator[RuntimeInfo]) -> AsyncIterator[RuntimeInfo]:
        await self._adopt()
        async for info in exits:
            yield info

    async def _has_settled(self, runtime: _Runtime, timeout_s: float) -> bool:
        """Wait for an exit and for what was printed before it; return whether both are over."""
        if not await runtime.exited(timeout_s):
            return False
        await runtime.has_printed_all(LOG_SETTLE_S)
        return True


async def _ended(watch: ExitWatch | None, timeout_s: float) -> bool:
    if watch is None or watch.exited.is_set():
        return True
    try:
        async with asyncio.timeout(timeout_s):
            return await watch.exited.wait()
    except TimeoutError:
        return False


async def _in_thread(read: Callable[..., list[str]], *args: Any, **options: Any) -> list[str]:
    """Return what a thread reads; cancelled, wait for its end, for it may yet open the file."""
    reading = asyncio.ensure_future(asyncio.to_thread(read, *args, **options))
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        await asyncio.wait([reading])
        raise
