from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.config import EngineConfig
from tests.runtime.cpu.oracle import TeacherForced, new_runner, random_llama, run_forced

MAX_ERROR = 1e-3
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def random_targets(*, num_sequences: int, num_tokens: int, seed: int = 0) -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        id: torch.randint(0, 100, (num_tokens,), generator=generator).tolist()
        for id in range(num_sequences)
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_attention_heads": 4, "num_key_value_heads": 4},
        {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 36},
        {"head_dim": 20},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_parameters": LLAMA3_ROPE},
        {"num_hidden_layers": 1, "vocab_size": 101},
    ],
    ids=str,
)
def test_logits_equal_transformers(overrides: dict[str, Any]) -> None:
    model = random_llama(**overrides)
    targets = random_targets(num_sequences=2, num_tokens=60)
    forced = TeacherForced(new_runner(model), targets)
    run_forced(forced, targets, EngineConfig(), num_prompt_tokens=50)
    assert forced.largest_error(model) < MAX_ERROR
    assert all(len(logits) == 59 for logits in forced.logits.values())


@given(
    budget=st.integers(4, 70),
    block_size=st.integers(1, 20),
    num_prompt_tokens=st.integers(1, 58),
    num_sequences=st.integers(1, 4),
    num_blocks=st.integers(0, 200),
    num_shared_tokens=st.integers(0, 58),
    together=st.booleans(),
)
@settings(max_examples=40)
def test_logits_do_not_depend_on_how_a_sequence_was_run(
    budget: int,
    block_size: int,
    num_prompt_tokens: int,
    num_sequences: int,
    num_blocks: int,
    num_shared_tokens: int,
    together: bool,
) -> None:
    """Chunks of any size, any batch mix, prefix hits, preemptions and block sizes."""
    model = random_llama()
    targets = random_targets(num_sequences=num_sequences, num_tokens=60)
    for target in targets.values():
        target[:num_shared_tokens] = targets[0][:num_shared_tokens]
    bytes_per_block = 2 * 2 * 2 * 12 * 4 * block_size
    config = EngineConfig(
        block_size=block_size,
        max_num_batched_tokens=budget,
        max_model_len=60,
        kv_cache_bytes=max(num_blocks, -(-60 // block_size)) * bytes_per_block,
    )
    forced = TeacherForced(new_runner(model, config), targets)
    run_forced(forced, targets, config, num_prompt_tokens=num_prompt_tokens, together=together)
    assert forced.largest_error(model) < MAX_ERROR


def test_sequences_of_very_different_length_decode_in_one_batch() -> None:
    model = random_llama(max_position_embeddings=1024)
    generator = torch.Generator().manual_seed(0)
    targets = {
        id: torch.randint(0, 100, (num_tokens,), generator=generator).tolist()
        for id, num_tokens in enumerate([12, 30, 900, 14])
    }
    runner = new_runner(model, EngineConfig(kv_cache_bytes=1 << 24))
    forced = TeacherForced(runner, targets)
    config = EngineConfig(max_num_batched_tokens=2048)
    forced.max_step_tokens = 2048
    run_forced(forced, targets, config, num_prompt_tokens=8)
    assert max(forced.batch_sizes) == 4
    assert forced.largest_error(model) < MAX_ERROR


def test_preemption_and_prefix_hits_happen_in_these_tests() -> None:
    model = random_llama()
    targets = random_targets(num_sequences=3, num_tokens=60)
    for target in targets.values():
        target[:20] = targets[0][:20]
    config = EngineConfig(block_size=4, max_model_len=60, kv_cache_bytes=20 * 4 * 384)
    forced = TeacherForced(new_runner(model, config), targets)
    engine, _ = run_forced(forced, targets, config, num_prompt_tokens=30)
    figures = engine.figures()
    assert figures.num_kv_blocks == 20
    assert figures.num_preemptions > 0
    assert figures.num_cached_prompt_tokens >= 20
    assert forced.largest_error(model) < MAX_ERROR
