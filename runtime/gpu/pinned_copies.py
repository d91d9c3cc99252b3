"""Copies to the GPU that run on their own, straight from the CUDA driver.

A copy through torch holds the interpreter for 150 µs, for which whoever launches kernels in
another thread waits; the driver's own call takes 5 and holds nothing.
"""

import structlog
import torch
from cuda.bindings import driver

from runtime.memory.device_slab import checked

log = structlog.get_logger()


class PinnedCopies:
    """A piece of host memory, registered with the driver, and a stream for copies from it.

    The calling thread has the current GPU's context from then on.

    Args:
        address: Where the memory is.
        num_bytes: Its size; registering takes a tenth of the time once its pages were touched.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        self._address = address
        self._cudart = torch.cuda.cudart()
        error = int(self._cudart.cudaHostRegister(address, num_bytes, 0))
        if error:  # copies from it are right, only slow
            log.warning("memory_not_pinned", num_bytes=num_bytes, cuda_error=error)
        self._is_pinned = not error
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = checked(driver.cuStreamCreate(flags))

    def start(self, target: int, num_bytes: int) -> None:
        """Start to copy the leading bytes to an address on the GPU."""
        checked(driver.cuMemcpyHtoDAsync(target, self._address, num_bytes, self._stream))

    def wait(self) -> None:
        """Return when the memory can be written again."""
        checked(driver.cuStreamSynchronize(self._stream))

    def close(self) -> None:
        """Wait, and let go of the memory."""
        self.wait()
        checked(driver.cuStreamDestroy(self._stream))
        if self._is_pinned:
            self._cudart.cudaHostUnregister(self._address)
            self._is_pinned = False
