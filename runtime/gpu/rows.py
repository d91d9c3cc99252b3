"""Each running sequence's place in the tables on the device."""

from dataclasses import dataclass

from runtime.engine.batch import ScheduledBatch, ScheduledSequence


@dataclass(slots=True)
class Row:
    """One place, and how much of its sequence the device knows.

    Attributes:
        index: Row of the tables.
        num_blocks: Leading block ids that are in the block table.
        has_sampling: Whether the sampling table is filled.
    """

    index: int
    num_blocks: int = 0
    has_sampling: bool = False


class Rows:
    """Gives sequences rows while they hold blocks.

    Args:
        num_rows: As many as sequences can hold blocks at a time.
    """

    def __init__(self, num_rows: int) -> None:
        self._free = list(range(num_rows - 1, -1, -1))
        self._rows: dict[int, Row] = {}

    def of(self, item: ScheduledSequence) -> Row:
        """Return a sequence's row, a free one at first."""
        row = self._rows.get(item.number)
        if row is None:
            row = self._rows[item.number] = Row(self._free.pop())
        return row

    def retire(self, numbers: tuple[int, ...]) -> None:
        """Take back the rows of sequences that have lost their blocks."""
        for number in numbers:
            row = self._rows.pop(number, None)
            if row is not None:
                self._free.append(row.index)

    def forget_uploads(self, batch: ScheduledBatch) -> None:
        """Have everything about a batch's sequences sent again: its launch failed midway."""
        for item in batch.sequences:
            row = self._rows.get(item.number)
            if row is not None:
                row.num_blocks, row.has_sampling = 0, False
