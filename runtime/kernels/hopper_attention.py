"""Causal attention of chunks with Hopper's matrix instructions, which Triton's dialect Gluon has.

What `chunk_attention` computes, and as it does, one program for a tile of queries of one head. Keys
and values come by the copy engine (TMA) some tiles ahead, and the products of a tile's keys run
beside those of the values before it, which is what FlashAttention 3 does within a warp group.
"""

from functools import cache

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

BLOCK = 64  # queries of a program, as in `chunk_attention`, and keys at a time
STAGES = 3
NUM_WARPS = 4  # one warp group; with two that wait for each other it is slower
HEAD_DIMS = (64, 128)
HOPPER = (9, 0)

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name in Triton 3.6


def is_usable(kv_cache: Tensor) -> bool:
    """Return whether this cache is on such a GPU, in 16 bits and in blocks of whole tiles."""
    block_size, head_dim = kv_cache.shape[3:]
    return (
        kv_cache.is_cuda
        and kv_cache.dtype.itemsize == 2
        and head_dim in HEAD_DIMS
        and block_size % BLOCK == 0
        and _capability(kv_cache.device) == HOPPER
    )


def attend(
    qkv: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    *,
    tiles: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    scale: float,
) -> None:
    """Attend as `chunk_attention` does where this `is_usable`; all but `scale` is as there.

    `scale` is what a score is multiplied by to be an exponent of two.
    """
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_heads = out.shape[1] // head_dim
    dtype = gl.bfloat16 if kv_cache.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([BLOCK, head_dim], dtype)
    _hopper_kernel[(len(tiles), num_heads)](
        qkv,
        TensorDescriptor.from_tensor(kv_cache.view(-1, head_dim), [BLOCK, head_dim], layout),
        out,
        tiles,
        block_tables,
        rows,
        query_starts,
        seq_lens,
        scale,
        TABLE_STRIDE=block_tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE=block_size,
        BLOCK=BLOCK,
        STAGES=STAGES,
        num_warps=NUM_WARPS,
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@gluon.jit
def _fetch(
    tile,
    kv_tiles,
    table_ptr,
    kv_head,
    bars,
    ks,
    vs,
    NUM_KV_HEADS: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    stage = tile % STAGES
    bar = bars.index(stage)
    mbarrier.expect(bar, 2 * kv_tiles.block_type.nbytes)
    block = gl.load(table_ptr + tile * BLOCK // PAGE)
    row = (block * 2 * NUM_KV_HEADS + kv_head) * PAGE + tile * BLOCK % PAGE
    tma.async_copy_global_to_shared(kv_tiles, [row, 0], bar, ks.index(stage))
    tma.async_copy_global_to_shared(kv_tiles, [row + NUM_KV_HEADS * PAGE, 0], bar, vs.index(stage))


@gluon.jit
def _softmax(
    scores,
    maxima,
    sums,
    tile,
    num_plain,
    last_tokens,
    scale,
    dtype: gl.constexpr,
    BLOCK: gl.constexpr,
    LAYOUT: gl.constexpr,
    WEIGHTS_LAYOUT: gl.constexpr,
):
    if tile >= num_plain:
        tokens = tile * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))
        scores = gl.where(tokens[None, :] <= last_tokens[:, None], scores, -float("inf"))
    new_maxima = gl.maximum(maxima, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_maxima[:, None])
    rescale = gl.exp2(maxima - new_maxima)
    sums = sums * rescale + gl.sum(weights, 1)
    return gl.convert_layout(weights.to(dtype), WEIGHTS_LAYOUT), new_maxima, sums, rescale


@gluon.jit
def _clear_behind(v, tile, seq_len, BLOCK: gl.constexpr, LAYOUT: gl.constexpr):
    # What lies behind the last token may be no number, and 0 times that is none either.
    tokens = tile * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LAYOUT))
    values = v.load(LAYOUT)
    v.store(gl.where(tokens[:, None] < seq_len, values, gl.zeros_like(values)))
    fence_async_shared()
    barrier()


