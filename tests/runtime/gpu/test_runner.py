"""The GPU runner against transformers and against itself; without a GPU, in the interpreter."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from runtime.config import EngineConfig
from runtime.engine.batch import ScheduledBatch
from runtime.engine.engine import Engine
from runtime.engine.sequence import FinishReason, SamplingParams, TokenLogprobs
from runtime.gpu.linear import GpuLinear
from runtime.gpu.runner import GpuRunner
from runtime.gpu.sampling import PendingSample
from runtime.kernels.norm import rms_norm
from runtime.model.config import ModelConfig
from tests.runtime.cpu.oracle import (
    TeacherForced,
    TensorWeights,
    engine_tensors,
    random_llama,
    reference_logits,
    run_forced,
)
from tests.runtime.engine.sequences import new_request
from tests.runtime.kernels.device import DEVICE

# The interpreter warns of what a GPU does silently: it computes on with numbers that are not finite.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.timeout(180)]
IS_GPU = DEVICE == "cuda"
SCALE = 4 if IS_GPU else 1  # the interpreter takes a second for what a GPU does in a millisecond
CONFIG = EngineConfig(
    kv_cache_bytes=1 << 20, max_num_seqs=6, max_num_batched_tokens=24, max_model_len=128
)


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return random_llama(**{"num_hidden_layers": 1 + IS_GPU, **sizes, **overrides})


def new_gpu_runner(model: LlamaForCausalLM, config: EngineConfig = CONFIG) -> GpuRunner:
    tensors = {name: tensor.to(DEVICE) for name, tensor in engine_tensors(model).items()}
    model_config = ModelConfig.from_hf(model.config.to_dict())
    runner = GpuRunner(model_config, config, TensorWeights(tensors), device=DEVICE)
    runner.load_weights()
    runner.allocate_kv()
    return runner


def test_idle_time_tidies_up_after_a_load() -> None:
    weights = TensorWeights(engine_tensors(tiny_llama()))
    model_config = ModelConfig.from_hf(tiny_llama().config.to_dict())
    runner = GpuRunner(model_config, CONFIG, weights, device="cpu")
    assert not runner.use_idle_time()
    assert weights.num_tidied == 1


def new_engine(model: LlamaForCausalLM, config: EngineConfig = CONFIG) -> Engine:
    return Engine(config, new_gpu_runner(model, config), frozenset())


def answers(
    engine: Engine, prompts: Mapping[int, Sequence[int]], sampling: SamplingParams
) -> tuple[dict[int, list[int]], dict[int, list[TokenLogprobs]]]:
    """Run prompts together; return tokens and log-probabilities by id."""
    for id, prompt in prompts.items():
        engine.submit(new_request(id, prompt, sampling=sampling))
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    logprobs: defaultdict[int, list[TokenLogprobs]] = defaultdict(list)
    while engine.has_work():
        result = engine.step()
        for key, token_id in result.tokens:
            tokens[key.sequence_id].append(token_id)
        for key, found in result.logprobs.items():
            logprobs[key.sequence_id].append(found)
        assert all(end.reason is FinishReason.LENGTH for end in result.finished), result.finished
    figures = engine.figures()
    assert figures.num_free_kv_blocks == figures.num_kv_blocks
    return dict(tokens), dict(logprobs)


def greedy_alone(model: LlamaForCausalLM, prompt: Sequence[int], num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(reference_logits(model, token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]


@pytest.mark.parametrize(
    "overrides",
    [{}, {"head_dim": 24, "tie_word_embeddings": True}, {"num_key_value_heads": 2}],
    ids=["grouped", "odd head_dim, tied", "a kv head each"],
)
def test_teacher_forced_logits_are_those_of_transformers(overrides: dict[str, Any]) -> None:
    model = tiny_llama(**overrides)
    generator = torch.Generator().manual_seed(1)
    targets = {
        id: torch.randint(0, 100, (size,), generator=generator).tolist()
        for id, size in ((1, 20), (2, 19), (3, 10 * (1 + SCALE)))
    }
    forced = TeacherForced(new_gpu_runner(model), targets)
    run_forced(forced, targets, CONFIG, num_prompt_tokens=18)
    assert forced.largest_error(model) < 1e-3


def test_overlapped_chunked_answers_are_those_of_each_sequence_alone() -> None:
    model = tiny_llama()
    num_prompts, num_tokens = 3 + SCALE, 3 * SCALE
    prompts = {id: [(7 * id + i) % 100 for i in range(5 * id)] for id in range(1, num_prompts)}
    tokens, _ = answers(
        new_engine(model), prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens)
    )
    assert tokens == {id: greedy_alone(model, prompt, num_tokens) for id, prompt in prompts.items()}


def test_last_layer_is_finished_for_sampled_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(tiny_llama(num_hidden_layers=2))
    sizes: list[int] = []
    add = GpuLinear.add

    def counted(self: GpuLinear, x: torch.Tensor, out: torch.Tensor) -> None:
        sizes.append(len(x))
        add(self, x, out)

    monkeypatch.setattr(GpuLinear, "add", counted)
    engine.submit(new_request(1, list(range(16)), sampling=SamplingParams(max_tokens=1)))
    while engine.has_work():
        engine.step()
    assert sizes[2:] == [1, 1]
    assert min(sizes[:2]) >= 16


def test_prefix_hits_and_preemptions_change_no_answer() -> None:
    model = tiny_llama()
    block_bytes = 16 * 4 * ModelConfig.from_hf(model.config.to_dict()).kv_elements_per_token
    engine = new_engine(model, replace(CONFIG, kv_cache_bytes=5 * block_bytes, max_model_len=64))
    prompts = {id: [*range(45), id] for id in range(1, 4)}
    sampling = SamplingParams(temperature=0.0, max_tokens=6)
    tokens, _ = answers(engine, prompts, sampling)
    assert engine.figures().num_preemptions > 0
    assert engine.figures().num_cached_prompt_tokens > 0
    assert tokens == {id: greedy_alone(model, prompt, 6) for id, prompt in prompts.items()}


def test_seeded_answer_depends_on_no_neighbour() -> None:
    engine = new_engine(tiny_llama())
    prompts = {id: [id, 2 * id, 50] for id in (1, 3)}
    sampling = SamplingParams(temperature=50.0, top_p=0.9, seed=12, max_tokens=3)
    together, _ = answers(engine, prompts, sampling)
    assert together[3] == answers(engine, {3: prompts[3]}, sampling)[0][3]
    other = SamplingParams(temperature=50.0, top_p=0.9, seed=13, max_tokens=3)
    assert together[3] != answers(engine, {3: prompts[3]}, other)[0][3]


def test_logprobs_are_of_the_model_alone() -> None:
    model = tiny_llama()
    prompt = [3, 1, 4, 1, 5]
    sampling = SamplingParams(
        temperature=3.0, seed=1, logit_bias={7: 8.0}, presence_penalty=1.0,
        num_logprobs=3, max_tokens=4,
    )  # fmt: skip
    tokens, logprobs = answers(new_engine(model), {1: prompt}, sampling)
    logits = reference_logits(model, [*prompt, *tokens[1]])[len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert len(logprobs[1]) == 4
    for position, found in enumerate(logprobs[1]):
        values, ids = expected[position].topk(3)
        assert found.logprob == pytest.approx(
            float(expected[position, tokens[1][position]]), abs=1e-3
        )
        assert list(found.top_token_ids) == ids.tolist()
        assert list(found.top_logprobs) == pytest.approx(values.tolist(), abs=1e-3)


def test_logprobs_take_only_memory_that_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.gpu.limits.MAX_LOGPROB_ROWS", 2)
    vocab_size = 5000
    model = tiny_llama(vocab_size=vocab_size)
    engine = new_engine(model)
    changed = SamplingParams(
        temperature=2.0, seed=1, logit_bias={7: 8.0}, presence_penalty=1.0, max_tokens=2
    )
    constrained = SamplingParams(allowed_token_ids=frozenset(range(50)), max_tokens=2)
    kinds = [changed, constrained, SamplingParams(temperature=0.0, max_tokens=2)]
    prompts = {id: [id, 7, 30 * id] for id in range(1, 7)}
    for id, prompt in prompts.items():
        num_logprobs = None if id == 2 else id
        sampling = replace(kinds[id % 3], num_logprobs=num_logprobs, num_prompt_logprobs=1)
        engine.submit(new_request(id, prompt, sampling=sampling))
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    logprobs: defaultdict[int, list[TokenLogprobs]] = defaultdict(list)
    with LargestAllocation() as largest:
        while engine.has_work():
            result = engine.step()
            for key, token_id in result.tokens:
                tokens[key.sequence_id].append(token_id)
            for key, found in result.logprobs.items():
                logprobs[key.sequence_id].append(found)
    assert largest.num_bytes < 4 * vocab_size * 2, "torch made room for rows of logits"
    assert sorted(logprobs) == [1, 3, 4, 5, 6]
    assert set(tokens[1] + tokens[4]) <= set(range(50))
    for id, reported in logprobs.items():
        expected = reference_logits(model, [*prompts[id], *tokens[id]]).log_softmax(-1)[2:]
        for row, token_id, found in zip(expected, tokens[id], reported, strict=False):
            assert found.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
            assert list(found.top_token_ids) == row.topk(id).indices.tolist()


def test_all_work_memory_is_planned_for() -> None:
    runner = new_gpu_runner(tiny_llama())
    num_bytes = sum(slab.num_bytes for slab in runner._work._slabs)
    assert 0 < num_bytes <= runner._kv_sizes(runner._limits).activation_bytes


class LargestAllocation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most memory that one of torch's operations takes for its result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        known = _storages((args, kwargs))
        for pointer, num_bytes in _storages(found).items():
            if pointer not in known:
                self.num_bytes = max(self.num_bytes, num_bytes)
        return found


def _storages(values: object) -> dict[int, int]:
    """Return the sizes of all tensors' memory, by address."""
    storages = [
        value if isinstance(value, torch.UntypedStorage) else value.untyped_storage()
        for value in tree_leaves(values)
        if isinstance(value, torch.Tensor | torch.UntypedStorage)
    ]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_penalties_follow_prompt_and_output() -> None:
    model = tiny_llama()
    prompt = [3, 1, 4, 1, 5]
    sampling = SamplingParams(
        temperature=0.0, repetition_penalty=1.7, frequency_penalty=0.4, presence_penalty=0.3,
        max_tokens=8,
    )  # fmt: skip
    tokens, _ = answers(new_engine(model), {1: prompt}, sampling)
    expected: list[int] = []
    for _ in range(8):
        logits = reference_logits(model, [*prompt, *expected])[-1]
        for token in {*prompt, *expected}:
            logits[token] = logits[token] / 1.7 if logits[token] > 0 else logits[token] * 1.7
        for token in expected:
            logits[token] -= 0.4
        for token in set(expected):
            logits[token] -= 0.3
        expected.append(int(logits.argmax()))
    assert tokens[1] == expected


