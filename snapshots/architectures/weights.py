"""The language in which architectures are described: dimensions, parts, fused tensors.

No torch here and no code per model: an architecture is a value, read by the planner and by the
sources.
"""

from dataclasses import dataclass
from enum import StrEnum


class Dim(StrEnum):
    """A dimension of a weight, named after what it counts."""

    HIDDEN = "hidden_size"
    QUERY = "num_attention_heads * head_dim"
    KEY_VALUE = "num_key_value_heads * head_dim"
    INTERMEDIATE = "intermediate_size"
    VOCABULARY = "vocab_size"
    POSITION = "max_position_embeddings"
    TOKEN_TYPE = "type_vocab_size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of a checkpoint; `{i}` in a name stands for the layer.

    Attributes:
        name: In transformers' checkpoints.
        gguf: In GGUF files.
        shape: Its dimensions, rows first.
        is_rotary: Whether its rows are turned by rotary embeddings, so that some GGUF converters
            have interleaved the two halves of each head.
    """

    name: str
    gguf: str
    shape: tuple[Dim, ...]
    is_rotary: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedTensor:
    """One tensor of the engine: the rows of its parts, one after the other.

    Attributes:
        name: In the engine; `{i}` stands for the layer.
        parts: In row order.
        shard_axis: The axis split over ranks; None for a copy on every rank.
        is_optional: Whether a checkpoint may lack it, all parts together.
    """

    name: str
    parts: tuple[Part, ...]
    shard_axis: int | None = None
    is_optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """All weights of a family, in execution order.

    Attributes:
        name: transformers' `model_type`.
        classes: transformers' `architectures` that are computed.
        activations: transformers' `hidden_act` that are computed; the first is the default.
        gguf_name: `general.architecture` in GGUF files; None where they are not read.
        embedding: Before the layers.
        layer: Of each layer.
        final: After the layers.
        head: The output projection; left out when tied to the embedding. None for an encoder.
        ignored: Regular expressions of checkpoint names that hold nothing to serve.
        has_interleaved_gguf: Whether GGUF files hold the rows of rotary parts interleaved.
    """

    name: str
    classes: tuple[str, ...]
    activations: tuple[str, ...]
    gguf_name: str | None
    embedding: tuple[FusedTensor, ...]
    layer: tuple[FusedTensor, ...]
    final: tuple[FusedTensor, ...]
    head: FusedTensor | None
    ignored: tuple[str, ...] = ()
    has_interleaved_gguf: bool = False
