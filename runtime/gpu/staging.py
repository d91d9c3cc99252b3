"""A batch on its way to the device: described in pinned memory, copied in one piece."""

from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from runtime.engine.batch import ScheduledBatch, ScheduledSequence
from runtime.gpu.device import Device
from runtime.gpu.limits import BatchLimits
from runtime.gpu.rows import Rows

NUM_BUFFERS = 3  # one more than batches in flight, so none is written while it is copied


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedBatch:
    """What the host needs to know of a batch that was sent.

    Attributes:
        num_decodes: Leading sequences with one token each.
        sampled: Sequences to sample from, in the order of their logits.
        is_decode: Whether every sequence has one token and is sampled.
    """

    num_seqs: int
    num_tokens: int
    num_decodes: int
    num_tiles: int
    sampled: list[ScheduledSequence]
    is_decode: bool


class BatchStaging:
    """Buffers of one layout on the host and on the device.

    Attributes:
        records: int32 [num_seqs, len(Field)] on the device.
        sampled: int32 [num_seqs], the batch's sequence that each row of logits is of.
        sampled_rows: int32 [num_seqs], the batch's token that each row of logits is of.
        tiles: int32 [num_tiles, 2], for the chunk attention.
        numbers: int32, what the records refer to.
    """

    def __init__(self, limits: BatchLimits, device: Device) -> None:
        self._limits = limits
        sizes = (
            limits.num_seqs * limits.record_size,
            limits.num_seqs,
            limits.num_seqs,
            2 * limits.num_tiles,
            limits.num_numbers,
        )
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self._on_device = torch.zeros(sum(sizes), dtype=torch.int32, device=device.name)
        self._buffers = cycle(
            [device.pinned(sum(sizes), dtype=torch.int32) for _ in range(NUM_BUFFERS)]
        )
        records, self.sampled, self.sampled_rows, tiles, self.numbers = self._on_device.split(
            list(sizes)
        )
        self.records = records.view(limits.num_seqs, limits.record_size)
        self.tiles = tiles.view(limits.num_tiles, 2)

    def send(self, batch: ScheduledBatch, rows: Rows, *, num_padded: int = 0) -> StagedBatch:
        """Describe a batch and copy that to the device.

        Args:
            batch: Decodes first.
            rows: Its sequences' places.
            num_padded: Records to fill up to, with padding.
        """
        records: list[int] = []
        numbers: list[int] = []
        tiles: list[int] = []
        sampled: list[ScheduledSequence] = []
        sampled_seqs: list[int] = []
        sampled_rows: list[int] = []
        num_tokens = num_decodes = 0
        for index, item in enumerate(batch.sequences):
            row = rows.of(item)
            first_block, offset, size = row.num_blocks, len(numbers), item.num_tokens
            new_blocks = item.block_ids[first_block:]
            row.num_blocks += len(new_blocks)
            records += (
                row.index,
                item.start,
                num_tokens,
                size,
                len(item.token_ids),
                offset,
                first_block,
                len(new_blocks),
            )
            numbers += new_blocks
            numbers += item.token_ids
            if size == 1 and num_decodes == index:
                num_decodes += 1
            else:
                for first in range(0, size, self._limits.tile_size):
                    tiles += (index, first)
            num_tokens += size
            if item.is_sampled:
                sampled.append(item)
                sampled_seqs.append(index)
                sampled_rows.append(num_tokens - 1)
        num_seqs = len(batch.sequences)
        for index in range(num_seqs, num_padded):
            records += (self._limits.padding_row, -1, index, 1, 0, 0, 0, 0)
        self._copy(records, sampled_seqs, sampled_rows, tiles, numbers)
        return StagedBatch(
            num_seqs=num_seqs,
            num_tokens=num_tokens,
            num_decodes=num_decodes,
            num_tiles=len(tiles) // 2,
            sampled=sampled,
            is_decode=num_decodes == len(sampled) == num_seqs,
        )

    def _copy(self, *sections: list[int]) -> None:
        buffer: Tensor = next(self._buffers)
        view = buffer.numpy()
        for start, section in zip(self._starts, sections, strict=True):
            view[start : start + len(section)] = section
        end = self._starts[-1] + len(sections[-1])
        self._on_device[:end].copy_(buffer[:end], non_blocking=True)
