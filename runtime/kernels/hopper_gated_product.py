"""Both products of a gated MLP and the gate itself, with Hopper's matrix instructions, in Gluon.

The two products never go to memory. A program takes tile after tile, each 128 tokens by as many
columns of gate and of up as registers hold sums of. A warp fetches what the tiles are products of
by the copy engine (TMA), the next tile's before this one has ended. Two groups of warps, 64 tokens
each, share the matrix units; one's products run beside the other's gate.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from runtime.kernels.launch import barrier, is_hopper, num_processors

TOKENS = 128  # of a tile
INPUTS = 64  # at a time
WIDTHS = {128: 4, 64: 4, 32: 8}  # columns of a tile, and slots of its ring
TILE_ROWS = 16  # that are multiplied with a column of tiles before the next, for the L2 cache
NUM_WARPS = 4  # of each group
REGISTERS = 232  # of each thread of theirs; the warp that fetches needs few
UNIT = min(WIDTHS)  # of a first column: one that is no multiple of 16 would slow the kernel


class Span(NamedTuple):
    """Columns that one launch computes.

    Attributes:
        start: The first.
        width: Of a tile.
        num_tiles: Beside each other.
    """

    start: int
    width: int
    num_tiles: int


def is_usable(weight: Tensor) -> bool:
    """Return whether this weight is on such a GPU, in 16 bits and in whole tiles."""
    num_outputs, num_inputs = weight.shape
    return (
        weight.is_cuda
        and weight.dtype.itemsize == 2
        and num_outputs % (2 * max(WIDTHS)) == 0
        and num_inputs % INPUTS == 0
        and is_hopper(weight.device)
    )


def is_faster(num_tokens: int) -> bool:
    """Return whether cuBLAS and a kernel for the gate take longer: measured on an H200.

    With few tokens ours wins only where its tiles are full.
    """
    return num_tokens >= 4 * TOKENS or num_tokens in (TOKENS, 2 * TOKENS)


def gated_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write silu(x @ gate.T) * (x @ up.T), where this `is_usable`.

    Args:
        x: [num_tokens, num_inputs].
        weight: [2 * size, num_inputs], gate before up.
        out: [num_tokens, size]; written.
    """
    num_rows = -(-len(x) // TOKENS)
    for span in spans(num_rows, out.shape[1], num_processors(x.device)):
        _launch(x, weight, out, num_rows, span)


def gated_product_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `gated_product` writes, in plain torch."""
    gate, up = (x @ weight.T).chunk(2, dim=-1)
    return F.silu(gate) * up


def run_every_width(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Launch every kernel that `gated_product` may use, so that it is compiled; arguments as there.

    Only some columns of `out` are written.
    """
    for width in WIDTHS:
        _launch(x, weight, out, 1, Span(0, width, 1))


@cache
def spans(num_rows: int, size: int, num_programs: int) -> tuple[Span, ...]:
    """Return who computes `size` columns of `num_rows` tiles.

    With one width, a last wave of few tiles would take as long as a full one. Its columns go to
    narrower tiles, the narrowest that one wave has room for.
    """
    *narrower, widest = sorted(WIDTHS)
    num_tiles = size // widest
    num_whole = num_rows * num_tiles // num_programs * num_programs // num_rows  # in full waves
    for width in narrower:
        num_narrow = (num_tiles - num_whole) * widest // width
        if num_whole and 0 < num_rows * num_narrow <= num_programs:
            return (Span(0, widest, num_whole), Span(num_whole * widest, width, num_narrow))
    return (Span(0, widest, num_tiles),)


def _launch(x: Tensor, weight: Tensor, out: Tensor, num_rows: int, span: Span) -> None:
    num_programs = min(num_rows * span.num_tiles, num_processors(x.device))
    _gated_product_kernel[(num_programs,)](
        _tiles(x, TOKENS, INPUTS),
        _tiles(weight, span.width, INPUTS),
        _tiles(out, TOKENS // 2, span.width),
        span.start // UNIT,
        num_rows,
        span.num_tiles,
        SLOTS=WIDTHS[span.width],
        TILE_ROWS=TILE_ROWS,
        UNIT=UNIT,
        REGISTERS=REGISTERS,
        num_warps=NUM_WARPS,
    )


def _tiles(matrix: Tensor, num_rows: int, num_columns: int) -> TensorDescriptor:
    dtype = gl.bfloat16 if matrix.dtype == torch.bfloat16 else gl.float16
    shape = [num_rows, num_columns]
    layout = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    return TensorDescriptor.from_tensor(matrix, shape, layout)


@gluon.jit
def _place(index, num_rows, num_columns, TILE_ROWS: gl.constexpr):
    first_row = index // (TILE_ROWS * num_columns) * TILE_ROWS
    height = gl.minimum(num_rows - first_row, TILE_ROWS)
    index -= first_row * num_columns
    return first_row + index % height, index // height


@gluon.jit
def _fetch(
    x_tiles,
    weight_tiles,
    x_ring,
    weight_ring,
    full,
    empty,
    start,
    num_rows,
    num_columns,
    TILE_ROWS: gl.constexpr,
):
    SLOTS: gl.constexpr = x_ring.shape[0]
    TOKENS: gl.constexpr = x_ring.shape[1]
    INPUTS: gl.constexpr = x_ring.shape[2]
    WIDTH: gl.constexpr = weight_ring.shape[1] // 2
    NUM_BYTES: gl.constexpr = x_tiles.block_type.nbytes + 2 * weight_tiles.block_type.nbytes
    size = weight_tiles.shape[0] // 2
    step = 0
    for index in range(gl.program_id(0), num_rows * num_columns, gl.num_programs(0)):
        row, column = _place(index, num_rows, num_columns, TILE_ROWS)
        gate = start + column * WIDTH
        for first_input in range(0, x_tiles.shape[1], INPUTS):
            slot = step % SLOTS
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), ((step // SLOTS) & 1) ^ 1)
            mbarrier.expect(ready, NUM_BYTES)
            weights = weight_ring.index(slot)
            tma.async_copy_global_to_shared(
                x_tiles, [row * TOKENS, first_input], ready, x_ring.index(slot)
            )
            tma.async_copy_global_to_shared(
                weight_tiles, [gate, first_input], ready, weights.slice(0, WIDTH)
            )
            tma.async_copy_global_to_shared(
                weight_tiles, [size + gate, first_input], ready, weights.slice(WIDTH, WIDTH)
            )
            step += 1


@gluon.jit
def _multiply(
    x_ring,
    weight_ring,
    gated,
    full,
    empty,
    out_tiles,
    start,
    num_rows,
    num_columns,
    num_steps,
    HALF: gl.constexpr,
    TILE_ROWS: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    SLOTS: gl.constexpr = x_ring.shape[0]
    TOKENS: gl.constexpr = gated.shape[1]
    WIDTH: gl.constexpr = gated.shape[2]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, 2 * WIDTH, 16])
    place = gated.index(HALF)
    step = 0
    for index in range(gl.program_id(0), num_rows * num_columns, gl.num_programs(0)):
        row, column = _place(index, num_rows, num_columns, TILE_ROWS)
        sums = gl.full([TOKENS, 2 * WIDTH], 0.0, gl.float32, SUMS)
        for inner in range(num_steps):
            slot = step % SLOTS
            mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
            x = x_ring.index(slot).slice(HALF * TOKENS, TOKENS)
            weights = weight_ring.index(slot).permute((1, 0))
            sums = warpgroup_mma(x, weights, sums, use_acc=inner > 0, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[sums])
            mbarrier.arrive(empty.index((step + SLOTS - 1) % SLOTS), count=1, pred=inner > 0)
            step += 1
        sums = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(empty.index((step + SLOTS - 1) % SLOTS), count=1)
        gate, up = gl.split(sums.reshape([TOKENS, 2, WIDTH]).permute((0, 2, 1)))
        result = gate * up / (1.0 + gl.exp2(gate * -1.4426950408889634))  # log2(e)
        tma.store_wait(0)  # of the tile before
        barrier()
        place.store(result.to(gated.dtype))
        fence_async_shared()
        barrier()
        corner = [(2 * row + HALF) * TOKENS, start + column * WIDTH]
        tma.async_copy_shared_to_global(out_tiles, corner, place)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["start", "num_rows", "num_columns"])
def _gated_product_kernel(
    x_tiles,
    weight_tiles,
    out_tiles,
    start,
    num_rows,
    num_columns,
    SLOTS: gl.constexpr,
    TILE_ROWS: gl.constexpr,
    UNIT: gl.constexpr,
    REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = x_tiles.dtype
    TOKENS: gl.constexpr = x_tiles.block_type.shape[0]
    INPUTS: gl.constexpr = x_tiles.block_type.shape[1]
    WIDTH: gl.constexpr = weight_tiles.block_type.shape[0]
    start *= UNIT
    num_steps = x_tiles.shape[1] // INPUTS
    x_ring = gl.allocate_shared_memory(dtype, [SLOTS, TOKENS, INPUTS], x_tiles.layout)
    weight_ring = gl.allocate_shared_memory(dtype, [SLOTS, 2 * WIDTH, INPUTS], weight_tiles.layout)
    gated = gl.allocate_shared_memory(dtype, [2, TOKENS // 2, WIDTH], out_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    gl.warp_specialize(
        [
            (_multiply, (x_ring, weight_ring, gated, full, empty, out_tiles, start, num_rows,
                         num_columns, num_steps, 0, TILE_ROWS, num_warps)),
            (_multiply, (x_ring, weight_ring, gated, full, empty, out_tiles, start, num_rows,
                         num_columns, num_steps, 1, TILE_ROWS, num_warps)),
            (_fetch, (x_tiles, weight_tiles, x_ring, weight_ring, full, empty, start, num_rows,
                      num_columns, TILE_ROWS)),
        ],
        [num_warps, 1],
        [REGISTERS, 24],
    )  # fmt: skip
