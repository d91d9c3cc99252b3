"""The runtime server's side of one zygote: readiness, forks, and who ended how."""

import asyncio
import math
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from runtime.errors import ZygoteDied
from runtime.linux import describe_exit
from runtime.log_tail import LogTail
from runtime.spawn import ZygoteProcess
from runtime.zygote_messages import (
    MAX_MESSAGE_BYTES,
    Exited,
    Forked,
    ForkRefused,
    Prepared,
    Preparing,
    Ready,
    ZygoteMessage,
    decode_message,
)

FORK_TIMEOUT_S = 30.0
"""A fork takes milliseconds, on a machine that swaps some seconds.

Not counted is the time the zygote prepares, which is a minute or two where nothing is in the page
cache and the compiler builds its launchers: killing it then would only begin that anew. Who waits
for a load has a limit of its own.
"""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChild:
    """A forked engine; `exited` becomes its exit code, a negative signal number if killed."""

    pid: int
    exited: asyncio.Future[int]


class ForkServer:
    """Follows a zygote from its start to its death.

    Args:
        zygote: A process just spawned; owned from now on.
        on_ready: Called once with the seconds the imports took.
        on_dead: Called once when it has ended, unless `stop` was called, with whether it had been
            ready.
    """

    def __init__(
        self,
        zygote: ZygoteProcess,
        *,
        on_ready: Callable[[float], None],
        on_dead: Callable[[ZygoteDied, bool], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._zygote = zygote
        self._on_ready = on_ready
        self._on_dead = on_dead
        self._ready: asyncio.Future[None] = loop.create_future()
        self._requests: deque[asyncio.Future[EngineChild]] = deque()
        self._engines: dict[int, asyncio.Future[int]] = {}
        self._prepared_at = -math.inf  # inf while it prepares
        self._death: ZygoteDied | None = None
        self._is_stopping = False
        self._task = asyncio.create_task(self._follow(), name="zygote")

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended."""
        return self._death is not None

    @property
    def is_ready(self) -> bool:
        """Whether forks are possible now."""
        return self._death is None and self._ready.done()

    async def ready(self) -> None:
        """Wait until forks are possible.

        Raises:
            ZygoteDied: It ended before.
        """
        if self._death is not None:
            raise self._death
        await asyncio.shield(self._ready)

    async def fork(self, engine_socket: socket.socket, output: int) -> EngineChild:
        """Fork an engine that owns duplicates of a socket and of a descriptor for its output.

        Raises:
            ZygoteDied: There is no process to fork, or it refuses or hangs and has been killed.
        """
        await self.ready()
        try:
            socket.send_fds(self._zygote.control, [b"fork"], [engine_socket.fileno(), output])
        except OSError as error:
            raise ZygoteDied(f"the zygote does not take a fork request: {error}") from error
        loop = asyncio.get_running_loop()
        request: asyncio.Future[EngineChild] = loop.create_future()
        self._requests.append(request)
        try:
            return await self._answer(request)
        except TimeoutError as error:
            await self._kill()
            raise ZygoteDied(
                f"the zygote has not forked within {FORK_TIMEOUT_S:g} s and was killed: load again"
            ) from error
        except ZygoteDied:
            await self._kill()  # what refuses once would refuse again
            raise

    async def _answer(self, request: asyncio.Future[EngineChild]) -> EngineChild:
        """Return what a request becomes.

        Raises:
            TimeoutError: The zygote has had nothing else to do for too long.
            ZygoteDied: It refuses, or has died.
        """
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        while not request.done():
            idle_s = max(loop.time() - max(sent_at, self._prepared_at), 0.0)
            if idle_s >= FORK_TIMEOUT_S:
                raise TimeoutError
            await asyncio.wait([request], timeout=FORK_TIMEOUT_S - idle_s)
        return request.result()

    async def stop(self) -> None:
        """Kill the zygote, and with it its engines; return when all are gone."""
        self._is_stopping = True
        await self._kill()

    async def _kill(self) -> None:
        self._zygote.process.kill()
        await asyncio.shield(self._task)

    async def _follow(self) -> None:
        try:
            death = await self._outlive()
        except Exception as error:  # whoever waits for the zygote must be told
            log.exception("zygote_lost")
            self._zygote.process.kill()
            death = ZygoteDied(f"the zygote is lost: {error}")
        self._die(death)

    async def _outlive(self) -> ZygoteDied:
        """Take its messages until it ends; return how it did."""
        tail = await LogTail.follow(self._zygote.output)
        loop = asyncio.get_running_loop()
        with self._zygote.control as control:
            try:
                while packet := await loop.sock_recv(control, MAX_MESSAGE_BYTES):
                    self._handle(decode_message(packet))
            except ConnectionError:
                pass  # as good as an end of file
        self._zygote.process.kill()
        code = await asyncio.to_thread(self._zygote.process.wait)
        await self._reap_orphans()
        await tail.ended()
        return ZygoteDied(f"the zygote ended ({describe_exit(code)}): {tail.text}")

    def _handle(self, message: ZygoteMessage) -> None:
        match message:
            case Ready(import_s=import_s):
                self._ready.set_result(None)
                self._on_ready(import_s)
            case Preparing():
                self._prepared_at = math.inf
            case Prepared():
                self._prepared_at = asyncio.get_running_loop().time()
            case Forked(pid=pid):
                child = EngineChild(pid=pid, exited=asyncio.get_running_loop().create_future())
                self._engines[pid] = child.exited
                self._requests.popleft().set_result(child)
            case ForkRefused(reason=reason):
                self._requests.popleft().set_exception(ZygoteDied(reason))
            case Exited(pid=pid, status=status):
                self._engines.pop(pid).set_result(os.waitstatus_to_exitcode(status))

    async def _reap_orphans(self) -> None:
        """Wait for engines that the dead zygote can no longer wait for; they die with it."""
        while self._engines:
            pid, exited = self._engines.popitem()
            exited.set_result(await asyncio.to_thread(_wait_for, pid))

    def _die(self, death: ZygoteDied) -> None:
        self._death = death
        for exited in self._engines.values():
            exited.set_result(-signal.SIGKILL)
        self._engines.clear()
        was_ready = self._ready.done()
        waiting: list[asyncio.Future[Any]] = [self._ready, *self._requests]
        for future in waiting:
            if not future.done():
                future.set_exception(death)
                future.exception()  # marks it as seen; not everybody waits
        self._requests.clear()
        if not self._is_stopping:
            self._on_dead(death, was_ready)


def _wait_for(pid: int) -> int:
    """Return the exit code of an adopted engine; the zygote may have waited for it, untold."""
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return -signal.SIGKILL  # as its zygote's death would have it
    return os.waitstatus_to_exitcode(status)
