"""Brings a rank's file to the GPU, by several threads, and verifies what arrived."""

import abc
import queue
import threading
import time
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from runtime.memory.weights import OnProgress
from snapshots.loader import LoadReport, OpenRank, chunk_sums, verify
from snapshots.manifest import CHUNK_BYTES


class WeightStream(abc.ABC):
    """One pass over a rank's file. What it does before there is a device is up to it.

    Pieces are taken in the order of the file, so layers arrive in the order of their use.

    Args:
        rank: What to read.
        piece_bytes: Size of what a thread takes at a time.
        num_threads: How many take pieces.
    """

    def __init__(self, rank: OpenRank, *, piece_bytes: int, num_threads: int) -> None:
        self.rank = rank
        self._piece_bytes = piece_bytes
        self._began = time.perf_counter()
        self._starts = iter(range(0, rank.data_bytes, piece_bytes))
        self._slab: Tensor | None = None
        self._may_copy = threading.Event()
        self._is_given_up = False
        self._news: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        num_pieces = -(-rank.data_bytes // piece_bytes)
        self._threads = [
            threading.Thread(target=self._run, name=f"weights-{index}", daemon=True)
            for index in range(min(num_threads, num_pieces))
        ]

    def begin(self) -> Self:
        """Start the threads; returns itself."""
        for thread in self._threads:
            thread.start()
        return self

    def start_copy(self, slab: Tensor) -> None:
        """Begin to copy; once only.

        Args:
            slab: uint8 [data_bytes], on the device.
        """
        self._slab = slab
        self._may_copy.set()

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
            while done_bytes < self.rank.data_bytes:
                news = self._news.get()
                if isinstance(news, Exception):
                    raise news
                done_bytes += news
                if on_progress is not None:
                    on_progress(done_bytes, self.rank.data_bytes)
        finally:
            self.close()
        copied = time.perf_counter()
        verify(self.rank, self._slab)
        return LoadReport(
            num_bytes=self.rank.data_bytes,
            read_s=copied - self._began,
            verify_s=time.perf_counter() - copied,
        )

    def close(self) -> None:
        """End the threads, and with them all copies; harmless when all is done."""
        self._is_given_up = True
        self._may_copy.set()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    @abc.abstractmethod
    def _copy_pieces(self) -> None:
        """Copy `_pieces` until there are no more; runs in every thread.

        All copies have ended when it returns or raises.
        """

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Yield start and size of pieces that no other thread has taken."""
        # `next` of a range holds the interpreter lock, so no piece is taken twice.
        while (start := next(self._starts, None)) is not None and not self._is_given_up:
            yield start, min(self._piece_bytes, self.rank.data_bytes - start)

    def _target(self, start: int, size: int) -> Tensor | None:
        """Return where a piece belongs, once there is a slab; None if the pass was given up."""
        self._may_copy.wait()
        if self._is_given_up or self._slab is None:
            return None
        return self._slab[start : start + size]

    def _run(self) -> None:
        try:
            with torch.inference_mode():  # which the thread that made the slab may be in
                self._copy_pieces()
        except Exception as error:  # noqa: BLE001  # the thread that waits for the bytes raises it
            self._news.put(error)