def test_a_choice_that_fails_late_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = SamplingParams(
        temperature=0.0, frequency_penalty=2.0, allowed_token_ids=frozenset(range(3)), max_tokens=6
    )
    engine = new_engine(tiny_llama())
    expected, _ = answers(engine, {1: [3, 1, 4, 1, 5]}, sampling)
    sampler = cast(GpuRunner, engine._runner)._sampler
    launch, num_launches = sampler.launch, 0

    def fail_once(*args: Any, **kwargs: Any) -> PendingSample:
        nonlocal num_launches
        num_launches += 1
        pending = launch(*args, **kwargs)
        if num_launches == 3:
            raise RuntimeError("no memory for what comes after the choice")
        return pending

    monkeypatch.setattr(sampler, "launch", fail_once)
    found, _ = answers(engine, {2: [3, 1, 4, 1, 5]}, sampling)
    assert found[2] == expected[1]


def test_sequence_without_finite_logits_fails_alone() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[99] = torch.nan
    runner = new_gpu_runner(model)
    engine = Engine(CONFIG, runner, frozenset())
    sampling = SamplingParams(temperature=0.0, max_tokens=5)
    engine.submit(new_request(1, [1, 2, 3], sampling=sampling))
    engine.submit(new_request(2, [1, 99, 3], sampling=sampling))
    ends: dict[int, FinishReason] = {}
    tokens: defaultdict[int, list[int]] = defaultdict(list)
    while engine.has_work():
        result = engine.step()
        ends |= {end.key.sequence_id: end.reason for end in result.finished}
        for key, token_id in result.tokens:
            tokens[key.sequence_id].append(token_id)
    assert ends == {1: FinishReason.LENGTH, 2: FinishReason.ERROR}
    assert tokens == {1: greedy_alone(model, [1, 2, 3], 5)}


