from typing import Any

import pytest

from runtime.errors import LoadFailed
from runtime.model.config import (
    SUPPORTED_ACTIVATIONS,
    SUPPORTED_ARCHITECTURES,
    ModelConfig,
    RopeConfig,
    RopeType,
)
from snapshots.architectures import registry
from snapshots.architectures.llama import LLAMA

MINIMAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def test_what_is_left_out_follows_from_the_rest() -> None:
    config = ModelConfig.from_hf(MINIMAL)
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert not config.tie_word_embeddings
    assert config.rope == RopeConfig(type=RopeType.DEFAULT, theta=10_000.0)
    assert config.kv_elements_per_token == 2 * 2 * 4 * 16


def test_explicit_head_dim_wins_over_the_quotient() -> None:
    assert ModelConfig.from_hf(MINIMAL | {"head_dim": 32}).head_dim == 32


def test_architecture_may_follow_from_the_model_type() -> None:
    config = {**MINIMAL, "architectures": None, "model_type": "llama"}
    assert ModelConfig.from_hf(config).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(type=RopeType.DEFAULT, theta=5e5)),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            RopeConfig(type=RopeType.DEFAULT, theta=7.0),
        ),
        (
            {"rope_theta": 3.0, "rope_scaling": {"type": "linear", "factor": 2}},
            RopeConfig(type=RopeType.LINEAR, theta=3.0, factor=2.0),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 8192,
                }
            },
            RopeConfig(
                type=RopeType.LLAMA3,
                theta=5e5,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
    ],
)
def test_rope_is_read_from_old_and_new_keys(config: dict[str, Any], expected: RopeConfig) -> None:
    assert RopeConfig.from_hf(config) == expected


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial"),
    ],
)
def test_what_the_engine_cannot_run_is_refused_by_name(
    overrides: dict[str, Any], match: str
) -> None:
    with pytest.raises(LoadFailed, match=match):
        ModelConfig.from_hf(MINIMAL | overrides)


def test_what_is_built_is_what_can_be_loaded() -> None:
    assert LLAMA.classes == SUPPORTED_ARCHITECTURES
    assert LLAMA.activations == SUPPORTED_ACTIVATIONS
    assert tuple(RopeType) == registry.ROPE_TYPES
