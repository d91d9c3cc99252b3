"""A batch on its way to the device: described in pinned memory, copied in one piece."""

from dataclasses import dataclass, field
from itertools import chain, cycle
from operator import attrgetter

import torch
from torch import Tensor

from runtime.engine.batch import ScheduledBatch, ScheduledSequence
from runtime.gpu.device import Device
from runtime.gpu.graphs import StepShape
from runtime.gpu.limits import BatchLimits
from runtime.gpu.rows import Rows
from runtime.kernels.chunk_attention import NO_TILE, Tile

NUM_BUFFERS = 3  # one more than batches in flight, so none is written while it is copied


@dataclass(slots=True)
class BatchDescription:
    """A batch as numbers; see `runtime.kernels.batch_inputs`.

    Attributes:
        num_decodes: Leading sequences with one token each.
        tiles: Of all other sequences, those that see most tokens first.
        sampled: Sequences to sample from, in the order of their logits.
        sampled_seqs: Their places among the sequences.
        sampled_tokens: The places of their last tokens among the tokens.
    """

    num_tokens: int = 0
    num_decodes: int = 0
    records: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    sampled: list[ScheduledSequence] = field(default_factory=list)
    sampled_seqs: list[int] = field(default_factory=list)
    sampled_tokens: list[int] = field(default_factory=list)

    @property
    def num_tiles(self) -> int:
        """Tiles needed; at least one unless all tokens are decodes that are sampled."""
        is_decode = self.num_tokens == self.num_decodes == len(self.sampled)
        return 0 if is_decode else max(1, len(self.tiles))


def describe(batch: ScheduledBatch, rows: Rows, tile_size: int) -> BatchDescription:
    """Return a batch as numbers; block ids count as sent from now on."""
    found = BatchDescription()
    records, numbers = found.records, found.numbers
    num_tokens = 0
    for index, item in enumerate(batch.sequences):
        row = rows.of(item)
        first_block, offset, size = row.num_blocks, len(numbers), item.num_tokens
        new_blocks = item.block_ids[first_block:]
        row.num_blocks += len(new_blocks)
        num_given, num_new = len(item.token_ids), len(new_blocks)
        records += (
            row.index, item.start, num_tokens, size, num_given, offset, first_block, num_new
        )  # fmt: skip
        numbers += new_blocks
        numbers += item.token_ids
        if size == 1 and found.num_decodes == index:
            found.num_decodes += 1
        else:
            for first in range(0, size, tile_size):
                found.tiles.append(
                    Tile(row.index, num_tokens + first, item.start + first, size - first)
                )
        num_tokens += size
        if item.is_sampled:
            found.sampled.append(item)
            found.sampled_seqs.append(index)
            found.sampled_tokens.append(num_tokens - 1)
    found.num_tokens = num_tokens
    found.tiles.sort(key=attrgetter("position"), reverse=True)
    return found


class BatchStaging:
    """Buffers of one layout on the host and on the device.

    Attributes:
        num_records: int32 [1] on the device, like all below.
        num_decodes: int32 [1], leading sequences with one token each.
        records: int32 [num_records, len(Field)].
        sampled_seqs: int32 [num_seqs], the batch's sequence that each row of logits is of.
        sampled_tokens: int32 [num_seqs], the batch's token that each row of logits is of.
        tiles: int32 [num_tiles, 4], for the chunk attention.
        numbers: int32, what the records refer to.
    """

    def __init__(self, limits: BatchLimits, device: Device) -> None:
        self._padding_row = limits.padding_row
        sizes = [
            2,
            limits.num_records * limits.record_size,
            limits.num_seqs,
            limits.num_seqs,
            len(NO_TILE) * limits.num_tiles,
            limits.num_numbers,
        ]
        # Aligned, so that kernels see the same alignment of pointers whatever the limits.
        sizes = [-(-size // 4) * 4 for size in sizes]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self._on_device = torch.zeros(sum(sizes), dtype=torch.int32, device=device.name)
        self._buffers = cycle(
            [device.pinned(sum(sizes), dtype=torch.int32) for _ in range(NUM_BUFFERS)]
        )
        counts, records, sampled_seqs, sampled_tokens, tiles, numbers = self._on_device.split(sizes)
        self.num_records, self.num_decodes = counts[0:1], counts[1:2]
        num_record_numbers = limits.num_records * limits.record_size
        self.records = records[:num_record_numbers].view(-1, limits.record_size)
        self.sampled_seqs, self.sampled_tokens = sampled_seqs, sampled_tokens
        self.tiles, self.numbers = tiles.view(-1, len(NO_TILE)), numbers

    def send(self, batch: BatchDescription, shape: StepShape) -> None:
        """Copy a batch to the device, padded to a shape."""
        records = batch.records
        num_padding = shape.num_tokens - batch.num_tokens
        if num_padding > 0:
            first = batch.num_tokens
            records += (self._padding_row, -num_padding, first, num_padding, 0, 0, 0, 0)
        tiles = batch.tiles + [NO_TILE] * (shape.num_tiles - len(batch.tiles))
        num_records = len(records) // self.records.shape[1]
        sections = (
            [num_records, batch.num_decodes],
            records,
            batch.sampled_seqs,
            batch.sampled_tokens,
            list(chain.from_iterable(tiles)),
            batch.numbers,
        )
        buffer: Tensor = next(self._buffers)
        view = buffer.numpy()
        for start, section in zip(self._starts, sections, strict=True):
            view[start : start + len(section)] = section
        end = self._starts[-1] + len(batch.numbers)
        self._on_device[:end].copy_(buffer[:end], non_blocking=True)
