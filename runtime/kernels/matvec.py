"""Product of a weight matrix and one vector, on the GPU.

With one token a step, a model reads all its weights for two operations each. cuBLAS reaches 3.7 of
the 4.3 TB/s that memory gives; a kernel that only streams rows comes closer.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 4
BLOCK_COLUMNS = 1024
NUM_AHEAD = 4  # loads of a program that are under way together


def matvec(weight: Tensor, x: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write weight @ x, or add it to what is there.

    Args:
        weight: [num_rows, size], contiguous; a multiple of four rows.
        x: [1, size].
        out: [1, num_rows], of any dtype; written.
        add: Whether to add to `out`.
    """
    num_rows, size = weight.shape
    _matvec_kernel[(triton.cdiv(num_rows, BLOCK_ROWS),)](
        weight,
        x,
        out,
        SIZE=size,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        NUM_AHEAD=NUM_AHEAD,
        ADD=add,
        num_warps=4,
    )


def matvec_reference(weight: Tensor, x: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Do what `matvec` does, in plain torch."""
    product = (x.float() @ weight.float().t()).to(out.dtype)
    out.copy_(out + product if add else product)


@triton.jit
def _matvec_kernel(
    weight_ptr,
    x_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_AHEAD: tl.constexpr,
    ADD: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lanes = tl.arange(0, BLOCK_COLUMNS)
    row_ptr = weight_ptr + rows[:, None] * SIZE
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in tl.range(0, SIZE, BLOCK_COLUMNS, loop_unroll_factor=NUM_AHEAD):
        columns = first + lanes
        is_column = columns < SIZE
        if SIZE % BLOCK_COLUMNS == 0:
            x = tl.load(x_ptr + columns)
            weight = tl.load(row_ptr + columns[None, :], eviction_policy="evict_first")
        else:
            x = tl.load(x_ptr + columns, mask=is_column, other=0.0)
            weight = tl.load(
                row_ptr + columns[None, :],
                mask=is_column[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
        acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    product = tl.sum(acc, 1)
    if ADD:
        product += tl.load(out_ptr + rows).to(tl.float32)
    tl.store(out_ptr + rows, product.to(out_ptr.dtype.element_ty))
