"""The device a runner computes on: pinned copies, events and a stream, or none of it on the CPU.

The CPU stands in for a GPU in tests, where kernels run in Triton's interpreter.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import torch
from torch import Tensor

STACK_BYTES = 256

log = structlog.get_logger()


class Device:
    """One GPU and the stream on which everything runs in order.

    Args:
        name: "cuda", or "cpu" in tests.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_gpu = name == "cuda"
        if self.is_gpu:
            _shrink_stacks()
        self.stream = torch.cuda.Stream() if self.is_gpu else None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Launch what is inside on the stream, without gradients."""
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            yield

    def attach(self) -> None:
        """Make the device's context this thread's: cuBLAS, asked first, warns that there is none."""
        if self.stream is not None:
            self.stream.query()

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return host memory that the device can copy from and to on its own."""
        return torch.zeros(*shape, dtype=dtype, pin_memory=self.is_gpu)

    def upload(self, values: object, dtype: torch.dtype) -> Tensor:
        """Return numbers as a tensor on the device, without waiting for the stream."""
        host = torch.tensor(values, dtype=dtype, pin_memory=self.is_gpu)
        return host.to(self.name, non_blocking=True)

    def download(self, values: Tensor) -> Tensor:
        """Return host memory that holds a tensor's values when the stream has come this far."""
        on_host = self.pinned(*values.shape, dtype=values.dtype)
        on_host.copy_(values, non_blocking=True)
        return on_host

    def mark(self) -> "Mark":
        """Return a mark at the present end of the stream."""
        return Mark(self.stream)

    def work_bytes(self) -> int:
        """Return what torch holds of the device's memory; slabs are not torch's."""
        return torch.cuda.memory_reserved() if self.is_gpu else 0

    def drop_workspaces(self) -> None:
        """Give back cuBLAS's work memory, of which every thread that has used it has its own."""
        if self.is_gpu:
            self.synchronize()
            torch._C._cuda_clearCublasWorkspaces()

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        if self.stream is not None:
            self.stream.synchronize()


def _shrink_stacks() -> None:
    """Have the driver keep less memory for the stacks of all threads that can be resident.

    1 KiB each by default, 265 MiB on an H200. A kernel that needs more still gets it.
    """
    from cuda.bindings import driver  # only where there is one

    torch.cuda.current_stream().synchronize()  # makes the context
    (error,) = driver.cuCtxSetLimit(driver.CUlimit.CU_LIMIT_STACK_SIZE, STACK_BYTES)
    if error:
        log.warning("stacks_not_shrunk", reason=error.name)


class Mark:
    """A point in the stream that can be waited for."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._event = None
        if stream is not None:
            self._event = torch.cuda.Event()
            self._event.record(stream)

    def wait(self) -> None:
        """Return when the device has come that far."""
        if self._event is not None:
            self._event.synchronize()


class SideStream:
    """A second stream, for what the next kernels do not need; in a CUDA graph, a branch.

    Args:
        device: "cuda", or "cpu" in tests.
    """

    def __init__(self, device: str) -> None:
        self._stream = torch.cuda.Stream() if device == "cuda" else None

    @contextmanager
    def forked(self) -> Iterator[None]:
        """Launch what is inside after all before it and beside all after it, until `join`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Have what is launched next wait for what was forked."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
