"""The CUDA context of this process, made in a thread of its own while others read files."""

import os
import threading

from cuda.bindings import driver

from runtime.errors import LoadFailed
from runtime.memory.device_slab import checked

NUM_CONNECTIONS = "1"
"""Queues of the GPU that streams are spread over, by default 8. Each takes 6 ms to be parked and 7
to come back, on an H200, and steps of an engine run one after the other."""


class ContextInMaking:
    """The primary context of the first GPU this process sees, as torch uses it.

    To make it takes the driver 0.1 to 0.3 s, in which it does not hold the interpreter.
    """

    def __init__(self) -> None:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", NUM_CONNECTIONS)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._make, name="context", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when it is there.

        Raises:
            LoadFailed: The driver makes none.
        """
        self._thread.join()
        if self._error is not None:
            raise LoadFailed(
                f"GPU {os.environ.get('CUDA_VISIBLE_DEVICES')} cannot be used ({self._error}): "
                "look at it with nvidia-smi, and whether the runtime has been given the device"
            ) from self._error

    def _make(self) -> None:
        try:
            checked(driver.cuInit(0))
            checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(0))))
        except Exception as error:  # noqa: BLE001  # the thread that waits raises it
            self._error = error
