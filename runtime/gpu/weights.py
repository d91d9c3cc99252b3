"""A snapshot's weights in a slab on the GPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import structlog
import torch
from torch import Tensor

from runtime.errors import SnapshotDamaged
from runtime.gpu.cached_stream import CachedStream
from runtime.gpu.file_stream import FileStream
from runtime.gpu.memory import allocate_slab
from runtime.gpu.weight_stream import WeightStream
from runtime.host_cache.protocol import ask_for, report_damage
from runtime.memory.slab import Slab
from runtime.memory.weights import OnProgress, Weights, checked_rank, dtype_of
from snapshots.errors import SnapshotCorrupted
from snapshots.loader import LoadReport, views

log = structlog.get_logger()


class StreamedWeights(Weights, Protocol):
    """Weights whose places are known before they are there."""

    @property
    def is_read(self) -> bool:
        """Whether `load` has nothing to wait for."""

    def start(self) -> Mapping[str, Tensor]:
        """Begin to bring them in, which `load` ends; return them, their content undefined."""

    def tidy(self) -> None:
        """Give back, in idle time, what the last load has left mapped."""


class GpuWeights:
    """One rank of a snapshot; implements `StreamedWeights`.

    They come from the host cache, if it has them, else from the file.

    Args:
        snapshot: Its directory.
        device: "cuda", or "cpu" in tests.

    Raises:
        SnapshotDamaged: The header is not what the manifest says.
    """

    def __init__(self, snapshot: Path, device: str) -> None:
        self._rank = checked_rank(snapshot)
        self._store = snapshot.parent
        self._file = self._rank.path.relative_to(snapshot.parent)
        self._device = device
        self._slab: Slab | None = None
        self._stream: WeightStream | None = None
        self._copied_from: CachedStream | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors."""
        return dtype_of(self._rank)

    @property
    def total_bytes(self) -> int:
        """Size of the slab."""
        return self._rank.data_bytes

    @property
    def held_bytes(self) -> int:
        """GPU memory held now."""
        return self._slab.num_bytes if self._slab is not None and self._slab.is_mapped else 0

    @property
    def is_read(self) -> bool:
        """Whether nothing more is on its way: everything has come, or an error has."""
        return self._stream is None or self._stream.is_over

    def prefetch(self) -> None:
        """Find where the bytes are; begin to read a file, as far as buffers go.

        Needs no device yet.
        """
        held = ask_for(self._store, self._file)
        if held is not None and held.num_bytes != self._rank.file.size_bytes:
            log.warning("host_cache_unusable", reason=f"it has {held.num_bytes} bytes")
            held.close()
            held = None
        if held is None:
            self._stream = FileStream(self._rank)
        else:
            self._stream = CachedStream(self._rank, held, self._device)

    def start(self) -> Mapping[str, Tensor]:
        """Begin to copy; return views into the slab, their content undefined.

        The slab keeps its addresses over `release`, so views of an earlier load are right again.

        Raises:
            OutOfMemory: The GPU has not enough free memory.
        """
        assert not self.held_bytes, "released first"
        if self._stream is None:
            self.prefetch()
        assert self._stream is not None, "set above"
        try:
            if self._slab is None:
                self._slab = allocate_slab(self.total_bytes, self._device)
            else:
                self._slab.map()
        except BaseException:
            self.release()
            raise
        self._stream.start_copy(self._slab.tensor)
        return views(self._rank, self._slab.tensor)

    def load(self, on_progress: OnProgress | None) -> tuple[Mapping[str, Tensor], LoadReport]:
        """Copy and verify on the device, or end that; return views into the slab.

        Raises:
            SnapshotDamaged: The bytes read are not those that were built; nothing is held.
            OutOfMemory: The GPU has not enough free memory.
        """
        if not self.held_bytes:
            self.start()
        assert self._slab is not None, "started"
        try:
            report = self._finish(on_progress)
        except SnapshotCorrupted as error:
            self.release()
            raise SnapshotDamaged(str(error)) from error
        except BaseException:
            self.release()
            raise
        self._stream = None
        return views(self._rank, self._slab.tensor), report

    def tidy(self) -> None:
        """Unmap the host cache's memory that the last load has copied from."""
        if self._copied_from is not None:
            self._copied_from.close()
            self._copied_from = None

    def discard(self, weight: Tensor) -> None:
        """Keep it: every weight is used as it is."""

    def release(self) -> None:
        """Give the slab's memory back, and buffers that were filled for nothing."""
        self.tidy()
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self.held_bytes and self._slab is not None:
            self._slab.unmap()

    def _finish(self, on_progress: OnProgress | None) -> LoadReport:
        """Return when everything is there and right; from the file if the cache is no good."""
        assert self._stream is not None, "started"
        assert self._slab is not None, "started"
        if not isinstance(self._stream, CachedStream):
            return self._stream.finish(on_progress)
        try:
            report = self._stream.finish(on_progress)
        except Exception as error:  # noqa: BLE001  # whatever it is, there is still the file
            log.warning("host_cache_unusable", reason=str(error))
            self._stream.close()
            if isinstance(error, SnapshotCorrupted):
                report_damage(self._store, self._file)
            self._stream = FileStream(self._rank)
            self._stream.start_copy(self._slab.tensor)
            return self._stream.finish(on_progress)
        self._copied_from = self._stream
        return report
