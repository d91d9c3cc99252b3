"""Host memory that goes back to the operating system when it is released.

An anonymous mapping instead of malloc: what is freed there may stay in the process's arenas.
Pages are taken when they are first written.
"""

import ctypes
import mmap
from typing import Protocol

import torch
from torch import Tensor

PAGE_BYTES = mmap.PAGESIZE


class Slab(Protocol):
    """Memory that goes back to whoever gave it, all at once."""

    @property
    def num_bytes(self) -> int:
        """Size."""

    @property
    def tensor(self) -> Tensor:
        """All of it, uint8 [num_bytes]; views of it die with `release`."""

    @property
    def is_mapped(self) -> bool:
        """Whether there is memory behind the addresses; so at first."""

    def map(self) -> None:
        """Take memory again, at the same addresses; its content is undefined."""

    def unmap(self) -> None:
        """Give the memory back and keep the addresses: views are right again after `map`."""

    def release(self) -> None:
        """Give memory and addresses back."""


class HostSlab:
    """One mapping and the uint8 tensor over it.

    Args:
        num_bytes: Size; address space only, until written.
        huge_pages: Whether to take 2 MiB at a time: fewer page faults when all of it is written.
    """

    def __init__(self, num_bytes: int, *, huge_pages: bool) -> None:
        self._num_bytes = num_bytes
        self._mapping = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE)
        if huge_pages:
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._tensor: Tensor | None = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._is_mapped = True

    @property
    def num_bytes(self) -> int:
        """Size of the slab."""
        return self._num_bytes

    @property
    def is_mapped(self) -> bool:
        """Whether it counts as taken."""
        return self._is_mapped

    def map(self) -> None:
        """Count as taken again; pages come when they are written."""
        assert not self._is_mapped, "mapped already"
        self._is_mapped = True

    def unmap(self) -> None:
        """Give all pages back and keep the addresses."""
        assert self._is_mapped, "unmapped already"
        self._mapping.madvise(mmap.MADV_DONTNEED)
        self._is_mapped = False

    @property
    def tensor(self) -> Tensor:
        """All of the slab, uint8 [num_bytes]; views of it die with `release`."""
        assert self._tensor is not None, "the slab is released"
        return self._tensor[: self.num_bytes]

    def discard(self, view: Tensor) -> int:
        """Give back the whole pages under a contiguous view; return their bytes.

        The view reads as zeros from now on.
        """
        start = view.data_ptr() - self.tensor.data_ptr()
        first = -(-start // PAGE_BYTES) * PAGE_BYTES
        end = (start + view.nbytes) // PAGE_BYTES * PAGE_BYTES
        if end <= first:
            return 0
        self._mapping.madvise(mmap.MADV_DONTNEED, first, end - first)
        return end - first

    def release(self) -> None:
        """Give all memory back, even if somebody still holds a view; the mapping goes with it."""
        self._mapping.madvise(mmap.MADV_DONTNEED)
        self._tensor = None


def trim_malloc() -> None:
    """Give back what malloc keeps of freed memory, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
