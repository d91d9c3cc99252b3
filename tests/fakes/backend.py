"""A backend whose runtimes are entries in a dictionary, and which can be told to fail."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from controller.backends.base import (
    BackendError,
    RuntimeInfo,
    RuntimeNotFound,
    RuntimePhase,
    RuntimeSpec,
)
from controller.backends.directories import RUNTIME_ID
from controller.backends.exits import Exits


@dataclass
class FakeMachine:
    """What outlives a backend object: the runtimes, as a machine would hold them."""

    runtimes: dict[str, RuntimeInfo] = field(default_factory=dict)
    clusters: dict[str, str] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    exits: Exits = field(default_factory=Exits)

    def exit(self, runtime_id: str, exit_code: int | None = 1) -> None:
        """Have a runtime end by itself."""
        info = replace(self.runtimes[runtime_id], phase=RuntimePhase.EXITED, exit_code=exit_code)
        self.runtimes[runtime_id] = info
        self.exits.publish(info)
        self.wake()

    def log(self, runtime_id: str, line: str) -> None:
        """Have a runtime print a line."""
        self.lines[runtime_id].append(line[:8192])
        self.wake()

    def wake(self) -> None:
        """Let those who follow a log look again."""
        self.changed.set()
        self.changed = asyncio.Event()


class FakeBackend:
    """An in-memory backend on loop time.

    Args:
        machine: Shared by backends that stand for the same one before and after a restart.
        cluster: Whose runtimes it sees.
        create_s: How long a creation takes.
        delete_s: How long a deletion takes.
    """

    name = "fake"

    def __init__(
        self,
        machine: FakeMachine | None = None,
        *,
        cluster: str = "test",
        create_s: float = 0.0,
        delete_s: float = 0.0,
    ) -> None:
        self.machine = machine or FakeMachine()
        self.cluster = cluster
        self.create_s = create_s
        self.delete_s = delete_s
        self.error: BackendError | None = None  # raised by every operation while set
        self.create_error: BackendError | None = None  # raised by creations while set
        self.resize_error: BackendError | None = None  # raised by changes of limits while set
        self.limits: dict[str, tuple[float | None, int | None]] = {}
        self.created: list[RuntimeSpec] = []
        self.deleted: list[str] = []

    def exit(self, runtime_id: str, exit_code: int | None = 1) -> None:
        """Have a runtime end by itself."""
        self.machine.exit(runtime_id, exit_code)

    async def create(self, spec: RuntimeSpec) -> RuntimeInfo:
        self._check()
        if not RUNTIME_ID.fullmatch(spec.runtime_id):
            raise BackendError(f"{spec.runtime_id!r} is no runtime id")
        await asyncio.sleep(self.create_s)
        if self.create_error is not None:
            raise self.create_error
        machine = self.machine
        if spec.runtime_id not in machine.runtimes:
            self.created.append(spec)
            machine.clusters[spec.runtime_id] = self.cluster
            machine.lines[spec.runtime_id] = []
            machine.runtimes[spec.runtime_id] = RuntimeInfo(
                runtime_id=spec.runtime_id,
                function=spec.function,
                revision=spec.revision,
                epoch=spec.epoch,
                phase=RuntimePhase.RUNNING,
                endpoint=f"fake:{spec.runtime_id}",
                device_uuids=spec.device_uuids,
            )
        return await self.inspect(spec.runtime_id)

    async def resize(self, runtime_id: str, *, cpu: float | None, memory_bytes: int | None) -> None:
        await self.inspect(runtime_id)
        if self.resize_error is not None:
            raise self.resize_error
        self.limits[runtime_id] = (cpu, memory_bytes)

    async def delete(self, runtime_id: str, *, grace_s: float = 5.0) -> None:
        self._check()
        await asyncio.sleep(self.delete_s)
        if self._has(runtime_id):
            self.deleted.append(runtime_id)
            del self.machine.runtimes[runtime_id]
            self.machine.wake()

    async def inspect(self, runtime_id: str) -> RuntimeInfo:
        self._check()
        if not self._has(runtime_id):
            raise RuntimeNotFound(f"no runtime {runtime_id!r}")
        return self.machine.runtimes[runtime_id]

    async def list(self) -> list[RuntimeInfo]:
        self._check()
        return [info for name, info in sorted(self.machine.runtimes.items()) if self._has(name)]

    def watch(self) -> AsyncIterator[RuntimeInfo]:
        self._check()
        return self.machine.exits.watch()

    async def logs(
        self, runtime_id: str, *, tail: int = 100, follow: bool = False
    ) -> AsyncIterator[str]:
        await self.inspect(runtime_id)
        lines = self.machine.lines[runtime_id]
        position = max(0, len(lines) - tail)
        while True:
            while position < len(lines):
                yield lines[position]
                position += 1
            info = self.machine.runtimes.get(runtime_id)
            if not follow or info is None or info.phase is RuntimePhase.EXITED:
                return
            await self.machine.changed.wait()

    async def close(self) -> None:
        """Nothing to close."""

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _has(self, runtime_id: str) -> bool:
        machine = self.machine
        return runtime_id in machine.runtimes and machine.clusters[runtime_id] == self.cluster
