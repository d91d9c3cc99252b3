"""Causal attention of chunks with Hopper's matrix instructions, which Triton's dialect Gluon has.

What `chunk_attention` computes, and as it does. A unit of work is a tile of queries of two heads
that share their keys; each of as many programs as there are multiprocessors takes one unit after
the other. A warp fetches queries, keys and values by the copy engine (TMA) some steps ahead, the
next unit's too. Two groups of warps, one a head, share the matrix units: one's products run beside
the other's softmax, and the products of some keys beside those of the values before them
(FlashAttention 3).
"""

import torch
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

PIECE = 64  # rows that are copied at once: a tile's queries, keys of one block of the cache
KEYS = 128  # at a time
SLOTS = 4  # of the ring of keys and values, a tile each
NUM_WARPS = 4  # of each head
REGISTERS = 240  # of each thread of theirs; the warp that fetches needs few
HEAD_DIMS = (64, 128)


def is_usable(kv_cache: Tensor, num_heads: int) -> bool:
    """Return whether this cache is on such a GPU, in 16 bits and in blocks of whole pieces.

    Two of the heads must have their keys in common.
    """
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    return (
        kv_cache.is_cuda
        and kv_cache.dtype.itemsize == 2
        and head_dim in HEAD_DIMS
        and block_size % PIECE == 0
        and num_heads // num_kv_heads % 2 == 0
        and is_hopper(kv_cache.device)
    )