def test_memory_is_given_back_and_taken_again() -> None:
    model = tiny_llama()
    runner = new_gpu_runner(model)
    engine = Engine(CONFIG, runner, frozenset())
    sampling = SamplingParams(temperature=0.0, max_tokens=4)
    before, _ = answers(engine, {1: [1, 2, 3]}, sampling)
    answers(engine, {1: [1, 2, 3]}, sampling)  # by now a GPU has graphs of its steps
    num_graphs = runner.num_graphs
    assert runner.release() > 0
    assert (runner.weights_bytes, runner.kv_cache_bytes) == (0, 0)
    assert ("CUDA graphs" in runner.kept_reason) == IS_GPU
    runner.load_weights()
    runner.allocate_kv()
    engine.reset_cache()
    assert runner.num_graphs == num_graphs, "graphs outlive the memory they read"
    assert (num_graphs > 0) == IS_GPU
    assert answers(engine, {1: [1, 2, 3]}, sampling)[0] == before


@pytest.mark.parametrize(("is_seeded", "num_expected"), [(True, 2), (False, 8)])
def test_a_warm_up_ends_with_the_reading_if_nothing_is_to_be_compiled(
    monkeypatch: pytest.MonkeyPatch, *, is_seeded: bool, num_expected: int
) -> None:
    runner = new_gpu_runner(tiny_llama())
    launched: list[ScheduledBatch] = []

    def launch(batch: ScheduledBatch) -> Any:
        launched.append(batch)
        monkeypatch.setattr(runner._weights, "is_read", len(launched) >= 2)
        return SimpleNamespace(choose=lambda _masks: None, wait=lambda: None)

    monkeypatch.setattr(runner, "launch", launch)
    monkeypatch.setattr(runner.kernels, "is_seeded", is_seeded)
    monkeypatch.setattr(runner._weights, "is_read", False)
    runner.warm_up()
    assert len(launched) == num_expected
    runner.warm_up()
    assert len(launched) == num_expected, "once is enough"


