"""Slabs and figures of a device's memory; the CPU stands in for a GPU in tests."""

import math
import os

import torch
from torch import Tensor

from runtime.gpu.device import Device
from runtime.memory.kv_plan import DeviceMemory
from runtime.memory.slab import HostSlab, Slab


def allocate_slab(num_bytes: int, device: str) -> Slab:
    """Return a slab on the device.

    Raises:
        OutOfMemory: There is not that much free.
    """
    if device == "cpu":
        return HostSlab(num_bytes, huge_pages=False)
    from runtime.memory.device_slab import DeviceSlab  # needs CUDA's driver library

    return DeviceSlab(num_bytes)


def settle_freed(device: str) -> None:
    """Have the driver finish with memory that was given back a while ago."""
    if device == "cpu":
        return
    from runtime.memory.device_slab import settle_freed as settle_freed_of_gpu

    settle_freed_of_gpu()


class WorkMemory:
    """Large buffers that mean nothing between batches, so that they go when the weights go.

    Args:
        device: Where; its stream sees them filled with zeros, at first and after each `restore`.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._slabs: list[Slab] = []

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a new buffer, which keeps its address.

        Raises:
            OutOfMemory: There is not that much free.
        """
        slab = allocate_slab(math.prod(shape) * dtype.itemsize, self._device.name)
        buffer = slab.tensor.view(dtype).view(shape)
        self._slabs.append(slab)
        self._clear(slab)
        return buffer

    def release(self) -> None:
        """Give the memory of all buffers back, unless it is."""
        for slab in self._slabs:
            if slab.is_mapped:
                slab.unmap()

    def restore(self) -> None:
        """Take memory for all buffers again, unless they have it.

        Raises:
            OutOfMemory: There is not enough free; those that have some keep it.
        """
        for slab in self._slabs:
            if not slab.is_mapped:
                slab.map()
                self._clear(slab)

    def _clear(self, slab: Slab) -> None:
        with self._device.computing():
            slab.tensor.zero_()


def device_memory(device: str) -> DeviceMemory:
    """Return how much memory the device has, and how much of it is free."""
    if device == "cpu":
        total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return DeviceMemory(total_bytes=total_bytes, free_bytes=total_bytes)
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return DeviceMemory(total_bytes=total_bytes, free_bytes=free_bytes)
