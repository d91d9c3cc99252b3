"""Where a runner's weights come from: a snapshot's rank file, read into one slab."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from runtime.errors import SnapshotDamaged
from runtime.memory.slab import HostSlab
from snapshots.errors import ManifestError, SnapshotCorrupted
from snapshots.loader import TORCH_DTYPES, LoadReport, OpenRank, load_rank, open_rank, views

OnProgress = Callable[[int, int], None]


class Weights(Protocol):
    """Named tensors that can be there or not."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors."""

    @property
    def total_bytes(self) -> int:
        """Memory they take when loaded."""

    @property
    def held_bytes(self) -> int:
        """Memory they take now."""

    def load(self, on_progress: OnProgress | None) -> tuple[Mapping[str, Tensor], LoadReport]:
        """Bring them into memory."""

    def discard(self, weight: Tensor) -> None:
        """Give back the memory of one that is not used any more."""

    def release(self) -> None:
        """Give back all memory; views are dead."""


class SnapshotWeights:
    """One rank of a snapshot.

    Args:
        snapshot: Its directory.
        tensor_parallel_size: Number of ranks.
        rank: Which one.

    Raises:
        SnapshotDamaged: The header is not what the manifest says.
    """

    def __init__(self, snapshot: Path, *, tensor_parallel_size: int = 1, rank: int = 0) -> None:
        self._rank = checked_rank(snapshot, tensor_parallel_size=tensor_parallel_size, rank=rank)
        self._slab: HostSlab | None = None
        self._discarded_bytes = 0

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
        """Size of the slab less what was discarded; 0 before `load`."""
        return 0 if self._slab is None else self._slab.num_bytes - self._discarded_bytes

    def load(self, on_progress: OnProgress | None) -> tuple[Mapping[str, Tensor], LoadReport]:
        """Read and verify; return views into the slab.

        Raises:
            SnapshotDamaged: The bytes read are not those that were built; nothing is held.
        """
        assert self._slab is None, "released first"
        self._slab = HostSlab(self._rank.data_bytes, huge_pages=True)
        self._discarded_bytes = 0
        try:
            report = load_rank(self._rank, self._slab.tensor, on_progress=on_progress)
        except SnapshotCorrupted as error:
            self.release()
            raise SnapshotDamaged(str(error)) from error
        return views(self._rank, self._slab.tensor), report

    def discard(self, weight: Tensor) -> None:
        """Give back the whole pages under a view."""
        assert self._slab is not None, "loaded first"
        self._discarded_bytes += self._slab.discard(weight)

    def release(self) -> None:
        """Unmap the slab."""
        if self._slab is not None:
            self._slab.release()
            self._slab = None


def checked_rank(snapshot: Path, *, tensor_parallel_size: int = 1, rank: int = 0) -> OpenRank:
    """Open a rank's file and check its header; reads no weights.

    Raises:
        SnapshotDamaged: The header is not what the manifest says.
    """
    try:
        return open_rank(snapshot, tensor_parallel_size=tensor_parallel_size, rank=rank)
    except (ManifestError, SnapshotCorrupted) as error:
        raise SnapshotDamaged(str(error)) from error


def dtype_of(rank: OpenRank) -> torch.dtype:
    """Return the dtype of the embedding, which is that of all tensors."""
    return TORCH_DTYPES[rank.tensors["embed_tokens.weight"].dtype]
