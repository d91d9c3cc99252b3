"""The shape of a BERT encoder, read once from a Hugging Face configuration. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import LoadFailed

BERT_CLASS = "BertModel"


@dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig:
    """An encoder with learned positions.

    Attributes:
        vocab_size: Token ids are below this.
        max_position_embeddings: The model's own limit on a text, in tokens.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float
    max_position_embeddings: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "BertConfig":
        """Read the dict in a snapshot's config.json.

        Raises:
            LoadFailed: The model needs something that the engine does not have.
        """
        activation = config.get("hidden_act", "gelu")
        if activation != "gelu":
            raise LoadFailed(f"activation {activation!r} is not supported: only gelu is")
        positions = config.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise LoadFailed(f"position embeddings {positions!r} are not supported: only absolute")
        try:
            return cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=int(config["hidden_size"]),
                intermediate_size=int(config["intermediate_size"]),
                num_layers=int(config["num_hidden_layers"]),
                num_heads=int(config["num_attention_heads"]),
                layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
                max_position_embeddings=int(config["max_position_embeddings"]),
            )
        except KeyError as error:
            raise LoadFailed(f"config.json has no {error}: the snapshot is not complete") from error


def is_bert(config: Mapping[str, Any]) -> bool:
    """Return whether a Hugging Face configuration is a BERT encoder's."""
    return config.get("model_type") == "bert"
