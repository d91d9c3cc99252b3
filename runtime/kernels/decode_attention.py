"""Attention of one new token of each sequence over the paged cache, on the GPU.

Query heads that share a key-value head form the rows of one matrix product, so keys and values
are read once. When there are few sequences, each is split along its tokens to keep the whole GPU
busy (FlashDecoding), and a second kernel merges the parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.launch import head_block, next_power_of_2

MIN_ROWS = 16  # of a tensor-core product
LOG2_E = 1.4426950408889634
WANTED_PROGRAMS = 528  # four for each multiprocessor of a Hopper GPU
MAX_SPLITS = 32


def num_splits(num_seqs: int, num_kv_heads: int) -> int:
    """Return in how many parts to split every sequence: a power of two, fixed by the grid."""
    wanted = WANTED_PROGRAMS // max(1, num_seqs * num_kv_heads)
    return max(1, min(MAX_SPLITS, next_power_of_2(wanted + 1) // 2))


class SplitWorkspace:
    """Where the parts of split sequences are kept between the two kernels.

    Args:
        num_heads: Query heads.
        num_kv_heads: Key-value heads.
        head_dim: Size of a head.
        device: Where.
    """

    def __init__(
        self, *, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str
    ) -> None:
        # num_seqs * num_splits is largest where splitting begins and bounded by both constants.
        num_parts = max(WANTED_PROGRAMS // num_kv_heads, MAX_SPLITS)
        self.outputs = torch.empty(num_parts, num_heads, head_dim, device=device)
        self.log_sums = torch.empty(num_parts, num_heads, device=device)


def decode_attention(
    qkv: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    *,
    block_tables: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    num_decodes: Tensor,
    workspace: SplitWorkspace,
) -> None:
    """Attend from one query of each sequence to all its tokens, the query's own included.

    Args:
        qkv: [num_seqs or more, (num_heads + 2 * num_kv_heads) * head_dim], queries rotated.
        kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim].
        out: [num_seqs, num_heads * head_dim]; its first `num_decodes` rows are written.
        block_tables: int32 [num_rows, max_blocks].
        rows: int32 [num_seqs], each sequence's row of `block_tables`.
        seq_lens: int32 [num_seqs], tokens to attend to.
        num_decodes: int32 [1], how many of the sequences there are.
        workspace: For sequences that are split.
    """
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_seqs, q_size = out.shape
    num_heads = q_size // head_dim
    splits = num_splits(num_seqs, num_kv_heads)
    _decode_kernel[(num_seqs, num_kv_heads, splits)](
        qkv,
        kv_cache,
        out,
        workspace.outputs,
        workspace.log_sums,
        block_tables,
        rows,
        seq_lens,
        num_decodes,
        head_dim**-0.5 * LOG2_E,
        TABLE_STRIDE=block_tables.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE=block_size,
        NUM_SPLITS=splits,
        BLOCK_N=_tokens_per_step(splits, kv_cache.dtype),
        BLOCK_M=max(MIN_ROWS, next_power_of_2(num_heads // num_kv_heads)),
        BLOCK_DIM=head_block(head_dim),
        PRECISION=_precision(kv_cache.dtype),
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _merge_kernel[(num_seqs, num_heads)](
            out,
            workspace.outputs,
            workspace.log_sums,
            seq_lens,
            num_decodes,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            NUM_SPLITS=splits,
            BLOCK_N=_tokens_per_step(splits, kv_cache.dtype),
            BLOCK_DIM=head_block(head_dim),
            num_warps=4,
        )


def _tokens_per_step(splits: int, dtype: torch.dtype) -> int:
    """Return tokens of one product: few when the point is to spread a short sequence."""
    return 32 if splits > 4 or dtype == torch.float32 else 64


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def _tokens_per_split(seq_len, NUM_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.cdiv(tl.cdiv(seq_len, NUM_SPLITS), BLOCK_N) * BLOCK_N


@triton.jit
def _decode_kernel(
    qkv_ptr,
    kv_cache_ptr,
    out_ptr,
    parts_ptr,
    log_sums_ptr,
    block_tables_ptr,
    rows_ptr,
    seq_lens_ptr,
    num_decodes_ptr,
    scale,
    TABLE_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    PAGE_HEAD: tl.constexpr = PAGE * HEAD_DIM

    if seq >= tl.load(num_decodes_ptr):
        return
    seq_len = tl.load(seq_lens_ptr + seq)
    split_tokens = _tokens_per_split(seq_len, NUM_SPLITS, BLOCK_N)
    start = split * split_tokens
    end = tl.minimum(start + split_tokens, seq_len)
    if NUM_SPLITS > 1 and start >= end:
        return
    table_ptr = block_tables_ptr + tl.load(rows_ptr + seq).to(tl.int64) * TABLE_STRIDE

    members = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_DIM)
    heads = kv_head * GROUP + members
    is_q = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptr = qkv_ptr + seq * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    q = tl.load(q_ptr + heads[:, None] * HEAD_DIM + dims[None, :], mask=is_q, other=0.0)

    maxima = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    for first in tl.range(start, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_token = tokens < end
        blocks = tl.load(table_ptr + tokens // PAGE, mask=is_token, other=0).to(tl.int64)
        places = (blocks * 2 * NUM_KV_HEADS + kv_head) * PAGE_HEAD + tokens % PAGE * HEAD_DIM
        is_kv = is_token[:, None] & (dims < HEAD_DIM)[None, :]
        k_ptr = kv_cache_ptr + places[:, None] + dims[None, :]
        k = tl.load(k_ptr, mask=is_kv, other=0.0)
        v = tl.load(k_ptr + NUM_KV_HEADS * PAGE_HEAD, mask=is_kv, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(is_token[None, :], scores, -float("inf"))
        new_maxima = tl.maximum(maxima, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maxima[:, None])
        rescale = tl.exp2(maxima - new_maxima)
        sums = sums * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        maxima = new_maxima

    acc = acc / tl.where(sums > 0, sums, 1.0)[:, None]
    if NUM_SPLITS == 1:
        out_row_ptr = out_ptr + seq * NUM_HEADS * HEAD_DIM
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_row_ptr + heads[:, None] * HEAD_DIM + dims[None, :], out, mask=is_q)
    else:
        part_heads = (seq * NUM_SPLITS + split) * NUM_HEADS + heads
        tl.store(parts_ptr + part_heads[:, None] * HEAD_DIM + dims[None, :], acc, mask=is_q)
        tl.store(log_sums_ptr + part_heads, maxima + tl.log2(sums), mask=members < GROUP)


@triton.jit
def _merge_kernel(
    out_ptr,
    parts_ptr,
    log_sums_ptr,
    seq_lens_ptr,
    num_decodes_ptr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if seq >= tl.load(num_decodes_ptr):
        return
    dims = tl.arange(0, BLOCK_DIM)
    splits = tl.arange(0, NUM_SPLITS)
    seq_len = tl.load(seq_lens_ptr + seq)
    split_tokens = _tokens_per_split(seq_len, NUM_SPLITS, BLOCK_N)
    is_split = splits * split_tokens < seq_len
    part_heads = (seq * NUM_SPLITS + splits) * NUM_HEADS + head
    log_sums = tl.load(log_sums_ptr + part_heads, mask=is_split, other=-float("inf"))
    is_part = is_split[:, None] & (dims < HEAD_DIM)[None, :]
    part_ptr = parts_ptr + part_heads[:, None] * HEAD_DIM + dims[None, :]
    parts = tl.load(part_ptr, mask=is_part, other=0.0)
    largest = tl.max(log_sums, 0)
    weights = tl.where(is_split, tl.exp2(log_sums - tl.where(seq_len > 0, largest, 0.0)), 0.0)
    total = tl.sum(weights, 0)
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    out_row_ptr = out_ptr + (seq * NUM_HEADS + head) * HEAD_DIM
    tl.store(out_row_ptr + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
