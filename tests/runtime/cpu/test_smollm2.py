"""The small real model: logits in fp32 against transformers, and what it says."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from runtime.config import EngineConfig
from runtime.cpu.runner import CpuRunner
from runtime.engine.engine import Engine
from runtime.model.config import ModelConfig
from snapshots.loader import load_rank, open_rank, views
from tests.runtime.cpu.oracle import TeacherForced, run_forced
from tests.runtime.engine.sequences import new_request

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(300)]

MAX_ERROR = 1e-3
TEXT = (
    "The city of Lyon lies where the Rhône and the Saône meet. Its silk was once known all over "
    "Europe; today people come for the old town, the food and the festival of lights in December."
)
QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "Why is the sky blue?",
]
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def reference(smollm2_snapshot_fp32: Path) -> LlamaForCausalLM:
    """Return transformers' model with the snapshot's own numbers."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(smollm2_snapshot_fp32)
    rank = open_rank(smollm2_snapshot_fp32)
    slab = torch.empty(rank.data_bytes, dtype=torch.uint8)
    load_rank(rank, slab)
    model = LlamaForCausalLM(config)
    model.load_state_dict(unfused(views(rank, slab), model), strict=True)
    model.train(mode=False)
    return model


def unfused(tensors: dict[str, torch.Tensor], model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Return engine tensors under transformers' names, by the sizes of its own parameters."""
    parts = {
        "self_attn.q_proj": ("self_attn.qkv_proj", 0),
        "self_attn.k_proj": ("self_attn.qkv_proj", 1),
        "self_attn.v_proj": ("self_attn.qkv_proj", 2),
        "mlp.gate_proj": ("mlp.gate_up_proj", 0),
        "mlp.up_proj": ("mlp.gate_up_proj", 1),
    }
    config = ModelConfig.from_hf(model.config.to_dict())
    q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    sizes = {
        "self_attn.qkv_proj": [q_size, kv_size, kv_size],
        "mlp.gate_up_proj": [config.intermediate_size] * 2,
    }
    state = {}
    for name, parameter in model.state_dict().items():
        engine_name = name.removeprefix("model.")
        if name == "lm_head.weight":
            engine_name = "embed_tokens.weight"
        part = next((part for part in parts if part in name), None)
        if part is None:
            tensor = tensors[engine_name]
        else:
            fused, index = parts[part]
            tensor = torch.split(tensors[engine_name.replace(part, fused)], sizes[fused])[index]
        state[name] = tensor[: parameter.shape[0]]
    return state


@pytest.fixture(scope="module")
def runner(smollm2_snapshot_fp32: Path) -> Iterator[CpuRunner]:
    runner = CpuRunner.open(smollm2_snapshot_fp32, EngineConfig(kv_cache_bytes=64 << 20))
    runner.load_weights()
    runner.allocate_kv()
    yield runner
    runner.release()


@pytest.fixture(scope="module")
def tokenizer(smollm2_snapshot_fp32: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_snapshot_fp32 / "tokenizer.json"))


def test_logits_equal_transformers_in_chunks_mixes_and_prefix_hits(
    reference: LlamaForCausalLM, runner: CpuRunner, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(TEXT).ids
    assert len(token_ids) > 40
    targets = {1: token_ids, 2: token_ids[:20] + token_ids[:21], 3: token_ids[::-1]}
    for budget, together in ((7, True), (64, False), (512, True)):
        forced = TeacherForced(runner, targets)
        config = EngineConfig(max_num_batched_tokens=budget)
        engine, _ = run_forced(forced, targets, config, num_prompt_tokens=35, together=together)
        assert forced.largest_error(reference) < MAX_ERROR
        if not together:
            assert engine.figures().num_cached_prompt_tokens >= 16


def test_logits_equal_transformers_after_preemptions(
    smollm2_snapshot_fp32: Path, reference: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(TEXT).ids[:40]
    targets = {1: token_ids, 2: token_ids[::-1]}
    bytes_per_block = 30 * 2 * 3 * 64 * 4 * 8
    config = EngineConfig(block_size=8, max_model_len=40, kv_cache_bytes=8 * bytes_per_block)
    runner = CpuRunner.open(smollm2_snapshot_fp32, config)
    runner.load_weights()
    runner.allocate_kv()
    forced = TeacherForced(runner, targets)
    engine, _ = run_forced(forced, targets, config, num_prompt_tokens=20)
    assert engine.figures().num_preemptions > 0
    assert forced.largest_error(reference) < MAX_ERROR
    runner.release()


def test_greedy_text_equals_transformers(
    reference: LlamaForCausalLM, runner: CpuRunner, tokenizer: Tokenizer
) -> None:
    prompts = {
        id: tokenizer.encode(CHAT.format(question=question)).ids
        for id, question in enumerate(QUESTIONS)
    }
    answers = generate(runner, prompts, max_tokens=40)
    for id, prompt in prompts.items():
        output = reference.generate(  # type: ignore[misc]
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=[2]
        )
        assert answers[id] == output[0, len(prompt) :].tolist()
    assert tokenizer.decode(answers[0]) == "The capital of France is Paris."


def test_bfloat16_snapshot_says_the_same(smollm2_snapshot: Path, tokenizer: Tokenizer) -> None:
    runner = CpuRunner.open(smollm2_snapshot, EngineConfig(kv_cache_bytes=64 << 20))
    runner.load_weights()
    runner.allocate_kv()
    prompt = tokenizer.encode(CHAT.format(question=QUESTIONS[0])).ids
    assert tokenizer.decode(generate(runner, {0: prompt}, max_tokens=40)[0]) == (
        "The capital of France is Paris."
    )
    runner.release()


def generate(
    runner: CpuRunner, prompts: dict[int, list[int]], *, max_tokens: int
) -> dict[int, list[int]]:
    engine = Engine(EngineConfig(), runner, runner.eos_token_ids)
    answers: dict[int, list[int]] = {id: [] for id in prompts}
    for id, prompt in prompts.items():
        engine.submit(new_request(id, prompt, max_tokens=max_tokens))
    while engine.has_work():
        for key, token_id in engine.step().tokens:
            answers[key.sequence_id].append(token_id)
    return answers