def attend(
    qkv: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    *,
    tiles: Tensor,
    block_tables: Tensor,
    scale: float,
) -> None:
    """Attend as `chunk_attention` does where this `is_usable`; all but `scale` is as there.

    `scale` is what a score is multiplied by to be an exponent of two.
    """
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_heads = out.shape[1] // head_dim
    dtype = gl.bfloat16 if kv_cache.dtype == torch.bfloat16 else gl.float16
    shape = [PIECE, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(shape, dtype)
    num_units = len(tiles) * num_heads // 2
    _hopper_kernel[(min(num_units, num_processors(out.device)),)](
        TensorDescriptor.from_tensor(qkv, shape, layout),
        TensorDescriptor.from_tensor(kv_cache.view(-1, head_dim), shape, layout),
        out,
        tiles,
        block_tables,
        num_units,
        scale,
        TABLE_STRIDE=block_tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE=block_size,
        KEYS=KEYS,
        SLOTS=SLOTS,
        REGISTERS=REGISTERS,
        num_warps=NUM_WARPS,
    )


@gluon.jit
def _unit(step, num_units, tiles_ptr, NUM_PAIRS: gl.constexpr):
    # The units of every other round are taken in reverse, so that all programs have as much to do.
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    place = program + step % 2 * (num_programs - 1 - 2 * program)
    unit = step * num_programs + place
    is_unit = unit < num_units
    tile_ptr = tiles_ptr + gl.where(is_unit, unit // NUM_PAIRS, 0) * 4  # see `Tile`
    num_queries = gl.load(tile_ptr + 3)
    num_queries = gl.where(is_unit, num_queries, 0)
    row, batch_row, first_token = gl.load(tile_ptr), gl.load(tile_ptr + 1), gl.load(tile_ptr + 2)
    return 2 * (unit % NUM_PAIRS), row, batch_row, first_token, num_queries


@gluon.jit
def _fetch(
    q_tiles,
    kv_tiles,
    tiles_ptr,
    block_tables_ptr,
    num_units,
    num_steps,
    qs,
    ring,
    q_full,
    q_empty,
    full,
    empty,
    TABLE_STRIDE: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    PAGE: gl.constexpr,
):
    QUERIES: gl.constexpr = qs.shape[1]
    HEAD_DIM: gl.constexpr = qs.shape[2]
    SLOTS: gl.constexpr = ring.shape[0]
    KEYS: gl.constexpr = ring.shape[1]
    PIECE: gl.constexpr = kv_tiles.block_type.shape[0]
    taken = 0  # units
    filled = 0  # slots of the ring, ever
    upcoming = _unit(0, num_units, tiles_ptr, NUM_HEADS // 2)
    for step in range(num_steps):
        head, row, batch_row, first_token, num_queries = upcoming
        upcoming = _unit(step + 1, num_units, tiles_ptr, NUM_HEADS // 2)
        if num_queries > 0:
            table_ptr = block_tables_ptr + row.to(gl.int64) * TABLE_STRIDE
            last_token = first_token + num_queries - 1
            end = first_token + gl.minimum(num_queries, QUERIES)
            mbarrier.wait(q_empty, (taken & 1) ^ 1)
            mbarrier.expect(q_full, 2 * q_tiles.block_type.nbytes)
            for half in gl.static_range(2):
                corner = [batch_row, (head + half) * HEAD_DIM]
                tma.async_copy_global_to_shared(q_tiles, corner, q_full, qs.index(half))
            kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
            # Some keys, their values, the next keys.
            for index in range(2 * ((end + KEYS - 1) // KEYS)):
                slot = filled % SLOTS
                mbarrier.wait(empty.index(slot), ((filled // SLOTS) & 1) ^ 1)
                mbarrier.expect(full.index(slot), KEYS // PIECE * kv_tiles.block_type.nbytes)
                for piece in gl.static_range(KEYS // PIECE):
                    token = index // 2 * KEYS + piece * PIECE
                    token = gl.minimum(token, last_token // PIECE * PIECE)
                    block = gl.load(table_ptr + token // PAGE)
                    kv_row = ((block * 2 + index % 2) * NUM_KV_HEADS + kv_head) * PAGE
                    place = ring.index(slot).slice(piece * PIECE, PIECE)
                    tma.async_copy_global_to_shared(
                        kv_tiles, [kv_row + token % PAGE, 0], full.index(slot), place
                    )
                filled += 1
            taken += 1


@gluon.jit
def _softmax(
    scores,
    maxima,
    sums,
    first_key,
    last_tokens,
    scale,
    dtype: gl.constexpr,
    KEYS: gl.constexpr,
    LAYOUT: gl.constexpr,
    WEIGHTS_LAYOUT: gl.constexpr,
    IS_MASKED: gl.constexpr,
):
    if IS_MASKED:
        tokens = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
        scores = gl.where(tokens[None, :] <= last_tokens[:, None], scores, -float("inf"))
    new_maxima = gl.maximum(maxima, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_maxima[:, None])
    rescale = gl.exp2(maxima - new_maxima)
    sums = sums * rescale + gl.sum(weights, 1)
    return gl.convert_layout(weights.to(dtype), WEIGHTS_LAYOUT), new_maxima, sums, rescale


@gluon.jit
def _attend_keys(
    first,
    end,
    filled,
    q,
    ring,
    full,
    empty,
    acc,
    weights,
    maxima,
    sums,
    last_tokens,
    scale,
    SCORES: gl.constexpr,
    ACC: gl.constexpr,
    WEIGHTS: gl.constexpr,
    IS_MASKED: gl.constexpr,
):
    QUERIES: gl.constexpr = q.shape[0]
    SLOTS: gl.constexpr = ring.shape[0]
    KEYS: gl.constexpr = ring.shape[1]
    # Each iteration ends some keys' softmax and the products of the values before them.
    for index in range(first, end):
        here = filled + 2 * index
        before = here - 1
        mbarrier.wait(full.index(here % SLOTS), (here // SLOTS) & 1)
        mbarrier.wait(full.index(before % SLOTS), (before // SLOTS) & 1)
        nothing = gl.full([QUERIES, KEYS], 0.0, gl.float32, SCORES)
        k = ring.index(here % SLOTS).permute((1, 0))
        scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        acc = warpgroup_mma(weights, ring.index(before % SLOTS), acc, is_async=True)
        scores, acc = warpgroup_mma_wait(1, deps=[scores, acc])
        mbarrier.arrive(empty.index(here % SLOTS), count=1)
        new_weights, maxima, sums, rescale = _softmax(
            scores, maxima, sums, index * KEYS, last_tokens, scale,
            ring.dtype, KEYS, SCORES, WEIGHTS, IS_MASKED,
        )  # fmt: skip
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        mbarrier.arrive(empty.index(before % SLOTS), count=1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, ACC))[:, None]
        weights = new_weights
    return acc, weights, maxima, sums


@gluon.jit
def _attend_head(
    tiles_ptr,
    out_ptr,
    num_units,
    num_steps,
    scale,
    qs,
    ring,
    q_full,
    q_empty,
    full,
    empty,
    HALF: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    QUERIES: gl.constexpr = qs.shape[1]
    HEAD_DIM: gl.constexpr = qs.shape[2]
    SLOTS: gl.constexpr = ring.shape[0]
    KEYS: gl.constexpr = ring.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, KEYS, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROWS: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [NUM_WARPS, 1], [1, 0]
    )
    lines: gl.constexpr = gl.SliceLayout(1, SCORES)
    q = qs.index(HALF)
    queries = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, ROWS))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))

    taken = 0  # units
    filled = 0  # slots of the ring, ever
    upcoming = _unit(0, num_units, tiles_ptr, NUM_HEADS // 2)
    for step in range(num_steps):
        head, _row, batch_row, first_token, num_queries = upcoming
        upcoming = _unit(step + 1, num_units, tiles_ptr, NUM_HEADS // 2)
        if num_queries > 0:
            seq_len = first_token + num_queries
            end = (first_token + gl.minimum(num_queries, QUERIES) + KEYS - 1) // KEYS
            last_tokens = first_token + gl.arange(0, QUERIES, layout=lines)
            maxima = gl.full([QUERIES], -float("inf"), gl.float32, lines)
            sums = gl.full([QUERIES], 0.0, gl.float32, lines)
            nothing = gl.full([QUERIES, KEYS], 0.0, gl.float32, SCORES)
            acc = gl.full([QUERIES, HEAD_DIM], 0.0, gl.float32, ACC)

            mbarrier.wait(q_full, taken & 1)
            slot = filled % SLOTS
            mbarrier.wait(full.index(slot), (filled // SLOTS) & 1)
            k = ring.index(slot).permute((1, 0))
            scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(empty.index(slot), count=1)
            weights, maxima, sums, _ = _softmax(
                scores, maxima, sums, 0, last_tokens, scale,
                ring.dtype, KEYS, SCORES, WEIGHTS, True,
            )  # fmt: skip
            num_plain = gl.maximum((first_token + 1) // KEYS, 1)  # that every query sees all of
            acc, weights, maxima, sums = _attend_keys(
                1, num_plain, filled, q, ring, full, empty, acc, weights, maxima, sums,
                last_tokens, scale, SCORES, ACC, WEIGHTS, False,
            )  # fmt: skip
            acc, weights, maxima, sums = _attend_keys(
                num_plain, end, filled, q, ring, full, empty, acc, weights, maxima, sums,
                last_tokens, scale, SCORES, ACC, WEIGHTS, True,
            )  # fmt: skip
            mbarrier.arrive(q_empty, count=1)

            filled += 2 * end
            last = filled - 1
            mbarrier.wait(full.index(last % SLOTS), (last // SLOTS) & 1)
            v = ring.index(last % SLOTS)
            if end * KEYS > seq_len:
                # What lies behind the last token may be no number, and 0 times that is none either.
                # Both heads write the same zeros.
                tokens = (end - 1) * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, ROWS))
                values = v.load(ROWS)
                v.store(gl.where(tokens[:, None] < seq_len, values, gl.zeros_like(values)))
                fence_async_shared()
                barrier()
            acc = warpgroup_mma(weights, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(last % SLOTS), count=1)
            acc = acc / gl.convert_layout(sums, gl.SliceLayout(1, ACC))[:, None]
            rows = batch_row + queries
            rows_ptr = out_ptr + rows.to(gl.int64)[:, None] * (NUM_HEADS * HEAD_DIM)
            head_ptr = rows_ptr + (head + HALF) * HEAD_DIM + dims[None, :]
            out = gl.convert_layout(acc.to(ring.dtype), ROWS)
            gl.store(head_ptr, out, mask=(queries < num_queries)[:, None])
            taken += 1


@gluon.jit(do_not_specialize=["num_units"])
def _hopper_kernel(
    q_tiles,
    kv_tiles,
    out_ptr,
    tiles_ptr,
    block_tables_ptr,
    num_units,
    scale,
    TABLE_STRIDE: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
    REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    QUERIES: gl.constexpr = q_tiles.block_type.shape[0]
    qs = gl.allocate_shared_memory(q_tiles.dtype, [2, QUERIES, HEAD_DIM], q_tiles.layout)
    ring = gl.allocate_shared_memory(kv_tiles.dtype, [SLOTS, KEYS, HEAD_DIM], kv_tiles.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    num_steps = (num_units + gl.num_programs(0) - 1) // gl.num_programs(0)
    gl.warp_specialize(
        [
            (_attend_head, (tiles_ptr, out_ptr, num_units, num_steps, scale, qs, ring, q_full,
                            q_empty, full, empty, 0, NUM_HEADS, num_warps)),
            (_attend_head, (tiles_ptr, out_ptr, num_units, num_steps, scale, qs, ring, q_full,
                            q_empty, full, empty, 1, NUM_HEADS, num_warps)),
            (_fetch, (q_tiles, kv_tiles, tiles_ptr, block_tables_ptr, num_units, num_steps, qs,
                      ring, q_full, q_empty, full, empty, TABLE_STRIDE, NUM_HEADS, NUM_KV_HEADS,
                      PAGE)),
        ],
        [num_warps, 1],
        [REGISTERS, 24],
    )  # fmt: skip
