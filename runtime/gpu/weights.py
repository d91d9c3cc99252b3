"""A snapshot's weights in a slab on the GPU."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from runtime.gpu.memory import allocate_slab
from runtime.memory.slab import Slab
from runtime.memory.weights import OnProgress, SnapshotWeights
from snapshots.loader import LoadReport


class GpuWeights:
    """One rank of a snapshot; implements `runtime.memory.weights.Weights`.

    Args:
        snapshot: Its directory.
        device: "cuda", or "cpu" in tests.

    Raises:
        SnapshotDamaged: The header is not what the manifest says.
    """

    def __init__(self, snapshot: Path, device: str) -> None:
        self._on_host = SnapshotWeights(snapshot)
        self._device = device
        self._slab: Slab | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors."""
        return self._on_host.dtype

    @property
    def total_bytes(self) -> int:
        """Size of the slab."""
        return self._on_host.total_bytes

    @property
    def held_bytes(self) -> int:
        """GPU memory held now."""
        return 0 if self._slab is None else self._slab.num_bytes

    def load(self, on_progress: OnProgress | None) -> tuple[Mapping[str, Tensor], LoadReport]:
        """Read and verify in host memory, copy; return views into the slab.

        Raises:
            SnapshotDamaged: The bytes read are not those that were built; nothing is held.
            OutOfMemory: The GPU has not enough free memory.
        """
        assert self._slab is None, "released first"
        self._slab = allocate_slab(self.total_bytes, self._device)
        try:
            _, report = self._on_host.load(on_progress)
            self._slab.tensor.copy_(self._on_host.bytes)
        except BaseException:
            self.release()
            raise
        finally:
            self._on_host.release()
        return self._on_host.views(self._slab.tensor), report

    def discard(self, weight: Tensor) -> None:
        """Keep it: every weight is used as it is."""

    def release(self) -> None:
        """Give the slab back."""
        if self._slab is not None:
            self._slab.release()
            self._slab = None
