"""From the page cache to the GPU: pinned buffers, several readers, a stream for each buffer.

Every reader takes the next piece of the file, reads it into one of its two buffers, and has it
copied while it fills the other. Pieces are taken in the order of the file, so layers arrive in the
order of their use. To have the GPU read the file's own pages, mapped and registered, was slower by
half and kept the driver from all else.
"""

import itertools
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.gpu.weight_stream import WeightStream
from snapshots.loader import OpenRank, read_piece

if TYPE_CHECKING:
    from runtime.gpu.pinned_copies import PinnedCopies

PIECE_BYTES = 8 << 20
MAX_READERS = 10
"""On an H200's 16 cores, more readers are slower, and so are smaller and larger pieces."""
BUFFERS_EACH = 2
SWITCH_INTERVAL_S = 0.0002
"""How long a reader waits for the interpreter while it is busy elsewhere; by default 5 ms."""


class FileStream(WeightStream):
    """One pass over a rank's file. Reading begins at once, copying when the device is there.

    Args:
        rank: What to read.
        num_readers: 0 for one per core, at most MAX_READERS.
    """

    def __init__(self, rank: OpenRank, *, num_readers: int = 0) -> None:
        super().__init__(rank, -(-rank.data_bytes // PIECE_BYTES), "file")
        self._file = os.open(rank.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._starts = iter(range(0, rank.data_bytes, PIECE_BYTES))
        self._may_copy = threading.Event()
        self._is_given_up = False
        wanted = num_readers or min(MAX_READERS, os.cpu_count() or 1)
        self._readers = [
            threading.Thread(target=self._run, name=f"weights-{index}", daemon=True)
            for index in range(min(wanted, self._num_pieces))
        ]
        for reader in self._readers:
            reader.start()

    def close(self) -> None:
        """Stop reading and give the buffers back; see `WeightStream`."""
        self._is_given_up = True
        self._may_copy.set()
        for reader in self._readers:
            reader.join()
        self._readers.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            sys.setswitchinterval(self._switch_interval_s)

    def _start(self, slab: Tensor) -> None:
        self._may_copy.set()

    def _is_running(self) -> bool:
        return any(reader.is_alive() for reader in self._readers)

    def _copied(self) -> None:
        self.close()

    def _run(self) -> None:
        buffers: list[_Buffer] = []
        try:
            buffers += [_Buffer() for _ in range(BUFFERS_EACH)]
            with torch.inference_mode():  # which the thread that made the slab may be in
                self._read(buffers)
        except Exception as error:  # noqa: BLE001  # the thread that waits for the bytes raises it
            self._news.put(error)
        finally:
            for buffer in buffers:
                buffer.release()

    def _read(self, buffers: list["_Buffer"]) -> None:
        for buffer, (start, size) in zip(itertools.cycle(buffers), self._pieces(), strict=False):
            buffer.wait()
            read_piece(self._rank, self._file, buffer.memory[:size], start)
            self._may_copy.wait()
            if self._is_given_up or self._slab is None:
                break
            buffer.copy_to(self._slab[start : start + size])
            self._news.put(size)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Yield start and size of pieces that no other reader has taken."""
        # `next` of a range holds the interpreter lock, so no piece is taken twice.
        while (start := next(self._starts, None)) is not None and not self._is_given_up:
            yield start, min(PIECE_BYTES, self._rank.data_bytes - start)


class _Buffer:
    """Host memory for a piece, which the GPU copies from on its own."""

    def __init__(self) -> None:
        pages = mmap.mmap(-1, PIECE_BYTES)
        self.memory = memoryview(pages)
        self._tensor = torch.frombuffer(pages, dtype=torch.uint8)
        self._copies: PinnedCopies | None = None

    def copy_to(self, target: Tensor) -> None:
        """Start copying the leading bytes to the device."""
        if not target.is_cuda:
            target.copy_(self._tensor[: len(target)])
            return
        if self._copies is None:
            from runtime.gpu.pinned_copies import PinnedCopies  # needs CUDA's driver library

            self._copies = PinnedCopies(self._tensor.data_ptr(), PIECE_BYTES)
        self._copies.start(target.data_ptr(), len(target))

    def wait(self) -> None:
        """Return when the memory can be written again."""
        if self._copies is not None:
            self._copies.wait()

    def release(self) -> None:
        """Let go of the memory, which goes with the last reference to it."""
        if self._copies is not None:
            self._copies.close()
            self._copies = None
