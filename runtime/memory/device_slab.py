"""GPU memory whose address outlives it: reserved once, backed by memory only while it is mapped.

The CUDA driver's virtual memory: what is captured in a CUDA graph stays right after the memory was
given back and taken again, since addresses do not change.
"""

from typing import Any

import torch
from cuda.bindings import driver as cuda
from torch import Tensor

from runtime.errors import OutOfMemory


class DeviceSlab:
    """One range of addresses on the current GPU and the uint8 tensor over it; mapped at first.

    Args:
        num_bytes: Size; rounded up to the driver's granularity inside.

    Raises:
        OutOfMemory: The GPU has not that much free.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._properties = _properties(torch.cuda.current_device())
        granularity = _granularity(self._properties)
        self._mapped_bytes = -(-max(num_bytes, 1) // granularity) * granularity
        self._address = int(checked(cuda.cuMemAddressReserve(self._mapped_bytes, 0, 0, 0)))
        self._handle: Any = None
        try:
            self.map()
        except Exception:
            self.release()
            raise
        self._tensor: Tensor | None = torch.as_tensor(
            _Memory(self._address, num_bytes), device="cuda"
        )

    @property
    def num_bytes(self) -> int:
        """Size of the slab."""
        return self._num_bytes

    @property
    def tensor(self) -> Tensor:
        """All of the slab, uint8 [num_bytes]; not to be touched while it is unmapped."""
        assert self._tensor is not None, "the slab is released"
        return self._tensor

    @property
    def is_mapped(self) -> bool:
        """Whether there is memory behind the addresses."""
        return self._handle is not None

    def map(self) -> None:
        """Take memory; its content is undefined.

        Raises:
            OutOfMemory: The GPU has not that much free.
        """
        assert self._handle is None, "mapped already"
        error, handle = cuda.cuMemCreate(self._mapped_bytes, self._properties, 0)
        if error == cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free_bytes, total_bytes = torch.cuda.mem_get_info()
            raise OutOfMemory(
                f"the GPU has {free_bytes} of {total_bytes} bytes free, {self._mapped_bytes} are "
                "needed: park or stop what else uses it, or lower gpu_memory_utilization"
            )
        handle = checked((error, handle))
        try:
            self._back_with(handle)
        except Exception:
            cuda.cuMemUnmap(self._address, self._mapped_bytes)  # refused if it never was mapped
            cuda.cuMemRelease(handle)
            raise
        self._handle = handle

    def unmap(self) -> None:
        """Give the memory back and keep the addresses; waits for the GPU."""
        assert self._handle is not None, "unmapped already"
        torch.cuda.synchronize()
        checked(cuda.cuMemUnmap(self._address, self._mapped_bytes))
        checked(cuda.cuMemRelease(self._handle))
        self._handle = None

    def release(self) -> None:
        """Give memory and addresses back; views of the slab are dead."""
        if self._handle is not None:
            self.unmap()
        checked(cuda.cuMemAddressFree(self._address, self._mapped_bytes))
        self._tensor = None

    def _back_with(self, handle: Any) -> None:
        """Put memory behind the addresses and allow this GPU to use it."""
        checked(cuda.cuMemMap(self._address, self._mapped_bytes, 0, handle, 0))
        access = cuda.CUmemAccessDesc()
        access.location = self._properties.location
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        checked(cuda.cuMemSetAccess(self._address, self._mapped_bytes, [access], 1))


def settle_freed() -> None:
    """Take the least memory there is and give it back, for what the driver does on the way.

    Memory that was given back is cleared by the GPU, in a third of a second for 100 GiB. The driver
    takes note of that page by page when memory is next taken, however little, which is 40 ms then.
    """
    properties = _properties(torch.cuda.current_device())
    error, handle = cuda.cuMemCreate(_granularity(properties), properties, 0)
    if error != cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:  # who has all of it has waited for it
        checked(cuda.cuMemRelease(checked((error, handle))))


class _Memory:
    """What torch needs to see foreign memory as a tensor."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _properties(device: int) -> Any:
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device
    return properties


def _granularity(properties: Any) -> int:
    flags = cuda.CUmemAllocationGranularity_flags
    wanted = flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    return int(checked(cuda.cuMemGetAllocationGranularity(properties, wanted)))


def checked(result: tuple[Any, ...]) -> Any:
    """Return a driver call's value; raise if it failed."""
    error, *values = result
    if error != cuda.CUresult.CUDA_SUCCESS:
        _, name = cuda.cuGetErrorName(error)
        raise RuntimeError(f"CUDA driver: {name.decode()}")
    return values[0] if values else None
