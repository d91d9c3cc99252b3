"""What the contract suite needs of a backend besides its contract: runtimes that do as told."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from controller.backends.base import RuntimeBackend, RuntimeInfo, RuntimeSpec
from controller.backends.docker import DockerBackend
from controller.backends.process import ProcessBackend
from tests.fakes.backend import FakeBackend, FakeMachine

STAND_IN = (Path(__file__).parents[1] / "fakes" / "stand_in.py").read_text()
REACHABLE_S = 50.0


class Harness(Protocol):
    """One machine under test."""

    backend: RuntimeBackend

    def reopen(self, *, cluster: str = "test") -> RuntimeBackend:
        """Return what another controller on this machine would use."""

    async def exit(self, info: RuntimeInfo, exit_code: int) -> None:
        """Have a runtime end by itself."""

    async def print(self, info: RuntimeInfo, text: str) -> None:
        """Have a runtime print, as it is."""

    async def incarnation(self, info: RuntimeInfo) -> str:
        """Return what tells this runtime from any other that had its id."""

    async def ignore_sigterm(self, info: RuntimeInfo) -> None:
        """Have a runtime stay when it is asked to leave."""

    async def hold(self, info: RuntimeInfo) -> "asyncio.Future[None]":
        """Have a runtime start a descendant that nobody waits for; return the end of it."""

    async def close(self) -> None:
        """Remove every runtime."""


def spec(runtime_id: str = "r-1", *, snapshot_store: Path | None = None) -> RuntimeSpec:
    """Return something to start."""
    return RuntimeSpec(
        runtime_id=runtime_id,
        function="smollm2",
        revision="abc123",
        epoch=7,
        snapshot_store=snapshot_store or Path(__file__).parent,
    )


class FakeHarness:
    """The in-memory fake."""

    def __init__(self) -> None:
        self._machine = FakeMachine()
        self.backend: RuntimeBackend = self.reopen()

    def reopen(self, *, cluster: str = "test") -> RuntimeBackend:
        return FakeBackend(self._machine, cluster=cluster)

    async def exit(self, info: RuntimeInfo, exit_code: int) -> None:
        self._machine.exit(info.runtime_id, exit_code)

    async def print(self, info: RuntimeInfo, text: str) -> None:
        for line in text.removesuffix("\n").split("\n"):
            self._machine.log(info.runtime_id, line)

    async def incarnation(self, info: RuntimeInfo) -> str:
        return str(id(self._machine.lines[info.runtime_id]))

    async def ignore_sigterm(self, info: RuntimeInfo) -> None:
        """A fake is never asked."""

    async def hold(self, info: RuntimeInfo) -> "asyncio.Future[None]":
        async def gone() -> None:
            while info.runtime_id in self._machine.runtimes:
                await self._machine.changed.wait()

        return asyncio.ensure_future(gone())

    async def close(self) -> None:
        self._machine.runtimes.clear()


class SocketHarness:
    """Backends whose runtimes are the stand-in, spoken to over its socket alone."""

    backend: RuntimeBackend

    async def exit(self, info: RuntimeInfo, exit_code: int) -> None:
        await tell(info, f"import os; os._exit({exit_code})")

    async def print(self, info: RuntimeInfo, text: str) -> None:
        await tell(info, f"import sys; sys.stdout.write({text!r}); sys.stdout.flush()")

    async def incarnation(self, info: RuntimeInfo) -> str:
        start_ticks = "open('/proc/self/stat').read().split()[21]"
        return await tell(info, f"answer = {start_ticks}")

    async def ignore_sigterm(self, info: RuntimeInfo) -> None:
        await tell(info, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")

    async def hold(self, info: RuntimeInfo) -> "asyncio.Future[None]":
        lines = [
            "import os, signal",
            "if os.fork() == 0:",
            "    os.setsid()",
            "    while True:",
            "        signal.pause()",
            "answer = 'held'",
        ]
        reader, writer = await connect(info)
        writer.write("\n".join(lines).encode())
        writer.write_eof()
        assert await reader.readexactly(4) == b"held"

        async def gone() -> None:
            await reader.read()
            writer.close()

        return asyncio.ensure_future(gone())

    async def close(self) -> None:
        for info in await self.backend.list():
            await self.backend.delete(info.runtime_id, grace_s=0.0)
        await self.backend.close()


class ProcessHarness(SocketHarness):
    """The process backend, over a directory."""

    def __init__(self, runtimes_dir: Path) -> None:
        self._runtimes_dir = runtimes_dir
        self.backend = self.reopen()

    def reopen(self, *, cluster: str = "test") -> RuntimeBackend:
        command = (sys.executable, "-I", "-S", "-c", STAND_IN)
        return ProcessBackend(self._runtimes_dir, cluster=cluster, command=command)


class DockerHarness(SocketHarness):
    """The docker backend, over whatever engine the environment names."""

    def __init__(self, runtimes_dir: Path, *, image: str) -> None:
        self._runtimes_dir = runtimes_dir
        self._image = image
        self.backend = self.reopen()

    def reopen(self, *, cluster: str = "test") -> RuntimeBackend:
        return DockerBackend(
            self._runtimes_dir,
            cluster=cluster,
            image=self._image,
            entrypoint=("python3", "-I", "-S", "-c", STAND_IN),
        )


async def tell(info: RuntimeInfo, statements: str) -> str:
    """Have a stand-in run statements; return what they assigned to `answer`."""
    reader, writer = await connect(info)
    writer.write(statements.encode())
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer.decode()


async def connect(info: RuntimeInfo) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a runtime, as soon as it listens."""
    path = info.endpoint.removeprefix("unix://")
    async with asyncio.timeout(REACHABLE_S):
        while True:
            try:
                return await asyncio.open_unix_connection(path)
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(0.01)


async def lines_of(logs: AsyncIterator[str]) -> list[str]:
    """Return all that a log has."""
    return [line async for line in logs]


def names_in(directory: Path) -> list[str]:
    """Return the names a directory holds."""
    return sorted(path.name for path in directory.iterdir())
