"""RMSNorm of rows, on the GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.launch import next_power_of_2


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """Normalize rows to a root mean square of 1, in fp32, and scale.

    Args:
        x: [num_rows, size].
        weight: [size].
        eps: Added to the mean square.
        out: [num_rows, size]; written.
    """
    size = x.shape[1]
    block = next_power_of_2(size)
    _rms_norm_kernel[(len(out),)](
        x,
        weight,
        out,
        eps,
        SIZE=size,
        BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
    )


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return what `rms_norm` writes, in plain torch and the dtype of x."""
    normed = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < SIZE
    x = tl.load(x_ptr + row * SIZE + columns, mask=is_column, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    normed = (x * scale).to(weight.dtype)
    tl.store(out_ptr + row * SIZE + columns, normed * weight, mask=is_column)
