"""What every kernel launch needs: block sizes and a compiler."""

import importlib
import sys

import triton
from triton.runtime.cache import triton_key


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least `size`; Triton's blocks are such."""
    return 1 << max(0, size - 1).bit_length()


def prepare_compiler() -> None:
    """Do what Triton does once a process before its first kernel, which takes half a second.

    It reads all of itself for a fingerprint, imports its other dialect and parses the kernels. That
    needs no GPU, so a zygote does it for the engines it forks.
    """
    triton_key()
    importlib.import_module("triton.experimental.gluon")
    for name, module in list(sys.modules.items()):
        if name.startswith("runtime.kernels."):
            for kernel in vars(module).values():
                if isinstance(kernel, triton.JITFunction):
                    _ = kernel.cache_key  # kept by the kernel
