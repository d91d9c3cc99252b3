"""A text to embed inside the engine: what was asked, and what became of it. No torch."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import StrEnum

from runtime.engine.sequence import SequenceKey


class PoolingMode(StrEnum):
    """How the vectors of a text's tokens become one."""

    MEAN = "mean"
    CLS = "cls"  # the first token's
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingRequest:
    """One text of a call.

    Attributes:
        key: The call, and the text's place in it.
        token_ids: The text.
        dimensions: Leading numbers to keep; 0 keeps all.
    """

    key: SequenceKey
    token_ids: SequenceOf[int]
    dimensions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """What became of one text.

    Attributes:
        embedding: Little-endian float32; empty if there is an error.
        error: For people; empty unless this text alone could not be embedded.
    """

    key: SequenceKey
    embedding: bytes
    error: str = ""
