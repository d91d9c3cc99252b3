"""How containers get at the GPUs of the machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pynvml

from controller.backends.base import BackendError

CONTROL_FILES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuAccess:
    """What a container with GPUs is given besides them.

    Attributes:
        device_files: Returns the files of GPUs by UUID, to be handed to the container; None asks
            the engine for the GPUs, which needs the NVIDIA Container Toolkit.
        mounts: Directories of the host that it sees, read-only, at the same place.
        kernel_cache: Directory of compiled kernels, which it may write; None keeps none, so that
            every runtime compiles its own.
    """

    device_files: Callable[[Sequence[str]], list[str]] | None = None
    mounts: tuple[Path, ...] = ()
    kernel_cache: Path | None = None


def gpu_device_files(uuids: Sequence[str]) -> list[str]:
    """Return the device files of GPUs and those that every CUDA process needs.

    Raises:
        BackendError: The driver does not know one.
    """
    try:
        pynvml.nvmlInit()
        minors = [
            pynvml.nvmlDeviceGetMinorNumber(pynvml.nvmlDeviceGetHandleByUUID(uuid))
            for uuid in uuids
        ]
    except pynvml.NVMLError as error:
        raise BackendError(
            f"the driver does not give the device files of {uuids}: {error}"
        ) from error
    control = [file for file in CONTROL_FILES if Path(file).exists()]
    return [f"/dev/nvidia{minor}" for minor in minors] + control