@gluon.jit
def _hopper_kernel(
    qkv_ptr,
    kv_tiles,
    out_ptr,
    tiles_ptr,
    block_tables_ptr,
    rows_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    scale,
    TABLE_STRIDE: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROWS: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [num_warps, 1], [1, 0]
    )

    head = gl.program_id(1)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    seq = gl.load(tiles_ptr + 2 * gl.program_id(0))
    if seq < 0:
        return
    tile_start = gl.load(tiles_ptr + 2 * gl.program_id(0) + 1)
    query_start = gl.load(query_starts_ptr + seq)
    num_queries = gl.load(query_starts_ptr + seq + 1) - query_start
    seq_len = gl.load(seq_lens_ptr + seq)
    table_ptr = block_tables_ptr + gl.load(rows_ptr + seq).to(gl.int64) * TABLE_STRIDE
    first_token = seq_len - num_queries + tile_start
    num_plain = (first_token + 1) // BLOCK  # tiles that every query sees all of
    num_tiles = (gl.minimum(first_token + BLOCK, seq_len) + BLOCK - 1) // BLOCK

    ks = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, HEAD_DIM], kv_tiles.layout)
    vs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, HEAD_DIM], kv_tiles.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
    fence_async_shared()
    barrier()
    for tile in gl.static_range(STAGES):
        if tile < num_tiles:
            _fetch(
                tile, kv_tiles, table_ptr, kv_head, bars, ks, vs, NUM_KV_HEADS, PAGE, BLOCK, STAGES
            )

    queries = tile_start + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, ROWS))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
    is_query = (queries < num_queries)[:, None]
    batch_rows = (query_start + queries).to(gl.int64)
    Q_STRIDE: gl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    q_ptr = qkv_ptr + batch_rows[:, None] * Q_STRIDE + head * HEAD_DIM + dims[None, :]
    q = gl.allocate_shared_memory(
        dtype, [BLOCK, HEAD_DIM], kv_tiles.layout, gl.load(q_ptr, mask=is_query, other=0.0)
    )
    fence_async_shared()
    barrier()

    lines: gl.constexpr = gl.SliceLayout(1, SCORES)
    last_tokens = first_token + gl.arange(0, BLOCK, layout=lines)
    maxima = gl.full([BLOCK], -float("inf"), gl.float32, lines)
    sums = gl.full([BLOCK], 0.0, gl.float32, lines)
    nothing = gl.full([BLOCK, BLOCK], 0.0, gl.float32, SCORES)
    acc = gl.full([BLOCK, HEAD_DIM], 0.0, gl.float32, ACC)

    mbarrier.wait(bars.index(0), 0)
    scores = warpgroup_mma(q, ks.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    weights, maxima, sums, _ = _softmax(
        scores, maxima, sums, 0, num_plain, last_tokens, scale, dtype, BLOCK, SCORES, WEIGHTS
    )
    for tile in range(1, num_tiles):
        here = tile % STAGES
        mbarrier.wait(bars.index(here), (tile // STAGES) & 1)
        k = ks.index(here).permute((1, 0))
        scores = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        acc = warpgroup_mma(weights, vs.index((tile - 1) % STAGES), acc, is_async=True)
        scores, acc = warpgroup_mma_wait(1, deps=[scores, acc])
        new_weights, maxima, sums, rescale = _softmax(
            scores, maxima, sums, tile, num_plain, last_tokens, scale, dtype, BLOCK, SCORES, WEIGHTS
        )
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        barrier()
        next_tile = tile - 1 + STAGES
        if next_tile < num_tiles:
            _fetch(
                next_tile,
                kv_tiles,
                table_ptr,
                kv_head,
                bars,
                ks,
                vs,
                NUM_KV_HEADS,
                PAGE,
                BLOCK,
                STAGES,
            )
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, ACC))[:, None]
        weights = new_weights
    last = (num_tiles - 1) % STAGES
    if num_tiles * BLOCK > seq_len:
        _clear_behind(vs.index(last), num_tiles - 1, seq_len, BLOCK, ROWS)
    acc = warpgroup_mma(weights, vs.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(stage))

    acc = acc / gl.convert_layout(sums, gl.SliceLayout(1, ACC))[:, None]
    out_rows_ptr = out_ptr + batch_rows[:, None] * NUM_HEADS * HEAD_DIM
    out = gl.convert_layout(acc.to(dtype), ROWS)
    gl.store(out_rows_ptr + head * HEAD_DIM + dims[None, :], out, mask=is_query)
