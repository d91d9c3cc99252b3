"""Causal attention over a paged KV cache, in plain torch.

The cache of a layer is [num_blocks, block_size, 2, num_kv_heads, head_dim], keys before values,
so a block is one contiguous row to gather, and a gathered sequence is attended to in place.

Query heads that share a key-value head are handled as one: for a single token they become the
rows of one query, for a prompt they become heads over a broadcast key.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SPLIT_COST_BLOCKS = 32  # blocks whose gathering and attention cost as much as one more group


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpan:
    """One sequence's part in a batch.

    Attributes:
        start: Position of its first token in the batch; what is before is in the cache.
        num_tokens: Its tokens in the batch.
        block_ids: Blocks that hold its tokens, at least up to the last in the batch.
    """

    start: int
    num_tokens: int
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecodeGroup:
    """Sequences with one token each, of similar length, padded to the longest.

    Attributes:
        rows: Their tokens in the batch, int64 [group_size], or a slice where they are adjacent.
        size: Their number.
        block_ids: int64 [group_size * max_blocks]; a sequence is padded with its own blocks.
        mask: 0 where there is a token, else -inf; [group_size, 1, 1, max_blocks * block_size].
    """

    rows: Tensor | slice
    size: int
    block_ids: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """Several tokens of one sequence.

    Attributes:
        rows: Its tokens in the batch.
        block_ids: int64 [num_blocks].
        num_tokens: Tokens to attend to, those in the batch included.
        mask: [num_tokens in the batch, num_tokens], or None when nothing is before them.
    """

    rows: slice
    block_ids: Tensor
    num_tokens: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Where a batch's tokens are in the KV cache; the same for all layers.

    Attributes:
        positions: int64 [num_tokens].
        slots: Place of each token in the cache, block * block_size + offset; int64 [num_tokens].
    """

    positions: Tensor
    slots: Tensor
    decode_groups: tuple[_DecodeGroup, ...]
    chunks: tuple[_Chunk, ...]

    @classmethod
    def build(
        cls, spans: Sequence[AttentionSpan], block_size: int, dtype: torch.dtype
    ) -> "AttentionPlan":
        """Plan for spans whose tokens follow each other in the batch; `dtype` is that of q."""
        positions: list[int] = []
        slots: list[int] = []
        decodes: list[tuple[int, AttentionSpan]] = []
        chunks: list[_Chunk] = []
        for span in spans:
            first_row = len(positions)
            span_positions = range(span.start, span.start + span.num_tokens)
            positions += span_positions
            slots += (
                span.block_ids[position // block_size] * block_size + position % block_size
                for position in span_positions
            )
            if span.num_tokens == 1:
                decodes.append((first_row, span))
            else:
                chunks.append(_chunk(first_row, span, block_size, dtype))
        return cls(
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            decode_groups=tuple(
                _decode_group(group, block_size, dtype) for group in _by_length(decodes, block_size)
            ),
            chunks=tuple(chunks),
        )


def paged_attention(q: Tensor, kv: Tensor, kv_cache: Tensor, plan: AttentionPlan) -> Tensor:
    """Write keys and values to the cache, then attend to all that is there.

    Args:
        q: Rotated queries [num_tokens, num_heads, head_dim].
        kv: Rotated keys, then values [num_tokens, 2 * num_kv_heads * head_dim].
        kv_cache: One layer of it; written.
        plan: Of this batch.

    Returns:
        [num_tokens, num_heads * head_dim].
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv_cache.shape[3]
    kv_cache.view(-1, kv.shape[1]).index_copy_(0, plan.slots, kv)
    blocks = kv_cache.flatten(1)
    heads = q.view(num_tokens, num_kv_heads, -1, head_dim)
    output = q.new_empty(heads.shape)
    for group in plan.decode_groups:
        k, v = _gather(blocks, group.block_ids, group.size, kv_cache)
        attended = F.scaled_dot_product_attention(heads[group.rows], k, v, group.mask)
        if group.size == num_tokens:
            return attended.reshape(num_tokens, num_heads * head_dim)
        output[group.rows] = attended
    for chunk in plan.chunks:
        k, v = _gather(blocks, chunk.block_ids, 1, kv_cache)
        output[chunk.rows] = _attend_chunk(heads[chunk.rows], k, v, chunk)
    return output.view(num_tokens, num_heads * head_dim)


def _gather(
    blocks: Tensor, block_ids: Tensor, num_sequences: int, kv_cache: Tensor
) -> tuple[Tensor, Tensor]:
    """Return keys and values, each [num_sequences, num_kv_heads, num_tokens, head_dim]."""
    gathered = blocks.index_select(0, block_ids)
    kv = gathered.view(num_sequences, -1, *kv_cache.shape[2:])
    return kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)


def _attend_chunk(heads: Tensor, k: Tensor, v: Tensor, chunk: _Chunk) -> Tensor:
    """Attend from heads [num_tokens, num_kv_heads, group, head_dim] of one sequence."""
    q = heads.permute(1, 2, 0, 3)
    k = k[0, :, None, : chunk.num_tokens].expand(-1, q.shape[1], -1, -1)
    v = v[0, :, None, : chunk.num_tokens].expand(-1, q.shape[1], -1, -1)
    is_causal = chunk.mask is None
    attended = F.scaled_dot_product_attention(q, k, v, chunk.mask, is_causal=is_causal)
    return attended.permute(2, 0, 1, 3)


def _chunk(first_row: int, span: AttentionSpan, block_size: int, dtype: torch.dtype) -> _Chunk:
    num_tokens = span.start + span.num_tokens
    mask = None
    if span.start > 0:
        mask = torch.full((span.num_tokens, num_tokens), -torch.inf, dtype=dtype)
        mask.triu_(span.start + 1)
    return _Chunk(
        rows=slice(first_row, first_row + span.num_tokens),
        block_ids=torch.tensor(span.block_ids[: -(-num_tokens // block_size)]),
        num_tokens=num_tokens,
        mask=mask,
    )


def _by_length(
    decodes: list[tuple[int, AttentionSpan]], block_size: int
) -> list[list[tuple[int, AttentionSpan]]]:
    """Split sequences into groups, so that padding costs less than another group would."""
    ordered = sorted(decodes, key=lambda decode: decode[1].start)
    groups: list[list[tuple[int, AttentionSpan]]] = []
    for decode in ordered:
        num_blocks = decode[1].start // block_size + 1
        if groups:
            padding = (num_blocks - (groups[-1][0][1].start // block_size + 1)) * len(groups[-1])
            if padding <= SPLIT_COST_BLOCKS:
                groups[-1].append(decode)
                continue
        groups.append([decode])
    return groups


def _decode_group(
    decodes: list[tuple[int, AttentionSpan]], block_size: int, dtype: torch.dtype
) -> _DecodeGroup:
    decodes = sorted(decodes, key=lambda decode: decode[0])
    lengths = [span.start + 1 for _, span in decodes]
    max_blocks = -(-max(lengths) // block_size)
    block_ids: list[int] = []
    for _, span in decodes:
        table = span.block_ids[:max_blocks]
        # Never another's block: a fault in there must not reach this sequence, masked or not.
        block_ids += [*table, *[table[0]] * (max_blocks - len(table))]
    mask = torch.zeros(len(decodes), 1, 1, max_blocks * block_size, dtype=dtype)
    is_padding = torch.arange(max_blocks * block_size) >= torch.tensor(lengths)[:, None]
    mask.masked_fill_(is_padding[:, None, None], -torch.inf)
    rows = [row for row, _ in decodes]
    is_adjacent = rows[-1] - rows[0] == len(rows) - 1
    return _DecodeGroup(
        rows=slice(rows[0], rows[-1] + 1) if is_adjacent else torch.tensor(rows),
        size=len(rows),
        block_ids=torch.tensor(block_ids),
        mask=mask,
    )
