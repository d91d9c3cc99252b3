"""The CUDA driver's checkpoints of another process: what a GPU still holds of it goes to the host.

CUDA driver API, since 12.8 (driver 570): cuCheckpointProcessLock, -Checkpoint, -Restore, -Unlock.
The caller has called cuInit and has no context of its own. Until it is restored, the process runs
on but waits in its next call into CUDA. Addresses, kernels and CUDA graphs come back as they were.
Memory should be unmapped before: a process with its weights takes ten seconds. No torch.
"""

import ctypes
import time
from collections.abc import Callable
from typing import Any, Self

from runtime.rpc import inference_pb2 as pb

LIBRARY = "libcuda.so.1"
LOCK_TIMEOUT_MS = 5_000
KEPT_BYTES = 8 << 20
"""What stays on a GPU of a process that is checkpointed; 4 MiB were seen on an H200."""

_SUCCESS = 0
_RESULTS = {
    1: "invalid value: is the process gone?",
    2: "out of memory",
    3: "not initialized",
    100: "no device",
    304: "refused by the operating system",
    401: "the process is not in the state for it",
    800: "not permitted",
    801: "not supported",
    999: "unknown error",
}
_Arguments = ctypes.c_uint64 * 8
"""Every call takes 64 bytes that are zero but for Lock's time limit."""


class CheckpointFailed(Exception):
    """The driver would not do it.

    Args:
        message: What was asked for and the answer.
        is_fatal: Whether the process may be stuck, so that only killing it helps.
    """

    def __init__(self, message: str, *, is_fatal: bool = False) -> None:
        super().__init__(message)
        self.is_fatal = is_fatal


class ProcessCheckpoints:
    """Takes processes off their GPUs and puts them back; every call blocks.

    Args:
        driver: The CUDA driver library, initialized.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    @classmethod
    def open(cls, load: Callable[[str], Any] = ctypes.CDLL) -> Self:
        """Load and initialize the driver.

        Raises:
            CheckpointFailed: There is none, it finds no GPU, or it is too old.
        """
        try:
            driver = load(LIBRARY)
        except OSError as error:
            raise CheckpointFailed(f"there is no CUDA driver: {error}") from error
        if not hasattr(driver, "cuCheckpointProcessCheckpoint"):
            raise CheckpointFailed("the CUDA driver is older than 570 and checkpoints no process")
        _check("cuInit", driver.cuInit(0))
        return cls(driver)

    def suspend(self, pid: int) -> list[pb.Phase]:
        """Move what the GPUs hold of a process to the host; returns how long the parts took.

        Raises:
            CheckpointFailed: It could not be done; unless fatal, the process goes on as before.
        """
        began = time.monotonic()
        self._call("Lock", pid, LOCK_TIMEOUT_MS)
        locked = time.monotonic()
        try:
            self._call("Checkpoint", pid)
        except CheckpointFailed as failure:
            try:
                self._call("Unlock", pid)
            except CheckpointFailed as stuck:
                raise CheckpointFailed(f"{failure}, and then {stuck}", is_fatal=True) from failure
            raise
        return [
            pb.Phase(name="lock", seconds=locked - began),
            pb.Phase(name="checkpoint", seconds=time.monotonic() - locked),
        ]

    def resume(self, pid: int) -> list[pb.Phase]:
        """Reverse `suspend`; returns how long the parts took.

        The GPUs must have room for what they held: a restore that fails costs the process.

        Raises:
            CheckpointFailed: The process is lost; kill it.
        """
        began = time.monotonic()
        try:
            self._call("Restore", pid)
            restored = time.monotonic()
            self._call("Unlock", pid)
        except CheckpointFailed as failure:
            raise CheckpointFailed(str(failure), is_fatal=True) from failure
        return [
            pb.Phase(name="restore", seconds=restored - began),
            pb.Phase(name="unlock", seconds=time.monotonic() - restored),
        ]

    def _call(self, name: str, pid: int, first_argument: int = 0) -> None:
        function = f"cuCheckpointProcess{name}"
        arguments = _Arguments(first_argument)
        result = getattr(self._driver, function)(ctypes.c_int(pid), ctypes.byref(arguments))
        _check(f"{function} of process {pid}", result)


def _check(what: str, result: int) -> None:
    if result != _SUCCESS:
        raise CheckpointFailed(f"{what}: {_RESULTS.get(result, 'error')} ({result})")
