"""Slabs and figures of a device's memory; the CPU stands in for a GPU in tests."""

import os

import torch

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


def device_memory(device: str) -> DeviceMemory:
    """Return how much memory the device has, and how much of it is free."""
    if device == "cpu":
        total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return DeviceMemory(total_bytes=total_bytes, free_bytes=total_bytes)
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return DeviceMemory(total_bytes=total_bytes, free_bytes=free_bytes)
