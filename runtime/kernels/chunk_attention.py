"""Causal attention of chunks of prompts over the paged cache, on the GPU.

One program takes a tile of queries of one head (FlashAttention 2). What is before the chunk comes
from the cache like the chunk's own keys and values, which were written there a kernel earlier.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from runtime.kernels import hopper_attention
from runtime.kernels.decode_attention import LOG2_E
from runtime.kernels.launch import head_block


class Tile(NamedTuple):
    """Some queries of a chunk, at most `tile_size`, for one program a head.

    Attributes:
        row: The sequence's row of the block tables.
        place: Of the first query among the batch's tokens.
        position: Of the first query in the sequence.
        num_queries: From there to the chunk's end, of which the first `tile_size` are the tile's; 0
            if this is no tile.
    """

    row: int
    place: int
    position: int
    num_queries: int


NO_TILE = Tile(0, 0, 0, 0)


def tile_size(dtype: torch.dtype) -> int:
    """Return how many queries one program takes."""
    return 32 if dtype == torch.float32 else 64


def chunk_attention(
    qkv: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    *,
    tiles: Tensor,
    block_tables: Tensor,
) -> None:
    """Attend from several tokens of each sequence to those tokens and all before them.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], queries rotated.
        kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim].
        out: [num_tokens, num_heads * head_dim]; rows of the tiles' tokens are written.
        tiles: int32 [num_tiles, 4], each a `Tile`. They begin in this order: those that see most
            tokens first are done soonest.
        block_tables: int32 [num_rows, max_blocks].
    """
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_heads = out.shape[1] // head_dim
    scale = head_dim**-0.5 * LOG2_E
    if hopper_attention.is_usable(kv_cache, num_heads):
        hopper_attention.attend(
            qkv,
            kv_cache,
            out,
            tiles=tiles,
            block_tables=block_tables,
            scale=scale,
        )
        return
    is_exact = kv_cache.dtype == torch.float32
    block_n = 32 if is_exact else 64
    # Whole tiles of keys are fetched by the GPU's copy engine where its conditions hold.
    is_copied = block_size % block_n == 0 and head_dim == head_block(head_dim)
    kv_rows = kv_cache.view(-1, head_dim)
    _chunk_kernel[(len(tiles), num_heads)](
        qkv,
        kv_cache,
        TensorDescriptor.from_tensor(kv_rows, [block_n, head_dim]) if is_copied else kv_cache,
        out,
        tiles,
        block_tables,
        scale,
        TABLE_STRIDE=block_tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE=block_size,
        BLOCK_M=tile_size(kv_cache.dtype),
        BLOCK_N=block_n,
        BLOCK_DIM=head_block(head_dim),
        PRECISION="ieee" if is_exact else "tf32",
        IS_COPIED=is_copied,
        num_warps=4,
        num_stages=2 if is_exact else 3,
    )


@triton.jit
def _attend(
    q,
    acc,
    maxima,
    sums,
    first,
    end,
    last_tokens,
    table_ptr,
    kv_ptr,
    kv_tiles,
    kv_head,
    scale,
    dims,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_COPIED: tl.constexpr,
):
    PAGE_HEAD: tl.constexpr = PAGE * HEAD_DIM
    for block_start in tl.range(first, end, BLOCK_N):
        tokens = block_start + tl.arange(0, BLOCK_N)
        if IS_COPIED and not IS_MASKED:
            block = tl.load(table_ptr + block_start // PAGE)
            row = (block * 2 * NUM_KV_HEADS + kv_head) * PAGE + block_start % PAGE
            k = kv_tiles.load([row, 0])
            v = kv_tiles.load([row + NUM_KV_HEADS * PAGE, 0])
        else:
            is_kv = (tokens < end)[:, None] & (dims < HEAD_DIM)[None, :]
            blocks = tl.load(table_ptr + tokens // PAGE, mask=tokens < end, other=0)
            places = blocks.to(tl.int64) * 2 * NUM_KV_HEADS * PAGE_HEAD + tokens % PAGE * HEAD_DIM
            k_ptr = kv_ptr + places[:, None] + dims[None, :]
            k = tl.load(k_ptr, mask=is_kv, other=0.0)
            v = tl.load(k_ptr + NUM_KV_HEADS * PAGE_HEAD, mask=is_kv, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if IS_MASKED:
            is_seen = tokens[None, :] <= last_tokens[:, None]
            scores = tl.where(is_seen, scores, -float("inf"))
        new_maxima = tl.maximum(maxima, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_maxima[:, None])
        rescale = tl.exp2(maxima - new_maxima)
        sums = sums * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        maxima = new_maxima
    return acc, maxima, sums


@triton.jit
def _chunk_kernel(
    qkv_ptr,
    kv_cache_ptr,
    kv_tiles,
    out_ptr,
    tiles_ptr,
    block_tables_ptr,
    scale,
    TABLE_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_COPIED: tl.constexpr,
):
    tile_ptr = tiles_ptr + 4 * tl.program_id(0)  # see `Tile`
    head = tl.program_id(1)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    num_queries = tl.load(tile_ptr + 3)
    if num_queries == 0:
        return
    num_queries = tl.minimum(num_queries, BLOCK_M)
    table_ptr = block_tables_ptr + tl.load(tile_ptr).to(tl.int64) * TABLE_STRIDE
    first_token = tl.load(tile_ptr + 2)

    queries = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_DIM)
    is_q = (queries < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    batch_rows = tl.load(tile_ptr + 1).to(tl.int64) + queries
    Q_STRIDE: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    q_ptr = qkv_ptr + batch_rows[:, None] * Q_STRIDE + head * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr, mask=is_q, other=0.0)

    maxima = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    # Every query of the tile sees all tokens up to the tile's first.
    last_tokens = first_token + queries
    common_end = (first_token + 1) // BLOCK_N * BLOCK_N
    end = first_token + num_queries
    kv_ptr = kv_cache_ptr + kv_head * PAGE * HEAD_DIM
    acc, maxima, sums = _attend(
        q, acc, maxima, sums, 0, common_end, last_tokens, table_ptr, kv_ptr,
        kv_tiles, kv_head, scale, dims,
        NUM_KV_HEADS, HEAD_DIM, PAGE, BLOCK_N, BLOCK_DIM, PRECISION, False, IS_COPIED,
    )  # fmt: skip
    acc, maxima, sums = _attend(
        q, acc, maxima, sums, common_end, end, last_tokens, table_ptr, kv_ptr,
        kv_tiles, kv_head, scale, dims,
        NUM_KV_HEADS, HEAD_DIM, PAGE, BLOCK_N, BLOCK_DIM, PRECISION, True, IS_COPIED,
    )  # fmt: skip

    out = (acc / sums[:, None]).to(out_ptr.dtype.element_ty)
    out_rows_ptr = out_ptr + batch_rows[:, None] * NUM_HEADS * HEAD_DIM
    tl.store(out_rows_ptr + head * HEAD_DIM + dims[None, :], out, mask=is_q)
