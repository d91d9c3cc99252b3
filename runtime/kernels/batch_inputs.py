"""From a compact description of a batch, copied from the host, to what the model reads.

The host sends for each sequence a record of `Field`s, and behind the records the numbers they
refer to: block ids new to the sequence's block table, then tokens that were not sampled here. All
else is on the GPU already: earlier block ids and the token sampled last.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128


class Field(IntEnum):
    """Columns of a sequence's record.

    A record whose tokens have negative positions, up to -1, pads the batch: they have no place in
    the cache.
    """

    ROW = 0  # of the tables on the GPU
    START = 1  # position of the first token
    QUERY_START = 2  # place of the first token in the batch
    NUM_TOKENS = 3
    NUM_GIVEN = 4  # tokens that are sent; one more was sampled by the step before
    OFFSET = 5  # of the first number behind the records that is the sequence's
    FIRST_BLOCK = 6  # index in the block table of the first new block id
    NUM_BLOCKS = 7  # new block ids


class ModelInputs(NamedTuple):
    """What the model reads; all int32 on the GPU.

    Attributes:
        token_ids: [num_tokens].
        positions: [num_tokens].
        slots: [num_tokens], place in the KV cache, negative for none.
        rows: [num_seqs], row of the block tables.
        seq_lens: [num_seqs], tokens up to the end of this batch; 0 for padding.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    seq_lens: Tensor

    @classmethod
    def allocate(cls, num_tokens: int, num_seqs: int, device: torch.device | str) -> "ModelInputs":
        """Return buffers for batches up to that size."""
        sizes = (num_tokens, num_tokens, num_tokens, num_seqs, num_seqs)
        return cls(*(torch.zeros(size, dtype=torch.int32, device=device) for size in sizes))


def expand_batch(
    counts: Tensor,
    records: Tensor,
    numbers: Tensor,
    block_tables: Tensor,
    last_tokens: Tensor,
    inputs: ModelInputs,
    *,
    max_records: int,
    block_size: int,
) -> None:
    """Extend block tables and fill the model's inputs.

    Args:
        counts: int32 [1 or more], the first is how many records there are.
        records: int32 [max_records or more, len(Field)].
        numbers: int32, what the records refer to.
        block_tables: int32 [num_rows, max_blocks]; extended.
        last_tokens: int32 [num_rows], the token sampled last for each row.
        inputs: Written.
        max_records: There are no more than this.
        block_size: Tokens per block.
    """
    _expand_kernel[(max_records,)](
        counts,
        records,
        numbers,
        block_tables,
        last_tokens,
        *inputs,
        TABLE_STRIDE=block_tables.stride(0),
        PAGE=block_size,
        BLOCK=BLOCK,
    )


def expand_batch_reference(
    counts: Tensor,
    records: Tensor,
    numbers: Tensor,
    block_tables: Tensor,
    last_tokens: Tensor,
    inputs: ModelInputs,
    *,
    max_records: int,
    block_size: int,
) -> None:
    """Do what `expand_batch` does, in plain torch."""
    for index, record in enumerate(records[: int(counts[0])].tolist()):
        row, start, query_start, num_tokens, num_given, offset, first_block, num_blocks = record
        block_tables[row, first_block : first_block + num_blocks] = numbers[
            offset : offset + num_blocks
        ]
        given = numbers[offset + num_blocks :][:num_given]
        tokens = slice(query_start, query_start + num_tokens)
        inputs.token_ids[tokens] = torch.cat((given, last_tokens[row, None]))[:num_tokens]
        positions = torch.arange(start, start + num_tokens)
        blocks = block_tables[row, positions.clamp(min=0) // block_size]
        slots = blocks * block_size + positions % block_size
        inputs.positions[tokens] = positions.clamp(min=0).int()
        inputs.slots[tokens] = slots.where(positions >= 0, -1).int()
        inputs.rows[index] = row
        inputs.seq_lens[index] = start + num_tokens


@triton.jit
def _expand_kernel(
    counts_ptr,
    records_ptr,
    numbers_ptr,
    block_tables_ptr,
    last_tokens_ptr,
    token_ids_ptr,
    positions_ptr,
    slots_ptr,
    rows_ptr,
    seq_lens_ptr,
    TABLE_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    seq = tl.program_id(0)
    if seq >= tl.load(counts_ptr):
        return
    record_ptr = records_ptr + seq * 8  # in the order of Field
    row = tl.load(record_ptr).to(tl.int64)
    start = tl.load(record_ptr + 1)
    query_start = tl.load(record_ptr + 2)
    num_tokens = tl.load(record_ptr + 3)
    num_given = tl.load(record_ptr + 4)
    offset = tl.load(record_ptr + 5)
    first_block = tl.load(record_ptr + 6)
    num_blocks = tl.load(record_ptr + 7)
    table_ptr = block_tables_ptr + row * TABLE_STRIDE
    lanes = tl.arange(0, BLOCK)

    for first in tl.range(0, num_blocks, BLOCK):
        indices = first + lanes
        is_new = indices < num_blocks
        block_ids = tl.load(numbers_ptr + offset + indices, mask=is_new, other=0)
        tl.store(table_ptr + first_block + indices, block_ids, mask=is_new)
    tl.debug_barrier()  # the table is read below by other threads of this program

    last_token = tl.load(last_tokens_ptr + row)
    for first in tl.range(0, num_tokens, BLOCK):
        indices = first + lanes
        is_token = indices < num_tokens
        given_ptr = numbers_ptr + offset + num_blocks + indices
        token_ids = tl.load(given_ptr, mask=indices < num_given, other=0)
        token_ids = tl.where(indices < num_given, token_ids, last_token)
        positions = tl.maximum(start + indices, 0)
        blocks = tl.load(table_ptr + positions // PAGE, mask=is_token, other=0)
        slots = tl.where(start + indices < 0, -1, blocks * PAGE + positions % PAGE)
        places = query_start + indices
        tl.store(token_ids_ptr + places, token_ids, mask=is_token)
        tl.store(positions_ptr + places, positions, mask=is_token)
        tl.store(slots_ptr + places, slots, mask=is_token)
    tl.store(rows_ptr + seq, row.to(tl.int32))
    tl.store(seq_lens_ptr + seq, start + num_tokens)
