"""Parts of a file in host memory that another process holds, as the GPU copies from them.

The CPU stands in for a GPU in tests: there a part is any descriptor that can be mapped.
"""

import mmap
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor

from runtime.host_cache.protocol import padded

Wait = Callable[[], None]


class HostParts(Protocol):
    """Maps parts and copies from them."""

    def enter(self) -> None:
        """Prepare the calling thread, the one that will copy."""

    def copy(self, descriptor: int, num_bytes: int, start: int, target: Tensor) -> Wait:
        """Map a part and start to copy from it; return what waits for that.

        Args:
            descriptor: The part, which may be closed afterwards.
            num_bytes: Its size.
            start: Where in it to begin.
            target: uint8 [num_bytes to copy], on the device.
        """

    def close(self) -> None:
        """Wait for all copies and unmap all parts; from any thread with the context."""


def open_parts(device: str) -> HostParts:
    """Return a device's way to parts; for "cuda", in a thread that has its context."""
    return MappedParts() if device == "cpu" else DriverParts()


class MappedParts:
    """Parts that are mapped as files are; copies are over when they return."""

    def enter(self) -> None:
        """Do nothing: any thread can."""

    def copy(self, descriptor: int, num_bytes: int, start: int, target: Tensor) -> Wait:
        """Copy; see `HostParts`."""
        with mmap.mmap(descriptor, num_bytes) as pages:
            source = torch.frombuffer(pages, dtype=torch.uint8, offset=start, count=len(target))
            with torch.inference_mode():  # which the thread that made the slab may be in
                target.copy_(source)
            del source  # else the pages cannot be unmapped
        return lambda: None

    def close(self) -> None:
        """Do nothing: each part is unmapped already."""


class DriverParts:
    """Parts in the CUDA driver's pinned memory, which the current GPU gets access to.

    To give access takes a third of the time of the copy, so it goes on while the part before is
    copied, in the same thread: copies run on their own.
    """

    def __init__(self) -> None:
        from cuda.bindings import driver  # only where there is one

        from runtime.memory.device_slab import checked

        self._driver, self._checked = driver, checked
        self._context = checked(driver.cuCtxGetCurrent())
        self._stream: driver.CUstream | None = None
        self._access = driver.CUmemAccessDesc()
        self._access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._access.location.id = torch.cuda.current_device()
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._mapped: list[ExitStack] = []

    def enter(self) -> None:
        """Prepare the calling thread."""
        cu, checked = self._driver, self._checked
        checked(cu.cuCtxSetCurrent(self._context))
        self._stream = checked(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def copy(self, descriptor: int, num_bytes: int, start: int, target: Tensor) -> Wait:
        """Map a part and start to copy; see `HostParts`."""
        cu, checked = self._driver, self._checked
        address = self._map(descriptor, padded(num_bytes))
        checked(cu.cuMemcpyAsync(target.data_ptr(), address + start, len(target), self._stream))
        event = checked(cu.cuEventCreate(cu.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        checked(cu.cuEventRecord(event, self._stream))

        def wait() -> None:
            checked(cu.cuEventSynchronize(event))
            checked(cu.cuEventDestroy(event))

        return wait

    def close(self) -> None:
        """Unmap all parts."""
        cu, checked = self._driver, self._checked
        if self._stream is None:
            return
        checked(cu.cuStreamSynchronize(self._stream))
        checked(cu.cuStreamDestroy(self._stream))
        self._stream = None
        for part in self._mapped:
            part.close()
        self._mapped.clear()

    def _map(self, descriptor: int, size: int) -> int:
        """Return where the GPU finds a part."""
        cu, checked = self._driver, self._checked
        kind = cu.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        with ExitStack() as undo:
            handle = checked(cu.cuMemImportFromShareableHandle(descriptor, kind))
            undo.callback(cu.cuMemRelease, handle)
            address = int(checked(cu.cuMemAddressReserve(size, 0, 0, 0)))
            undo.callback(cu.cuMemAddressFree, address, size)
            checked(cu.cuMemMap(address, size, 0, handle, 0))
            undo.callback(cu.cuMemUnmap, address, size)
            checked(cu.cuMemSetAccess(address, size, [self._access], 1))
            self._mapped.append(undo.pop_all())
        return address
