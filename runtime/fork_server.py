"""The runtime server's side of one zygote: readiness, forks, and who ended how."""

import asyncio
import os
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
    Ready,
    ZygoteMessage,
    decode_message,
)

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
        self._death: ZygoteDied | None = None
        self._is_stopping = False
        self._task = asyncio.create_task(self._follow(), name="zygote")

    @property
    def is_dead(self) -> bool:
        """Whether the process has ended."""
        return self._death is not None

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
            ZygoteDied: There is no process to fork, or it refuses.
        """
        await self.ready()
        try:
            socket.send_fds(self._zygote.control, [b"fork"], [engine_socket.fileno(), output])
        except OSError as error:
            raise ZygoteDied(f"the zygote does not take a fork request: {error}") from error
        loop = asyncio.get_running_loop()
        request: asyncio.Future[EngineChild] = loop.create_future()
        self._requests.append(request)
        return await request

    async def stop(self) -> None:
        """Kill the zygote, and with it its engines; return when all are gone."""
        self._is_stopping = True
        self._zygote.process.kill()
        await self._task

    async def _follow(self) -> None:
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
        self._die(ZygoteDied(f"the zygote ended ({describe_exit(code)}): {tail.text}"))

    def _handle(self, message: ZygoteMessage) -> None:
        match message:
            case Ready(import_s=import_s):
                self._ready.set_result(None)
                self._on_ready(import_s)
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
        for pid, exited in self._engines.items():
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            exited.set_result(os.waitstatus_to_exitcode(status))
        self._engines.clear()

    def _die(self, death: ZygoteDied) -> None:
        self._death = death
        was_ready = self._ready.done()
        waiting: list[asyncio.Future[Any]] = [self._ready, *self._requests]
        for future in waiting:
            if not future.done():
                future.set_exception(death)
                future.exception()  # marks it as seen; not everybody waits
        self._requests.clear()
        if not self._is_stopping:
            self._on_dead(death, was_ready)
