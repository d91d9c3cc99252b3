"""From the page cache to the GPU with no copy on the host: the GPU reads the file's pages itself.

The file is mapped, its pages are registered with the driver piece by piece, and each piece is
copied while the next is registered. On an H200 that goes at the speed of the bus, and the host's
cores are free for what else a start has to do. It is for files whose pages are in memory: others
would come through page faults, a few at a time.
"""

import mmap
import os
from collections import deque
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from runtime.gpu.weight_stream import WeightStream
from snapshots.loader import OpenRank

PIECE_BYTES = 32 << 20
NUM_THREADS = 2
AHEAD = 3
SAMPLE_BYTES = 4 << 20

Pages: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


class CannotMap(Exception):
    """The driver does not take pages of this file."""


def is_cached(rank: OpenRank) -> bool:
    """Return whether a rank's file is in the page cache, judged by a page in every 4 MiB."""
    descriptor = os.open(rank.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    target = [bytearray(1)]
    samples = [*range(0, rank.data_bytes, SAMPLE_BYTES), rank.data_bytes - 1]
    try:
        return all(
            os.preadv(descriptor, target, rank.file.data_offset + start, os.RWF_NOWAIT)
            for start in samples
        )
    except OSError:  # EAGAIN: it would have to be read; or this file system cannot tell
        return False
    finally:
        os.close(descriptor)


class MappedStream(WeightStream):
    """Copies from where the file lies in memory; see WeightStream.

    `finish` raises CannotMap if the driver will have none of it.

    Args:
        rank: What to read.
    """

    def __init__(self, rank: OpenRank) -> None:
        super().__init__(rank, piece_bytes=PIECE_BYTES, num_threads=NUM_THREADS)
        with rank.path.open("rb") as file:
            size = rank.file.data_offset + rank.data_bytes
            mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        # The mapping goes with the last view of it.
        self._pages: Pages = np.frombuffer(mapping, dtype=np.uint8)[rank.file.data_offset :]

    def _copy_pieces(self) -> None:
        copies: _Copies | None = None
        try:
            for start, size in self._pieces():
                target = self._target(start, size)
                if target is None:
                    break
                copies = copies or (_GpuCopies() if target.is_cuda else _HostCopies())
                copies.add(self._pages[start : start + size], target)
                self._news.put(size)
        finally:
            if copies is not None:
                copies.finish()


class _Copies(Protocol):
    """The copies of one thread."""

    def add(self, pages: Pages, target: Tensor) -> None:
        """Begin to copy."""

    def finish(self) -> None:
        """Return when all copies have ended and the pages are free again."""


class _HostCopies:
    """Copies where there is no device."""

    def add(self, pages: Pages, target: Tensor) -> None:
        target.numpy()[:] = pages

    def finish(self) -> None:
        pass


class _GpuCopies:
    """Copies by the GPU, from pages that are registered meanwhile."""

    def __init__(self) -> None:
        from cuda.bindings import driver  # only where there is a driver

        self._driver = driver
        self._stream = torch.cuda.Stream()
        self._stream.synchronize()  # makes the context this thread's
        self._under_way: deque[tuple[int, torch.cuda.Event]] = deque()

    def add(self, pages: Pages, target: Tensor) -> None:
        if len(self._under_way) >= AHEAD:
            self._end_oldest()
        address = pages.ctypes.data
        flags = self._driver.CU_MEMHOSTREGISTER_READ_ONLY
        (error,) = self._driver.cuMemHostRegister(address, pages.nbytes, flags)
        if error:
            raise CannotMap(f"cuMemHostRegister: {error.name}")
        (error,) = self._driver.cuMemcpyHtoDAsync(
            target.data_ptr(), address, pages.nbytes, self._stream.cuda_stream
        )
        event = torch.cuda.Event()
        event.record(self._stream)
        self._under_way.append((address, event))
        if error:
            raise CannotMap(f"cuMemcpyHtoDAsync: {error.name}")

    def finish(self) -> None:
        while self._under_way:
            self._end_oldest()

    def _end_oldest(self) -> None:
        address, event = self._under_way.popleft()
        event.synchronize()
        self._driver.cuMemHostUnregister(address)
