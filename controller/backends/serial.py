"""One operation at a time on each runtime, finished even when nobody waits for it any more."""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SerialOperations:
    """Runs operations of one runtime id one after the other.

    A caller that is cancelled leaves its operation running: work in a thread cannot be recalled,
    and whatever comes next for the same id must find it either not begun or done.
    """

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._num_operations: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, runtime_id: str, operation: Coroutine[Any, Any, T]) -> T:
        """Run an operation after those of the same id that came first."""
        return await asyncio.shield(self._start(runtime_id, operation))

    def begin(self, runtime_id: str, operation: Coroutine[Any, Any, None]) -> None:
        """Have an operation run in its turn, without waiting for it."""
        _ = self._start(runtime_id, operation)

    def is_busy(self, runtime_id: str) -> bool:
        """Return whether an operation on this id is running or waiting."""
        return self._num_operations[runtime_id] > 0

    async def close(self) -> None:
        """Return when no operation is left."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, runtime_id: str, operation: Coroutine[Any, Any, T]) -> "asyncio.Future[T]":
        task = asyncio.create_task(self._in_turn(runtime_id, operation), name=f"on {runtime_id}")
        self._num_operations[runtime_id] += 1
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def _in_turn(self, runtime_id: str, operation: Coroutine[Any, Any, T]) -> T:
        lock = self._locks.setdefault(runtime_id, asyncio.Lock())
        try:
            async with lock:
                return await operation
        finally:
            operation.close()
            self._num_operations[runtime_id] -= 1
            if not self.is_busy(runtime_id):
                del self._locks[runtime_id], self._num_operations[runtime_id]

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the caller has it; one that left does not want it