@pytest.mark.skipif(not IS_GPU, reason="CUDA graphs need a GPU")
def test_graphs_change_no_answer_and_nothing_is_compiled_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    runner = new_gpu_runner(model)
    runner.warm_up()
    prompts = {id: [(7 * id + i) % 100 for i in range(5 * id)] for id in range(1, 8)}
    sampling = SamplingParams(temperature=0.0, max_tokens=30)
    tokens, _ = answers(Engine(CONFIG, runner, frozenset()), prompts, sampling)
    assert runner.num_graphs > 1
    assert runner.num_late_compilations == 0
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rms_norm(torch.ones(1, 321, device=DEVICE), torch.ones(321, device=DEVICE), 1e-5,
             torch.empty(1, 321, device=DEVICE))  # fmt: skip
    assert runner.num_late_compilations == 1, "the counter counts"
    assert tokens == {id: greedy_alone(model, prompt, 30) for id, prompt in prompts.items()}


def test_constrained_sequences_overlap_with_others_and_choose_what_they_may() -> None:
    model = tiny_llama()
    allowed = frozenset({7, 33, 99})
    limited = SamplingParams(
        temperature=0.0, max_tokens=5, allowed_token_ids=allowed, bad_words=((7, 7),)
    )
    prompts = {id: [(7 * id + i) % 100 for i in range(4 * id)] for id in (1, 2, 3)}
    engine = new_engine(model)
    engine.submit(new_request(1, prompts[1], sampling=limited))
    engine.submit(new_request(3, prompts[3], sampling=limited))
    tokens, _ = answers(engine, {2: prompts[2]}, SamplingParams(temperature=0.0, max_tokens=5))
    assert tokens[2] == greedy_alone(model, prompts[2], 5)
    for id in (1, 3):
        assert tokens[id] == _greedy_among(model, prompts[id], allowed, 5)


def _greedy_among(
    model: LlamaForCausalLM, prompt: Sequence[int], allowed: frozenset[int], num_tokens: int
) -> list[int]:
    """Choose the likeliest allowed token, but never 7 after 7 in the output."""
    token_ids = list(prompt)
    for index in range(num_tokens):
        logits = reference_logits(model, token_ids)[-1]
        is_bad = index > 0 and token_ids[-1] == 7
        token_ids.append(max(allowed - {7 if is_bad else -1}, key=lambda token: logits[token]))
    return token_ids[len(prompt) :]


def test_prompt_logprobs_are_those_of_transformers_in_any_mix() -> None:
    model = tiny_llama()
    engine = new_engine(model)
    prompts = {id: [(11 * id + i) % 100 for i in range(9 * id)] for id in (1, 2, 3)}
    for id, prompt in prompts.items():
        sampling = SamplingParams(
            temperature=0.0, max_tokens=3, num_prompt_logprobs=None if id == 2 else id
        )
        engine.submit(new_request(id, prompt, sampling=sampling))
    found: defaultdict[int, dict[int, tuple[float, list[int]]]] = defaultdict(dict)
    while engine.has_work():
        for key, part in engine.step().prompt_logprobs.items():
            id = key.sequence_id
            for i, logprob in enumerate(part.logprobs):
                top_ids = list(part.top_token_ids[id * i : id * (i + 1)])
                found[id][part.first + i] = (logprob, top_ids)
    assert sorted(found) == [1, 3]
    for id, by_position in found.items():
        expected = reference_logits(model, prompts[id]).log_softmax(-1)
        assert sorted(by_position) == list(range(1, len(prompts[id])))
        for position, (logprob, top_ids) in by_position.items():
            row = expected[position - 1]
            assert logprob == pytest.approx(float(row[prompts[id][position]]), abs=1e-3)
            assert top_ids[0] == int(row.argmax())
            assert len(top_ids) == id
