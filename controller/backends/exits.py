"""Exits of runtimes, told to everyone who watches."""

import asyncio
from collections.abc import AsyncIterator
from weakref import WeakSet

from controller.backends.base import RuntimeInfo


class Exits:
    """Hands each exit to all watchers there are at that moment. Event loop only."""

    def __init__(self) -> None:
        self._queues: WeakSet[asyncio.Queue[RuntimeInfo]] = WeakSet()

    def publish(self, info: RuntimeInfo) -> None:
        """Tell every watcher of an exited runtime."""
        for queue in self._queues:
            queue.put_nowait(info)

    def watch(self) -> AsyncIterator[RuntimeInfo]:
        """Yield every exit published from this call on; a dropped iterator costs nothing."""
        queue: asyncio.Queue[RuntimeInfo] = asyncio.Queue()
        self._queues.add(queue)
        return _drain(queue)


async def _drain(queue: asyncio.Queue[RuntimeInfo]) -> AsyncIterator[RuntimeInfo]:
    while True:
        yield await queue.get()
