"""Moving weights from a checkpoint into rank files, a block of rows at a time.

Memory is bounded by the block, not by the model or its largest tensor.
"""

import math
from collections.abc import Callable, Sequence

import torch

from snapshots.errors import SourceUnsupported
from snapshots.layout import Piece, PlannedTensor, RankLayout
from snapshots.model_shape import Span
from snapshots.sources.base import Checkpoint
from snapshots.staging import write_at

BLOCK_BYTES = 64 << 20


def convert_group(
    checkpoint: Checkpoint,
    layouts: Sequence[RankLayout],
    descriptors: Sequence[int],
    group: int,
    *,
    dtype: str,
    on_bytes: Callable[[int], None],
) -> None:
    """Write one group of every rank file.

    Args:
        checkpoint: Where the weights come from.
        layouts: Of all rank files.
        descriptors: Of the same files, open for writing.
        group: Index of the group.
        dtype: What to convert to.
        on_bytes: Told how many bytes have been written since the last call.

    Raises:
        SourceUnsupported: A value does not fit `dtype`.
    """
    ranks = [layout.groups[group].tensors for layout in layouts]
    for tensors in zip(*ranks, strict=True):
        for number in range(len(tensors[0].pieces)):
            targets = [
                _Target(descriptor, len(layout.header), tensor, tensor.pieces[number])
                for layout, descriptor, tensor in zip(layouts, descriptors, tensors, strict=True)
            ]
            _convert_piece(checkpoint, targets, getattr(torch, dtype), on_bytes)


def _convert_piece(
    checkpoint: Checkpoint,
    targets: Sequence["_Target"],
    dtype: torch.dtype,
    on_bytes: Callable[[int], None],
) -> None:
    name = targets[0].piece.source
    num_rows, *columns = checkpoint.tensors[name].shape
    block_rows = max(1, BLOCK_BYTES // (4 * math.prod(columns)))
    for start in range(0, num_rows, block_rows):
        stop = min(start + block_rows, num_rows)
        rows = checkpoint.read_rows(name, start, stop)
        converted = rows.to(dtype)
        if dtype == torch.float16 and not torch.equal(rows.isfinite(), converted.isfinite()):
            raise SourceUnsupported(
                f"{name} has values beyond float16", hint="use --dtype bfloat16 or float32"
            )
        on_bytes(sum(target.write(converted, start) for target in targets))


class _Target:
    """The place of one piece in one rank file."""

    def __init__(
        self, descriptor: int, data_offset: int, tensor: PlannedTensor, piece: Piece
    ) -> None:
        self.piece = piece
        self._descriptor = descriptor
        self._row_bytes = tensor.row_bytes
        self._offset = data_offset + tensor.slot.offset + piece.first_row * tensor.row_bytes

    def write(self, rows: torch.Tensor, first_row: int) -> int:
        """Write what this rank takes of a block of checkpoint rows; return how many bytes."""
        wanted = Span(
            max(self.piece.rows.start, first_row),
            min(self.piece.rows.stop, first_row + rows.shape[0]),
        )
        if wanted.start >= wanted.stop:
            return 0
        taken = rows[wanted.start - first_row : wanted.stop - first_row]
        if self.piece.columns is not None:
            taken = taken[:, self.piece.columns.start : self.piece.columns.stop]
        content = taken.contiguous().view(torch.uint8).flatten().numpy().data
        offset = self._offset + (wanted.start - self.piece.rows.start) * self._row_bytes
        write_at(self._descriptor, content, offset)
        return len(content)
