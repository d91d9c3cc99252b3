"""What kernel launches need: block sizes, what the GPU is, and a compiler."""

import sys
from functools import cache

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.runtime.cache import triton_key

HOPPER = (9, 0)

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name in Triton 3.6


def next_power_of_2(size: int) -> int:
    """Return the smallest power of two that is at least `size`; Triton's blocks are such."""
    return 1 << max(0, size - 1).bit_length()


def head_block(head_dim: int) -> int:
    """Return the size of the block that holds a head: of matrix products 16 is the least."""
    return max(16, next_power_of_2(head_dim))


@cache
def is_hopper(device: torch.device) -> bool:
    """Return whether this GPU has the matrix instructions that kernels in Gluon are written for."""
    return torch.cuda.get_device_capability(device) == HOPPER


@cache
def num_processors(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def prepare_compiler() -> None:
    """Do what Triton does once a process before its first kernel, which takes half a second.

    It reads all of itself for a fingerprint and parses the kernels. That needs no GPU, so a zygote
    does it for the engines it forks.
    """
    triton_key()
    for name, module in list(sys.modules.items()):
        if name.startswith("runtime.kernels."):
            for kernel in vars(module).values():
                if isinstance(kernel, triton.JITFunction):
                    _ = kernel.cache_key  # kept by the kernel
