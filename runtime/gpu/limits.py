"""How large a batch on the GPU can be; every buffer is sized by this."""

from dataclasses import dataclass

from runtime.kernels.batch_inputs import Field

MAX_LOGPROB_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Sizes that hold for every batch.

    Attributes:
        mixed_sizes: Batches with chunks of prompts are padded to one of these, ascending.
        num_seqs: Sequences of one batch, and sequences that hold blocks.
        num_blocks_each: Blocks of one sequence.
        tile_size: Queries that one program of the chunk attention takes.
    """

    mixed_sizes: tuple[int, ...]
    num_seqs: int
    num_blocks_each: int
    tile_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the largest batch, padding included."""
        return self.mixed_sizes[-1]

    @property
    def padding_row(self) -> int:
        """The row of the tables that belongs to no sequence."""
        return self.num_seqs

    @property
    def num_rows(self) -> int:
        """Rows of the tables on the device."""
        return self.num_seqs + 1

    @property
    def num_logprob_rows(self) -> int:
        """Rows of logits whose log-probabilities are in memory at a time."""
        return min(MAX_LOGPROB_ROWS, self.num_seqs)

    @property
    def num_tiles(self) -> int:
        """Tiles of one batch, padding included: each sequence's last one may be nearly empty."""
        return self.num_tokens // self.tile_size + max(self.num_seqs, 64)

    @property
    def num_records(self) -> int:
        """Records of one batch: each sequence's, and one for padding."""
        return self.num_seqs + 1

    @property
    def num_numbers(self) -> int:
        """Block ids and token ids that are sent with one batch."""
        return self.num_tokens + self.num_seqs * self.num_blocks_each

    @property
    def record_size(self) -> int:
        """Numbers in a sequence's record."""
        return len(Field)
