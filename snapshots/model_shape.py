"""The sizes of a model, from its transformers config, and how they divide over ranks.

No torch here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from snapshots.architectures.weights import Dim
from snapshots.errors import SourceInvalid, TensorParallelUnsupported

VOCABULARY_MULTIPLE = 64
MAX_SIZE = 1 << 31


class Span(NamedTuple):
    """A half-open range of rows or columns."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the weights of a model are sized by.

    Attributes:
        num_positions: Rows of a table of positions; 0 where none is declared.
        num_token_types: Rows of a table of token types; 0 where none is declared.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool
    num_positions: int = 0
    num_token_types: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a transformers config.

        Raises:
            SourceInvalid: A size is missing or impossible.
        """
        hidden_size = _size(config, "hidden_size")
        num_heads = _size(config, "num_attention_heads")
        num_kv_heads = _size(config, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise SourceInvalid(
                f"config.json: {num_heads} attention heads cannot share {num_kv_heads} key-value heads"
            )
        return cls(
            num_layers=_size(config, "num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_size(config, "head_dim", hidden_size // num_heads),
            intermediate_size=_size(config, "intermediate_size"),
            vocab_size=_size(config, "vocab_size"),
            is_tied=config.get("tie_word_embeddings", False) is True,
            num_positions=_optional_size(config, "max_position_embeddings"),
            num_token_types=_optional_size(config, "type_vocab_size"),
        )

    def size(self, dim: Dim) -> int:
        """Return how long a dimension is in the checkpoint."""
        return {
            Dim.HIDDEN: self.hidden_size,
            Dim.QUERY: self.num_heads * self.head_dim,
            Dim.KEY_VALUE: self.num_kv_heads * self.head_dim,
            Dim.INTERMEDIATE: self.intermediate_size,
            Dim.VOCABULARY: self.vocab_size,
            Dim.POSITION: self.num_positions,
            Dim.TOKEN_TYPE: self.num_token_types,
        }[dim]

    def rank_size(self, dim: Dim, num_ranks: int) -> int:
        """Return how long a split dimension is on each rank, padding included."""
        if dim is Dim.VOCABULARY:
            multiple = VOCABULARY_MULTIPLE * num_ranks
            return -(-self.vocab_size // multiple) * VOCABULARY_MULTIPLE
        if dim is Dim.KEY_VALUE:
            return max(1, self.num_kv_heads // num_ranks) * self.head_dim
        return self.size(dim) // num_ranks

    def rank_span(self, dim: Dim, num_ranks: int, rank: int) -> Span:
        """Return which part of a split dimension a rank holds, in the checkpoint's terms.

        Ranks that outnumber the key-value heads share them, a run of ranks for each; the last
        ranks of a padded vocabulary hold less than `rank_size`.
        """
        size = self.rank_size(dim, num_ranks)
        if dim is Dim.KEY_VALUE and self.num_kv_heads < num_ranks:
            start = rank * self.num_kv_heads // num_ranks * self.head_dim
        else:
            start = rank * size
        return Span(min(start, self.size(dim)), min(start + size, self.size(dim)))

    def check_divides(self, num_ranks: int) -> None:
        """Make sure that the model can be split over so many ranks.

        Raises:
            TensorParallelUnsupported: It cannot.
        """
        counts = {
            "attention heads": self.num_heads % num_ranks == 0,
            "key-value heads": self.num_kv_heads % num_ranks == 0
            or num_ranks % self.num_kv_heads == 0,
            "intermediate features": self.intermediate_size % num_ranks == 0,
        }
        sizes = (self.num_heads, self.num_kv_heads, self.intermediate_size)
        for (what, divides), size in zip(counts.items(), sizes, strict=True):
            if not divides:
                raise TensorParallelUnsupported(
                    f"{size} {what} do not divide over {num_ranks} ranks",
                    hint="choose a tensor parallel size that divides them",
                )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value < MAX_SIZE:
        raise SourceInvalid(f"config.json: {key} is {value!r}, expected a positive number")
    return value


def _optional_size(config: Mapping[str, Any], key: str) -> int:
    return 0 if config.get(key) is None else _size(config, key)
