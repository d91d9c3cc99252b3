"""From a file to the GPU through pinned buffers: each thread fills one while another is copied."""

import itertools
import mmap
import os
import sys

import structlog
import torch
from torch import Tensor

from runtime.gpu.weight_stream import WeightStream
from snapshots.loader import OpenRank, read_piece

PIECE_BYTES = 8 << 20
MAX_READERS = 10
"""On an H200's 16 cores, more readers or larger pieces are slower."""
BUFFERS_EACH = 2
SWITCH_INTERVAL_S = 0.0002
"""How long a reader waits for the interpreter while it is busy elsewhere; by default 5 ms."""

log = structlog.get_logger()


class BufferedStream(WeightStream):
    """Reads at once and copies when the device is there; see WeightStream.

    Args:
        rank: What to read.
        num_readers: 0 for one per core, at most MAX_READERS.
    """

    def __init__(self, rank: OpenRank, *, num_readers: int = 0) -> None:
        num_readers = num_readers or min(MAX_READERS, os.cpu_count() or 1)
        super().__init__(rank, piece_bytes=PIECE_BYTES, num_threads=num_readers)
        self._file = os.open(rank.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)

    def close(self) -> None:
        """Stop reading and give the buffers back; harmless when all is done."""
        super().close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            sys.setswitchinterval(self._switch_interval_s)

    def _copy_pieces(self) -> None:
        buffers = [_Buffer() for _ in range(BUFFERS_EACH)]
        try:
            for buffer, (start, size) in zip(itertools.cycle(buffers), self._pieces()):
                buffer.wait()
                read_piece(self.rank, self._file, buffer.memory[:size], start)
                target = self._target(start, size)
                if target is None:
                    break
                buffer.copy_to(target)
                self._news.put(size)
        finally:
            for buffer in buffers:
                buffer.release()


class _Buffer:
    """Host memory for a piece, which the GPU copies from on its own."""

    def __init__(self) -> None:
        pages = mmap.mmap(-1, PIECE_BYTES)
        self.memory = memoryview(pages)
        self._tensor = torch.frombuffer(pages, dtype=torch.uint8)
        self._is_pinned = False
        self._stream: torch.cuda.Stream | None = None

    def copy_to(self, target: Tensor) -> None:
        """Start copying the leading bytes to the device."""
        source = self._tensor[: len(target)]
        if not target.is_cuda:
            target.copy_(source)
            return
        self._pin()
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Return when the memory can be written again."""
        if self._stream is not None:
            self._stream.synchronize()

    def release(self) -> None:
        """Let go of the memory, which goes with the last reference to it."""
        self.wait()
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._tensor.data_ptr())
            self._is_pinned = False

    def _pin(self) -> None:
        """Register the memory, which takes a tenth of the time once reading has touched it."""
        if self._stream is not None:
            return
        self._stream = torch.cuda.Stream()
        cudart = torch.cuda.cudart()
        error = int(cudart.cudaHostRegister(self._tensor.data_ptr(), PIECE_BYTES, 0))
        if error:  # copies from it are right, only slow
            log.warning("memory_not_pinned", num_bytes=PIECE_BYTES, cuda_error=error)
        self._is_pinned = not error
