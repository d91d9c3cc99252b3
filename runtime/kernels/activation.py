"""The gate of the MLP, on the GPU."""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """Write silu(gate) * up.

    Args:
        gate_up: [num_tokens, 2 * size], gate before up.
        out: [num_tokens, size]; written.
    """
    size = out.shape[1]
    _silu_mul_kernel[(len(out), triton.cdiv(size, BLOCK))](gate_up, out, SIZE=size, BLOCK=BLOCK)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """Return what `silu_mul` writes, in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < SIZE
    gate_ptr = gate_up_ptr + token * 2 * SIZE + columns
    gate = tl.load(gate_ptr, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + SIZE, mask=is_column, other=0.0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + token * SIZE + columns, gated.to(out_ptr.dtype.element_ty), mask=is_column)
