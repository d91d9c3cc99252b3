"""Memory that processes share and no GPU knows of, in place of a CUDA driver's."""

import mmap
import os

from runtime.host_cache.memory import Fill, HostMemoryError
from runtime.host_cache.protocol import padded


class MemfdMemory:
    """Implements `runtime.host_cache.memory.HostMemory`."""

    def filled(self, num_bytes: int, fill: Fill) -> int:
        """Return a descriptor of new memory."""
        descriptor = os.memfd_create("host-cache")
        try:
            os.ftruncate(descriptor, padded(num_bytes))
            with mmap.mmap(descriptor, num_bytes) as pages, memoryview(pages) as target:
                fill(target)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


class LateMemory(MemfdMemory):
    """Has none left at first."""

    def __init__(self) -> None:
        self._has_refused = False

    def filled(self, num_bytes: int, fill: Fill) -> int:
        """Refuse once."""
        if not self._has_refused:
            self._has_refused = True
            raise HostMemoryError("the host has not that much memory left to pin")
        return super().filled(num_bytes, fill)


class NoMemory:
    """Has none left."""

    def filled(self, num_bytes: int, fill: Fill) -> int:
        """Refuse."""
        raise HostMemoryError("the host has not that much memory left to pin")
