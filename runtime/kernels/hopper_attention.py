"""Causal attention of chunks with Hopper's matrix instructions, which Triton's dialect Gluon has.

What `chunk_attention` computes, and as it does, one program for a tile of queries of two heads that
share their keys. A warp fetches keys and values by the copy engine (TMA) some tiles ahead. Two
groups of warps, one a head, share the matrix units: one's products run beside the other's softmax,
and the products of a tile's keys beside those of the values before it (FlashAttention 3).
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

from runtime.kernels.launch import barrier, is_hopper

QUERIES = 64  # of each head, as in `chunk_attention`
KEYS = 128  # at a time
PIECE = 64  # rows that are copied at once, all of one block of the cache
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
    layout = gl.NVMMASharedLayout.get_default_for([PIECE, head_dim], dtype)
    _hopper_kernel[(num_heads // 2, len(tiles))](
        qkv,
        TensorDescriptor.from_tensor(kv_cache.view(-1, head_dim), [PIECE, head_dim], layout),
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
        QUERIES=QUERIES,
        KEYS=KEYS,
        PIECE=PIECE,
        SLOTS=SLOTS,
        REGISTERS=REGISTERS,
        num_warps=NUM_WARPS,
    )


@gluon.jit
def _fetch(
    kv_tiles,
    table_ptr,
    kv_head,
    num_tiles,
    last_token,
    ring,
    full,
    empty,
    NUM_KV_HEADS: gl.constexpr,
    PAGE: gl.constexpr,
    KEYS: gl.constexpr,
    PIECE: gl.constexpr,
    SLOTS: gl.constexpr,
):
    for index in range(2 * num_tiles):  # a tile's keys, its values, the next tile's keys
        slot = index % SLOTS
        mbarrier.wait(empty.index(slot), ((index // SLOTS) & 1) ^ 1)
        mbarrier.expect(full.index(slot), KEYS // PIECE * kv_tiles.block_type.nbytes)
        for piece in gl.static_range(KEYS // PIECE):
            token = gl.minimum(index // 2 * KEYS + piece * PIECE, last_token // PIECE * PIECE)
            block = gl.load(table_ptr + token // PAGE)
            row = ((block * 2 + index % 2) * NUM_KV_HEADS + kv_head) * PAGE + token % PAGE
            place = ring.index(slot).slice(piece * PIECE, PIECE)
            tma.async_copy_global_to_shared(kv_tiles, [row, 0], full.index(slot), place)


@gluon.jit
def _softmax(
    scores,
    maxima,
    sums,
    tile,
    last_tokens,
    scale,
    dtype: gl.constexpr,
    KEYS: gl.constexpr,
    LAYOUT: gl.constexpr,
    WEIGHTS_LAYOUT: gl.constexpr,
    IS_MASKED: gl.constexpr,
):
    if IS_MASKED:
        tokens = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
        scores = gl.where(tokens[None, :] <= last_tokens[:, None], scores, -float("inf"))
    new_maxima = gl.maximum(maxima, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_maxima[:, None])
    rescale = gl.exp2(maxima - new_maxima)
    sums = sums * rescale + gl.sum(weights, 1)
    return gl.convert_layout(weights.to(dtype), WEIGHTS_LAYOUT), new_maxima, sums, rescale


@gluon.jit
def _attend_tiles(
    first,
    end,
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
    QUERIES: gl.constexpr,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
    SCORES: gl.constexpr,
    ACC: gl.constexpr,
    WEIGHTS: gl.constexpr,
    IS_MASKED: gl.constexpr,
):
    # Each iteration ends a tile's softmax and the products of the values before it.
    for tile in range(first, end):
        here = 2 * tile
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
            scores,
            maxima,
            sums,
            tile,
            last_tokens,
            scale,
            ring.dtype,
            KEYS,
            SCORES,
            WEIGHTS,
            IS_MASKED,
        )
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        mbarrier.arrive(empty.index(before % SLOTS), count=1)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, ACC))[:, None]
        weights = new_weights
    return acc, weights, maxima, sums


@gluon.jit
def _attend_head(
    qs,
    ring,
    full,
    empty,
    out_ptr,
    first_token,
    seq_len,
    num_queries,
    num_tiles,
    scale,
    HALF: gl.constexpr,
    OUT_STRIDE: gl.constexpr,
    SLOTS: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    QUERIES: gl.constexpr = qs.shape[1]
    HEAD_DIM: gl.constexpr = qs.shape[2]
    KEYS: gl.constexpr = ring.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, KEYS, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROWS: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [NUM_WARPS, 1], [1, 0]
    )
    lines: gl.constexpr = gl.SliceLayout(1, SCORES)

    q = qs.index(HALF)
    last_tokens = first_token + gl.arange(0, QUERIES, layout=lines)
    maxima = gl.full([QUERIES], -float("inf"), gl.float32, lines)
    sums = gl.full([QUERIES], 0.0, gl.float32, lines)
    nothing = gl.full([QUERIES, KEYS], 0.0, gl.float32, SCORES)
    acc = gl.full([QUERIES, HEAD_DIM], 0.0, gl.float32, ACC)

    mbarrier.wait(full.index(0), 0)
    scores = warpgroup_mma(q, ring.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(empty.index(0), count=1)
    weights, maxima, sums, _ = _softmax(
        scores, maxima, sums, 0, last_tokens, scale, ring.dtype, KEYS, SCORES, WEIGHTS, True
    )
    num_plain = gl.maximum((first_token + 1) // KEYS, 1)  # tiles that every query sees all of
    acc, weights, maxima, sums = _attend_tiles(
        1, num_plain, q, ring, full, empty, acc, weights, maxima, sums, last_tokens, scale,
        QUERIES, KEYS, SLOTS, SCORES, ACC, WEIGHTS, False,
    )  # fmt: skip
    acc, weights, maxima, sums = _attend_tiles(
        num_plain, num_tiles, q, ring, full, empty, acc, weights, maxima, sums, last_tokens,
        scale, QUERIES, KEYS, SLOTS, SCORES, ACC, WEIGHTS, True,
    )  # fmt: skip

    last = 2 * num_tiles - 1
    mbarrier.wait(full.index(last % SLOTS), (last // SLOTS) & 1)
    v = ring.index(last % SLOTS)
    if num_tiles * KEYS > seq_len:
        # What lies behind the last token may be no number, and 0 times that is none either. Both
        # heads write the same zeros.
        tokens = (num_tiles - 1) * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, ROWS))
        values = v.load(ROWS)
        v.store(gl.where(tokens[:, None] < seq_len, values, gl.zeros_like(values)))
        fence_async_shared()
        barrier()
    acc = warpgroup_mma(weights, v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    acc = acc / gl.convert_layout(sums, gl.SliceLayout(1, ACC))[:, None]
    queries = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, ROWS))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
    head_ptr = out_ptr + HALF * HEAD_DIM + queries[:, None] * OUT_STRIDE + dims[None, :]
    out = gl.convert_layout(acc.to(ring.dtype), ROWS)
    gl.store(head_ptr, out, mask=(queries < num_queries)[:, None])


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
    QUERIES: gl.constexpr,
    KEYS: gl.constexpr,
    PIECE: gl.constexpr,
    SLOTS: gl.constexpr,
    REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty
    ROWS: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [num_warps, 1], [1, 0]
    )
    # A chunk's last tiles see most keys: they begin first, all heads of one together.
    head = 2 * gl.program_id(0)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    entry_ptr = tiles_ptr + 2 * (gl.num_programs(1) - 1 - gl.program_id(1))
    seq = gl.load(entry_ptr)
    if seq < 0:
        return
    tile_start = gl.load(entry_ptr + 1)
    query_start = gl.load(query_starts_ptr + seq)
    num_queries = gl.load(query_starts_ptr + seq + 1) - query_start
    seq_len = gl.load(seq_lens_ptr + seq)
    table_ptr = block_tables_ptr + gl.load(rows_ptr + seq).to(gl.int64) * TABLE_STRIDE
    first_token = seq_len - num_queries + tile_start
    num_tiles = (gl.minimum(first_token + QUERIES, seq_len) + KEYS - 1) // KEYS
    num_queries -= tile_start
    batch_row = (query_start + tile_start).to(gl.int64)

    layout: gl.constexpr = kv_tiles.layout
    ring = gl.allocate_shared_memory(dtype, [SLOTS, KEYS, HEAD_DIM], layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)

    Q_STRIDE: gl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    queries = gl.arange(0, QUERIES, layout=gl.SliceLayout(1, ROWS))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
    q_ptr = qkv_ptr + batch_row * Q_STRIDE + head * HEAD_DIM
    q_ptr = q_ptr + queries[:, None] * Q_STRIDE + dims[None, :]
    qs = gl.allocate_shared_memory(dtype, [2, QUERIES, HEAD_DIM], layout)
    for half in gl.static_range(2):
        is_query = (queries < num_queries)[:, None]
        qs.index(half).store(gl.load(q_ptr + half * HEAD_DIM, mask=is_query, other=0.0))
    fence_async_shared()
    barrier()

    OUT_STRIDE: gl.constexpr = NUM_HEADS * HEAD_DIM
    out_ptr += batch_row * OUT_STRIDE + head * HEAD_DIM
    gl.warp_specialize(
        [
            (_attend_head, (qs, ring, full, empty, out_ptr, first_token, seq_len,
                            num_queries, num_tiles, scale, 0, OUT_STRIDE, SLOTS,
                            num_warps)),
            (_attend_head, (qs, ring, full, empty, out_ptr, first_token, seq_len,
                            num_queries, num_tiles, scale, 1, OUT_STRIDE, SLOTS,
                            num_warps)),
            (_fetch, (kv_tiles, table_ptr, kv_head, num_tiles,
                      seq_len - 1, ring, full, empty, NUM_KV_HEADS, PAGE, KEYS, PIECE, SLOTS)),
        ],
        [num_warps, 1],
        [REGISTERS, 24],
    )  # fmt: skip
