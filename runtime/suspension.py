"""Checkpoints of engines off the event loop, on one thread that owns the driver."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from runtime.memory.checkpoint import CheckpointFailed
from runtime.rpc import inference_pb2 as pb

TIMEOUT_S = 60.0
"""A checkpoint of an engine without its weights takes half a second."""

ResultT = TypeVar("ResultT")


class Checkpoints(Protocol):
    """What can take a process off its GPUs; see `runtime.memory.checkpoint`."""

    def suspend(self, pid: int) -> list[pb.Phase]:
        """Move what the GPUs hold of a process to the host, or raise CheckpointFailed."""

    def resume(self, pid: int) -> list[pb.Phase]:
        """Reverse `suspend`, or raise CheckpointFailed."""


OpenCheckpoints = Callable[[], Checkpoints]


class Suspension:
    """Suspends and resumes processes, one call after the other.

    Args:
        open_checkpoints: Loads the driver; called once, on the thread, when it is first needed.
    """

    def __init__(self, open_checkpoints: OpenCheckpoints) -> None:
        self._open = open_checkpoints
        self._driver = _DriverThread()
        self._checkpoints: Checkpoints | CheckpointFailed | None = None

    def prepare(self) -> None:
        """Begin to load the driver, so that the first park need not wait for it."""
        self._driver.submit(self._opened)

    async def suspend(self, pid: int) -> list[pb.Phase]:
        """Move what the GPUs hold of a process to the host.

        Raises:
            CheckpointFailed: It could not be done, or not in time.
        """
        return await self._run(lambda checkpoints: checkpoints.suspend(pid))

    async def resume(self, pid: int) -> list[pb.Phase]:
        """Reverse `suspend`.

        Raises:
            CheckpointFailed: The process is lost; kill it.
        """
        return await self._run(lambda checkpoints: checkpoints.resume(pid))

    def close(self) -> None:
        """Take no more calls; one that hangs is left behind."""
        self._driver.close()

    async def _run(self, call: Callable[[Checkpoints], ResultT]) -> ResultT:
        answer = self._driver.submit(lambda: call(self._opened()))
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await asyncio.wrap_future(answer)
        except CheckpointFailed:
            raise
        except TimeoutError as error:
            self.close()  # the call may never end, and nothing must wait behind it
            self._driver = _DriverThread()
            raise CheckpointFailed(
                f"the CUDA driver did not answer within {TIMEOUT_S:g} s", is_fatal=True
            ) from error
        except Exception as error:
            # Whatever it is, nobody knows what has become of the process.
            raise CheckpointFailed(f"the checkpoint failed: {error!r}", is_fatal=True) from error

    def _opened(self) -> Checkpoints:
        if self._checkpoints is None:
            try:
                self._checkpoints = self._open()
            except CheckpointFailed as failure:
                self._checkpoints = failure  # it will not change while we live
        if isinstance(self._checkpoints, CheckpointFailed):
            raise self._checkpoints
        return self._checkpoints


class _DriverThread:
    """Runs calls one after the other. An executor's thread would keep the process from ending."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=self._work, name="checkpoints", daemon=True).start()

    def submit(self, call: Callable[[], ResultT]) -> Future[ResultT]:
        """Have something called after all that was submitted before."""
        answer: Future[ResultT] = Future()
        self._calls.put((answer, call))
        return answer

    def close(self) -> None:
        """End the thread after the last call; a call that hangs is left behind."""
        self._calls.put(None)

    def _work(self) -> None:
        while (entry := self._calls.get()) is not None:
            answer, call = entry
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(call())
            except BaseException as error:  # noqa: BLE001  # whoever waits for it is told
                answer.set_exception(error)
