import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import psutil
import pytest

from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import Attachment, RuntimeClient, RuntimeRpcError
from tests.fakes.engine import Script

FAKE_FACTORY = "tests.fakes.engine:FakeEngineFactory"
TIMEOUT_S = 20.0
ROOT = Path(__file__).parents[2]


@dataclass
class Process:
    """A runtime server started for a test, with everything it left on disk."""

    popen: subprocess.Popen[bytes]
    home: Path
    client: RuntimeClient

    @property
    def socket(self) -> Path:
        return self.home / "run" / "runtime.sock"

    @property
    def log(self) -> str:
        return (self.home / "stderr").read_text()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)

    def engine(self) -> psutil.Process:
        """The engine process; there must be one."""
        [engine] = [p for p in self.descendants() if p.name() == "engine"]
        return engine

    def zygote(self) -> psutil.Process:
        """The zygote; there must be one."""
        [zygote] = psutil.Process(self.popen.pid).children()
        return zygote

    def snapshot(self, name: str, script: Script | None = None) -> str:
        """Put a fake snapshot into the store and return its reference."""
        reference = f"{name}@0123456789ab"
        (script or Script()).write(self.home / "store" / reference)
        return reference

    async def load(self, script: Script | None = None, name: str = "fake") -> pb.LoadResponse:
        request = pb.LoadRequest(snapshot=self.snapshot(name, script))
        return await self.client.load(request, timeout_s=TIMEOUT_S)

    async def status(self) -> pb.RuntimeStatus:
        return await self.client.health(timeout_s=TIMEOUT_S)

    async def until(self, condition: Callable[[pb.RuntimeStatus], bool]) -> pb.RuntimeStatus:
        """Follow Watch until a status meets the condition."""
        async with asyncio.timeout(TIMEOUT_S), aclosing(self.client.watch()) as statuses:
            async for status in statuses:
                if condition(status):
                    return status
        raise AssertionError("Watch never ends by itself")

    async def exited(self) -> int:
        return await asyncio.wait_for(asyncio.to_thread(self.popen.wait), TIMEOUT_S)


@dataclass
class Recorder:
    """A sink that keeps what it was given."""

    sequence_id: int = 0
    tokens: list[int] = field(default_factory=list)
    started: pb.Started | None = None
    finished: pb.Finished | None = None
    error: RuntimeRpcError | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def on_started(self, started: pb.Started) -> None:
        assert self.started is None
        self.started = started

    def on_logprobs(self, logprobs: pb.TokenLogprobs) -> None:
        raise AssertionError("nobody has asked for them")

    def on_prompt_logprobs(self, logprobs: pb.PromptLogprobs) -> None:
        raise AssertionError("nobody has asked for them")

    def on_token(self, token_id: int) -> None:
        self.tokens.append(token_id)
        self._changed.set()

    def on_finished(self, finished: pb.Finished) -> None:
        assert self.finished is None
        assert self.error is None
        self.finished = finished
        self._changed.set()

    def on_broken(self, error: RuntimeRpcError) -> None:
        assert self.finished is None
        assert self.error is None
        self.error = error
        self._changed.set()

    async def until(self, condition: Callable[["Recorder"], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    async def end(self) -> pb.Finished:
        await self.until(lambda sink: sink.finished is not None or sink.error is not None)
        assert self.finished is not None, self.error
        return self.finished

    async def breakage(self) -> RuntimeRpcError:
        await self.until(lambda sink: sink.finished is not None or sink.error is not None)
        assert self.error is not None, self.finished
        return self.error


ENDLESS = 1 << 30


def submit(attachment: Attachment, first: int, max_tokens: int = 3) -> Recorder:
    """Submit a prompt of one token; return what records the answer."""
    sink = Recorder()
    sink.sequence_id = attachment.submit([first], pb.SamplingParams(max_tokens=max_tokens), sink)
    return sink


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory with a path short enough for a socket in it."""
    path = Path(tempfile.mkdtemp(prefix="coldspark-", dir="/tmp"))
    (path / "store").mkdir()
    yield path
    shutil.rmtree(path)


class Launch(Protocol):
    """Starts a runtime server that the test's end stops."""

    def __call__(
        self,
        *,
        factory: str = ...,
        store: Path | None = ...,
        env: Mapping[str, str] = ...,
        cwd: Path = ...,
    ) -> Process: ...


def command(home: Path, *, factory: str = FAKE_FACTORY, store: Path | None = None) -> list[str]:
    arguments = ["--runtime-id", "test-1", "--socket", str(home / "run" / "runtime.sock")]
    arguments += ["--store", str(store or home / "store"), "--engine-factory", factory]
    return [sys.executable, "-P", "-m", "runtime.main", *arguments]


@pytest.fixture
async def launch(home: Path) -> AsyncIterator[Launch]:
    """Start runtime servers; what they start must be gone when the test is over."""
    processes: list[Process] = []

    def start(
        *,
        factory: str = FAKE_FACTORY,
        store: Path | None = None,
        env: Mapping[str, str] = MappingProxyType({}),
        cwd: Path = ROOT,
    ) -> Process:
        with (home / "stderr").open("ab") as stderr:
            popen = subprocess.Popen(
                command(home, factory=factory, store=store),
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "PYTHONPATH": str(ROOT), **env},
                cwd=cwd,
            )
        client = RuntimeClient(f"unix:{home / 'run' / 'runtime.sock'}")
        processes.append(Process(popen=popen, home=home, client=client))
        return processes[-1]

    yield start
    for process in processes:
        await process.client.close()
        await stop(process)


@pytest.fixture
async def server(launch: Launch) -> Process:
    """A runtime server over fake engines that answers."""
    process = launch()
    await process.client.wait_reachable(TIMEOUT_S)
    return process


async def stop(process: Process) -> None:
    """Stop a server, whatever state it is in, and check that nothing of it is left."""
    descendants = process.descendants() if process.popen.poll() is None else []
    for descendant in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may be ending by itself
            if descendant.status() == psutil.STATUS_STOPPED:
                descendant.send_signal(signal.SIGCONT)
    if process.popen.poll() is None:
        process.popen.send_signal(signal.SIGTERM)
        code = await process.exited()
        assert code == 0, process.log
        assert not process.socket.exists()
    _, alive = await asyncio.to_thread(psutil.wait_procs, descendants, TIMEOUT_S)
    assert alive == [], process.log


def num_fds(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
