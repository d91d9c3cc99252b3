"""A rank's bytes on their way to the GPU: what its ways have in common."""

import queue
import time
from abc import ABC, abstractmethod

import structlog
from torch import Tensor

from runtime.memory.weights import OnProgress
from snapshots.loader import LoadReport, OpenRank, chunk_sums, verify
from snapshots.manifest import CHUNK_BYTES

log = structlog.get_logger()


class WeightStream(ABC):
    """One pass over a rank's data, in the order of the file, so layers come in that of their use.

    Args:
        rank: What to bring.
        num_pieces: How many copies that takes.
        source: Where from, for the log.
    """

    def __init__(self, rank: OpenRank, num_pieces: int, source: str) -> None:
        self._rank = rank
        self._num_pieces = num_pieces
        self._source = source
        self._began = 0.0  # with the copying: before it, a file is read as far as buffers go
        self._news: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        """Bytes that were copied, or why no more will be."""
        self._slab: Tensor | None = None

    @property
    def is_over(self) -> bool:
        """Whether the last piece is on its way, or nobody copies any more; before `finish`."""
        return self._news.qsize() >= self._num_pieces or not self._is_running()

    def start_copy(self, slab: Tensor) -> None:
        """Begin to copy; once only.

        Args:
            slab: uint8 [data_bytes], on the device.
        """
        self._slab = slab
        self._began = time.perf_counter()
        self._start(slab)

    def finish(self, on_progress: OnProgress | None = None) -> LoadReport:
        """Return when everything is copied and verified where it is; after `start_copy`.

        Args:
            on_progress: Told (bytes copied, bytes in all) from the calling thread.

        Raises:
            SnapshotCorrupted: The file ends early, or a chunk does not add up.
        """
        assert self._slab is not None, "copying was started"
        done_bytes = 0
        try:
            chunk_sums(self._slab[: 2 * CHUNK_BYTES])  # loads the kernel while bytes arrive
            while done_bytes < self._rank.data_bytes:
                news = self._news.get()
                if isinstance(news, Exception):
                    raise news
                done_bytes += news
                if on_progress is not None:
                    on_progress(done_bytes, self._rank.data_bytes)
        except BaseException:
            self.close()
            raise
        self._copied()
        copied = time.perf_counter()
        verify(self._rank, self._slab)
        report = LoadReport(
            num_bytes=self._rank.data_bytes,
            read_s=copied - self._began,
            verify_s=time.perf_counter() - copied,
        )
        log.info(
            "weights_loaded",
            source=self._source,
            num_bytes=report.num_bytes,
            read_gb_per_s=round(report.num_bytes / 1e9 / report.read_s, 1),
            verify_gb_per_s=round(report.num_bytes / 1e9 / report.verify_s, 1),
        )
        return report

    @abstractmethod
    def close(self) -> None:
        """Stop, and give everything back that this took; harmless when all is done."""

    @abstractmethod
    def _start(self, slab: Tensor) -> None:
        """Begin to copy, in other threads."""

    @abstractmethod
    def _is_running(self) -> bool:
        """Return whether more can come."""

    @abstractmethod
    def _copied(self) -> None:
        """Give back, now that all is copied, what is given back fast."""
