"""The shape of a model, read once from a Hugging Face configuration. No torch.

Layers never see the foreign configuration, so what they do not support is refused here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from runtime.errors import LoadFailed

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)
SUPPORTED_ACTIVATIONS = ("silu", "swish")


class RopeType(StrEnum):
    """How rotary frequencies are stretched beyond the trained length."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        factor: Stretch of the context; 1 for the default type.
        low_freq_factor: Llama 3 only: below this many turns over the original length a
            frequency is divided by `factor`.
        high_freq_factor: Llama 3 only: above this many turns it stays as it is.
        original_max_position_embeddings: Llama 3 only: trained length, in tokens.
    """

    type: RopeType
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "RopeConfig":
        """Read transformers 5's `rope_parameters`, or the older `rope_theta`, `rope_scaling`.

        Raises:
            LoadFailed: The type is unknown or a number is missing.
        """
        parameters = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        name = parameters.get("rope_type") or parameters.get("type") or RopeType.DEFAULT
        if name not in list(RopeType):
            raise LoadFailed(f"rope type {name!r} is not supported: use one of {_names(RopeType)}")
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise LoadFailed("partial rotary embeddings are not supported")
        theta = parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0
        rope_type = RopeType(name)
        if rope_type is RopeType.DEFAULT:
            return cls(type=rope_type, theta=float(theta))
        factor = float(_need(parameters, "factor"))
        if rope_type is RopeType.LINEAR:
            return cls(type=rope_type, theta=float(theta), factor=factor)
        return cls(
            type=rope_type,
            theta=float(theta),
            factor=factor,
            low_freq_factor=float(_need(parameters, "low_freq_factor")),
            high_freq_factor=float(_need(parameters, "high_freq_factor")),
            original_max_position_embeddings=int(
                _need(parameters, "original_max_position_embeddings")
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family.

    Attributes:
        vocab_size: Token ids are below this; the embedding may have padding rows beyond it.
        max_position_embeddings: The model's own limit on a sequence, in tokens.
        tie_word_embeddings: Whether the embedding is also the output head.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read the dict in a snapshot's config.json.

        Raises:
            LoadFailed: The model needs something that the engine does not have.
        """
        architecture = next(iter(config.get("architectures") or []), None) or _default_name(config)
        if architecture not in SUPPORTED_ARCHITECTURES:
            raise LoadFailed(
                f"architecture {architecture!r} is not supported: use one of "
                f"{', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        activation = config.get("hidden_act", "silu")
        if activation not in SUPPORTED_ACTIVATIONS:
            raise LoadFailed(f"activation {activation!r} is not supported: only silu is")
        num_heads = int(_need(config, "num_attention_heads"))
        num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
        if num_heads % num_kv_heads != 0:
            raise LoadFailed(f"{num_heads} heads cannot share {num_kv_heads} key-value heads")
        hidden_size = int(_need(config, "hidden_size"))
        return cls(
            architecture=architecture,
            vocab_size=int(_need(config, "vocab_size")),
            hidden_size=hidden_size,
            intermediate_size=int(_need(config, "intermediate_size")),
            num_layers=int(_need(config, "num_hidden_layers")),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=int(_need(config, "max_position_embeddings")),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            rope=RopeConfig.from_hf(config),
        )

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers one token keeps in the KV cache, over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim


def _default_name(config: Mapping[str, Any]) -> str | None:
    return {"llama": "LlamaForCausalLM"}.get(config.get("model_type", ""))


def _need(config: Mapping[str, Any], name: str) -> Any:
    value = config.get(name)
    if value is None:
        raise LoadFailed(f"config.json has no {name!r}: the snapshot is not complete")
    return value


def _names(values: type[StrEnum]) -> str:
    return ", ".join(values)
