"""Pinned host memory that processes share, straight from the CUDA driver. No torch.

CUDA's virtual memory management, for memory of the host: cuMemCreate with a NUMA node as location
and a descriptor as handle. It needs no context, so who holds it has nothing on any GPU. A process
that imports the descriptor copies from it at the full speed of the bus, with no work for a core,
where pages of the page cache are copied to pinned buffers first.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Protocol, Self

from runtime.host_cache.protocol import PAGE_BYTES, padded

LIBRARY = "libcuda.so.1"

_SUCCESS = 0
_OUT_OF_MEMORY = 2
_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_POSIX_FILE_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_HOST_NUMA = 3  # CU_MEM_LOCATION_TYPE_HOST_NUMA
_READ_AND_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
_HOST_NUMA_ID = 134  # CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID
_HOST_NUMA_MEMORY = 141  # CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED

Fill = Callable[[memoryview], None]


class HostMemoryError(Exception):
    """There is no pinned memory to be had, or not enough; the message says why."""


class HostMemory(Protocol):
    """Where memory comes from that other processes can map."""

    def filled(self, num_bytes: int, fill: Fill) -> int:
        """Return a descriptor of new memory, the only thing that keeps it.

        Args:
            num_bytes: Its size; what it really takes may be rounded up.
            fill: Called with all of it, to write its content.

        Raises:
            HostMemoryError: There is not that much.
        """


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("reserved", ctypes.c_uint64 * 2),
    )


class _Access(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class DriverMemory:
    """The driver's pinned memory, on the NUMA node of the first GPU.

    Args:
        driver: The CUDA driver library, initialized.

    Raises:
        HostMemoryError: It cannot do this on this machine.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        if not self._attribute(_HOST_NUMA_MEMORY):
            raise HostMemoryError("the CUDA driver shares no host memory on this machine")
        node = max(0, self._attribute(_HOST_NUMA_ID))
        self._location = _Location(_HOST_NUMA, node)
        self._properties = _Properties(_PINNED, _POSIX_FILE_DESCRIPTOR, self._location)
        granularity = ctypes.c_size_t()
        self._call(
            "cuMemGetAllocationGranularity",
            *(ctypes.byref(granularity), ctypes.byref(self._properties), 0),
        )
        if PAGE_BYTES % granularity.value:
            raise HostMemoryError(f"the CUDA driver shares memory in {granularity.value} bytes")

    @classmethod
    def open(cls) -> Self:
        """Load and initialize the driver.

        Raises:
            HostMemoryError: There is none, it finds no GPU, or it cannot do this.
        """
        try:
            driver = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise HostMemoryError(f"there is no CUDA driver: {error}") from error
        if result := driver.cuInit(0):
            raise HostMemoryError(f"the CUDA driver does not start: cuInit gives {result}")
        return cls(driver)

    def filled(self, num_bytes: int, fill: Fill) -> int:
        """Return a descriptor of new memory; see `HostMemory`."""
        size = ctypes.c_size_t(padded(num_bytes))
        handle, descriptor = ctypes.c_uint64(), ctypes.c_int(-1)
        self._call(
            "cuMemCreate",
            *(ctypes.byref(handle), size, ctypes.byref(self._properties), ctypes.c_uint64(0)),
        )
        try:
            self._write(handle, size, num_bytes, fill)
            self._call(
                "cuMemExportToShareableHandle",
                *(ctypes.byref(descriptor), handle, _POSIX_FILE_DESCRIPTOR, ctypes.c_uint64(0)),
            )
        finally:
            self._driver.cuMemRelease(handle)
        return descriptor.value

    def _write(
        self, handle: ctypes.c_uint64, size: ctypes.c_size_t, num_bytes: int, fill: Fill
    ) -> None:
        """Map memory for as long as it is written."""
        zero = ctypes.c_size_t(0)
        address = ctypes.c_uint64()
        self._call(
            "cuMemAddressReserve",
            *(ctypes.byref(address), size, zero, ctypes.c_uint64(0), ctypes.c_uint64(0)),
        )
        try:
            self._call("cuMemMap", address, size, zero, handle, ctypes.c_uint64(0))
            try:
                access = _Access(self._location, _READ_AND_WRITE)
                self._call(
                    "cuMemSetAccess", address, size, ctypes.byref(access), ctypes.c_size_t(1)
                )
                memory = (ctypes.c_char * num_bytes).from_address(address.value)
                fill(memoryview(memory).cast("B"))
            finally:
                self._driver.cuMemUnmap(address, size)
        finally:
            self._driver.cuMemAddressFree(address, size)

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, 0)
        return value.value

    def _call(self, function: str, *arguments: object) -> None:
        result = getattr(self._driver, function)(*arguments)
        if result == _OUT_OF_MEMORY:
            raise HostMemoryError("the host has not that much memory left to pin")
        if result != _SUCCESS:
            raise HostMemoryError(f"{function} of the CUDA driver gives {result}")
