"""What the attention kernels compute, in plain torch and any precision."""

import torch
from torch import Tensor


def attention_reference(
    queries: Tensor,
    kv_cache: Tensor,
    *,
    block_tables: Tensor,
    rows: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """Attend causally from each sequence's tokens in the batch to all its tokens.

    Args:
        queries: Rotated [num_tokens, num_heads, head_dim].
        kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim].
        block_tables: int32 [num_rows, max_blocks].
        rows: int32 [num_seqs], each sequence's row of `block_tables`.
        query_starts: int32 [num_seqs + 1], where in the batch each sequence begins, and the end.
        seq_lens: int32 [num_seqs], tokens to attend to, those in the batch included.

    Returns:
        [num_tokens, num_heads * head_dim] in the dtype of the queries.
    """
    num_tokens, num_heads, head_dim = queries.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    out = torch.zeros_like(queries)
    for index, (row, seq_len) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        if seq_len == 0:
            continue
        start, end = int(query_starts[index]), int(query_starts[index + 1])
        blocks = block_tables[row, : -(-seq_len // block_size)].long()
        kv = kv_cache[blocks].to(queries.dtype).permute(1, 2, 0, 3, 4)
        k, v = kv.reshape(2, num_kv_heads, -1, head_dim)[:, :, :seq_len].unbind()
        k, v = (x.repeat_interleave(num_heads // num_kv_heads, 0) for x in (k, v))
        scores = queries[start:end].transpose(0, 1) @ k.transpose(1, 2) * head_dim**-0.5
        hidden = torch.ones(end - start, seq_len, dtype=torch.bool, device=queries.device)
        scores.masked_fill_(hidden.triu(seq_len - (end - start) + 1), -torch.inf)
        out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out.view(num_tokens, num_heads * head_dim)
