import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from runtime import fork_server
from runtime.errors import ZygoteDied
from runtime.fork_server import ForkServer
from runtime.spawn import ZygoteProcess
from runtime.zygote_messages import (
    Exited,
    Forked,
    ForkRefused,
    Prepared,
    Preparing,
    Ready,
    ZygoteMessage,
    encode_message,
)

NOBODYS_CHILD = 1


@dataclass
class FakeZygote:
    """A process that sleeps, and a test that speaks for it."""

    process: ZygoteProcess
    control: socket.socket
    deaths: list[tuple[ZygoteDied, bool]] = field(default_factory=list)

    def serve(self) -> ForkServer:
        return ForkServer(
            self.process, on_ready=lambda _: None, on_dead=lambda *death: self.deaths.append(death)
        )

    async def end(self) -> int:
        """Wait for the process to be killed, and close its socket as its end would."""
        code = await asyncio.to_thread(self.process.process.wait)
        self.control.close()
        return code

    def say(self, message: ZygoteMessage) -> None:
        self.control.send(encode_message(message))


@pytest.fixture
def zygote() -> Iterator[FakeZygote]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    output, their_output = os.pipe()
    with theirs, subprocess.Popen(["sleep", "60"], stdout=their_output) as process:
        os.close(their_output)
        yield FakeZygote(ZygoteProcess(process=process, control=ours, output=output), theirs)
        process.kill()


async def fork(server: ForkServer) -> int:
    """Fork an engine; return its exit code."""
    with socket.socket() as engine_socket:
        child = await server.fork(engine_socket, engine_socket.fileno())
    return await child.exited


async def test_an_engine_that_nobody_can_wait_for_does_not_hide_the_zygotes_death(
    zygote: FakeZygote,
) -> None:
    server = zygote.serve()
    zygote.say(Ready(import_s=0.1))
    forked = asyncio.create_task(fork(server))
    await asyncio.to_thread(zygote.control.recv, 100)
    zygote.say(Forked(pid=NOBODYS_CHILD))
    zygote.process.process.kill()
    zygote.control.close()
    assert await forked == -signal.SIGKILL
    with pytest.raises(ZygoteDied, match="killed by SIGKILL"):
        await asyncio.wait_for(fork(server), 5.0)
    [(_, was_ready)] = zygote.deaths
    assert was_ready


async def test_a_zygote_that_talks_nonsense_is_killed(zygote: FakeZygote) -> None:
    server = zygote.serve()
    ready = asyncio.create_task(server.ready())
    zygote.control.send(b'{"type": "Singing"}')
    with pytest.raises(ZygoteDied, match="Singing"):
        await asyncio.wait_for(ready, 5.0)
    assert server.is_dead
    assert await asyncio.to_thread(zygote.process.process.wait) == -signal.SIGKILL


async def test_a_zygote_that_does_not_answer_is_killed(
    zygote: FakeZygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "FORK_TIMEOUT_S", 0.05)
    server = zygote.serve()
    zygote.say(Ready(import_s=0.1))
    forked = asyncio.create_task(fork(server))
    assert await zygote.end() == -signal.SIGKILL
    with pytest.raises(ZygoteDied, match=r"has not forked within 0\.05 s"):
        await forked
    assert server.is_dead
    assert len(zygote.deaths) == 1


async def test_a_zygote_that_prepares_engines_is_waited_for(
    zygote: FakeZygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "FORK_TIMEOUT_S", 0.2)
    server = zygote.serve()
    zygote.say(Ready(import_s=0.1))
    forked = asyncio.create_task(fork(server))
    await asyncio.to_thread(zygote.control.recv, 100)
    zygote.say(Preparing())  # which it had begun before it could see the request
    await asyncio.sleep(0.5)
    zygote.say(Prepared())
    await asyncio.sleep(0.1)
    zygote.say(Forked(pid=NOBODYS_CHILD))
    zygote.say(Exited(pid=NOBODYS_CHILD, status=0))
    assert await forked == 0
    zygote.control.close()
    await server.stop()


async def test_a_zygote_that_does_not_answer_once_it_has_prepared_is_killed(
    zygote: FakeZygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "FORK_TIMEOUT_S", 0.05)
    server = zygote.serve()
    zygote.say(Ready(import_s=0.1))
    zygote.say(Preparing())
    await server.ready()
    forked = asyncio.create_task(fork(server))
    await asyncio.sleep(0.2)
    assert zygote.process.process.poll() is None
    zygote.say(Prepared())
    assert await zygote.end() == -signal.SIGKILL
    with pytest.raises(ZygoteDied, match="has not forked"):
        await forked


async def test_a_zygote_that_refuses_is_killed(zygote: FakeZygote) -> None:
    server = zygote.serve()
    zygote.say(Ready(import_s=0.1))
    forked = asyncio.create_task(fork(server))
    await asyncio.to_thread(zygote.control.recv, 100)
    zygote.say(ForkRefused(reason="too many threads"))
    assert await zygote.end() == -signal.SIGKILL
    with pytest.raises(ZygoteDied, match="too many threads"):
        await forked
    assert server.is_dead
