import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from runtime.config import EngineConfig
from runtime.cpu import linear
from runtime.cpu.linear import is_packing_faster
from runtime.cpu.runner import CpuRunner
from runtime.engine.engine import Engine
from runtime.engine.sequence import FinishedSequence, FinishReason, SamplingParams
from runtime.errors import LoadFailed, SnapshotDamaged
from runtime.linux import resident_bytes
from runtime.memory.weights import SnapshotWeights
from runtime.model.config import ModelConfig
from snapshots.builder import BuildOptions, build
from snapshots.checksums import plain_file
from snapshots.manifest import Manifest
from snapshots.sources.directory import DirectorySource
from snapshots.store import SnapshotStore
from tests.checkpoints import TinyLlama, write_tiny_llama
from tests.runtime.cpu.oracle import (
    TeacherForced,
    TensorWeights,
    engine_tensors,
    new_runner,
    random_llama,
    reference_logits,
    run_forced,
)
from tests.runtime.engine.sequences import new_request

needs_packing = pytest.mark.skipif(
    not is_packing_faster(torch.bfloat16), reason="this processor multiplies bf16 itself"
)
PROMPT = [5, 17, 93, 2, 41, 8, 60]


@pytest.fixture(scope="module")
def tiny_snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(home / "checkpoint", TinyLlama(is_tied=True))
    store = SnapshotStore(home / "store")
    options = BuildOptions(dtype="bfloat16")
    return build(DirectorySource(home / "checkpoint"), store, options).snapshot.path


def generate(
    runner: CpuRunner, *, num_tokens: int = 12, prompt: list[int] = PROMPT
) -> tuple[list[int], FinishedSequence]:
    engine = Engine(EngineConfig(), runner, frozenset())
    engine.submit(new_request(1, prompt, max_tokens=num_tokens))
    tokens: list[int] = []
    finished: list[FinishedSequence] = []
    while engine.has_work():
        result = engine.step()
        tokens += [token_id for _, token_id in result.tokens]
        finished += result.finished
    return tokens, finished[0]


def test_greedy_tokens_equal_transformers() -> None:
    model = random_llama()
    token_ids = [*PROMPT]
    for _ in range(12):
        token_ids.append(int(reference_logits(model, token_ids)[-1].argmax()))
    assert generate(new_runner(model))[0] == token_ids[len(PROMPT) :]


def test_seeded_tokens_are_the_same_in_any_batch() -> None:
    model = random_llama()
    sampling = SamplingParams(temperature=1.5, top_p=0.95, seed=3, max_tokens=20)
    answers = []
    for num_others in (0, 5):
        engine = Engine(EngineConfig(), new_runner(model), frozenset())
        for id in range(2, 2 + num_others):
            engine.submit(new_request(id, [id] * id, max_tokens=30))
        engine.submit(new_request(1, PROMPT, sampling=sampling))
        tokens = []
        while engine.has_work():
            tokens += [id for key, id in engine.step().tokens if key.sequence_id == 1]
        answers.append(tokens)
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 5


def poisoned_runner(model: LlamaForCausalLM, poison: int) -> CpuRunner:
    """Return a runner whose model makes no number of one token."""
    tensors = engine_tensors(model)
    embedding = tensors["embed_tokens.weight"].clone()
    embedding[poison] = math.nan
    runner = CpuRunner(
        ModelConfig.from_hf(model.config.to_dict()),
        EngineConfig(kv_cache_bytes=1 << 15, max_model_len=32),
        TensorWeights(tensors | {"embed_tokens.weight": embedding}),
    )
    runner.load_weights()
    runner.allocate_kv()
    return runner


def test_nan_in_the_midst_of_a_prompt_ends_it_there_and_its_blocks_are_clean() -> None:
    model = random_llama(tie_word_embeddings=False)
    poison = 98
    runner = poisoned_runner(model, poison)
    engine = Engine(EngineConfig(max_num_batched_tokens=8), runner, frozenset())
    engine.submit(new_request(1, [poison, *range(20)], max_tokens=1))
    (end,) = engine.step().finished
    assert end.reason is FinishReason.ERROR
    assert "not finite" in end.error
    for id in range(2, 2 + runner.num_kv_blocks):
        engine.submit(new_request(id, [id] * 3, max_tokens=1))
    while engine.has_work():
        for end in engine.step().finished:
            assert end.reason is FinishReason.LENGTH


def test_nan_fails_its_sequence_alone_and_its_blocks_are_clean_again() -> None:
    model = random_llama(tie_word_embeddings=False)
    expected, _ = generate(new_runner(model), num_tokens=8)
    poison = next(id for id in range(50, 100) if id not in [*expected, *PROMPT])
    runner = poisoned_runner(model, poison)
    engine = Engine(EngineConfig(), runner, frozenset())
    engine.submit(new_request(1, PROMPT, max_tokens=8))
    engine.submit(new_request(2, [poison, 3, 4], max_tokens=8))
    ends: dict[int, FinishedSequence] = {}
    tokens = []
    while engine.has_work():
        result = engine.step()
        ends |= {end.key.sequence_id: end for end in result.finished}
        tokens += [id for key, id in result.tokens if key.sequence_id == 1]
    assert ends[2].reason is FinishReason.ERROR
    assert "not finite" in ends[2].error
    assert ends[1].reason is FinishReason.LENGTH
    assert tokens == expected
    # Every block of this small cache is used again, masked places included.
    for id in range(3, 3 + runner.num_kv_blocks):
        engine.submit(new_request(id, [id] * 17, max_tokens=1))
    while engine.has_work():
        for end in engine.step().finished:
            assert end.reason is FinishReason.LENGTH


@needs_packing
def test_packing_between_steps_does_not_change_tokens_and_gives_weights_back(
    tiny_snapshot: Path,
) -> None:
    runner = CpuRunner.open(tiny_snapshot, EngineConfig())
    runner.load_weights()
    runner.allocate_kv()
    loaded_bytes = runner.weights_bytes
    first_token, _ = generate(runner, num_tokens=1)
    assert runner.weights_bytes == loaded_bytes, "the first token does not wait for packing"
    first, _ = generate(runner)
    assert first[:1] == first_token
    assert runner._packer is not None
    assert runner._packer.is_done, "twelve steps are enough for a head and two layers"
    assert generate(runner)[0] == first
    assert runner.weights_bytes != loaded_bytes


@needs_packing
def test_packing_that_fails_ends_no_sequence(
    tiny_snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CpuRunner.open(tiny_snapshot, EngineConfig())
    runner.load_weights()
    runner.allocate_kv()
    expected, _ = generate(runner, num_tokens=1)
    calls = []

    def failing(weight: torch.Tensor) -> torch.ScriptObject:
        calls.append(weight)
        raise MemoryError

    monkeypatch.setattr(linear, "_pack", failing)
    tokens, finished = generate(runner)
    assert (tokens[:1], finished.reason) == (expected, FinishReason.LENGTH)
    num_calls = len(calls)
    assert generate(runner)[0] == tokens
    assert len(calls) == num_calls > 0, "it is not tried again"


def test_released_runner_can_load_again_and_answers_the_same(tiny_snapshot: Path) -> None:
    runner = CpuRunner.open(tiny_snapshot, EngineConfig())
    assert runner.weights_bytes == runner.kv_cache_bytes == 0
    answers = []
    for _ in range(2):
        runner.load_weights()
        assert runner.allocate_kv() == runner.num_kv_blocks
        assert runner.weights_bytes > 0
        assert runner.kv_cache_bytes > 0
        answers.append(generate(runner)[0])
        runner.release()
        assert runner.weights_bytes == runner.kv_cache_bytes == 0
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 6]}}, {5, 6}),
        ({"generation_config.json": {"eos_token_id": 7}}, {7}),
        ({"generation_config.json": {}}, {2}),
        ({}, {2}),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(
    tiny_snapshot: Path, tmp_path: Path, files: dict[str, object], expected: set[int]
) -> None:
    copy = relisted(tiny_snapshot, tmp_path, files)
    assert CpuRunner.open(copy, EngineConfig()).eos_token_ids == expected


def relisted(snapshot: Path, target: Path, files: Mapping[str, object]) -> Path:
    """Copy a snapshot with other generation configs, as if it had been built with them."""
    copy = target / "copy"
    copy.mkdir()
    for path in snapshot.iterdir():
        if path.name not in ("generation_config.json", "manifest.json"):
            (copy / path.name).symlink_to(path)
    for name, content in files.items():
        (copy / name).write_text(json.dumps(content))
    manifest = Manifest.from_json((snapshot / "manifest.json").read_text())
    kept = [file for file in manifest.files if file.path != "generation_config.json"]
    listed = (*kept, *(plain_file(copy, name) for name in files))
    manifest = replace(manifest, files=listed)
    (copy / "manifest.json").write_text(manifest.to_json())
    return copy.rename(target / manifest.ref)


def test_dtype_other_than_the_snapshots_is_refused(tiny_snapshot: Path) -> None:
    with pytest.raises(LoadFailed, match="holds bfloat16, the engine is to run float32"):
        CpuRunner.open(tiny_snapshot, EngineConfig(dtype="float32"))


def test_tensor_parallelism_is_refused_on_the_cpu(tiny_snapshot: Path) -> None:
    with pytest.raises(LoadFailed, match="tensor_parallel_size"):
        CpuRunner.open(tiny_snapshot, EngineConfig(tensor_parallel_size=2))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_changed_configuration_is_a_damaged_snapshot(
    name: str, tiny_snapshot: Path, tmp_path: Path
) -> None:
    copy = tmp_path / tiny_snapshot.name
    shutil.copytree(tiny_snapshot, copy)
    content = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(content | {"eos_token_id": 9}))
    with pytest.raises(SnapshotDamaged, match=rf"{name}: has been changed"):
        CpuRunner.open(copy, EngineConfig())


def test_missing_manifest_is_a_damaged_snapshot(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SnapshotDamaged, match="no manifest"):
        CpuRunner.open(tmp_path, EngineConfig())


def test_flipped_byte_is_a_damaged_snapshot_and_holds_nothing(
    tiny_snapshot: Path, tmp_path: Path
) -> None:
    copy = tmp_path / tiny_snapshot.name
    copy.mkdir()
    for path in tiny_snapshot.iterdir():
        if path.name != "tp1":
            (copy / path.name).symlink_to(path)
    data = bytearray((tiny_snapshot / "tp1" / "rank0.safetensors").read_bytes())
    data[-100_000] ^= 1
    (copy / "tp1").mkdir()
    (copy / "tp1" / "rank0.safetensors").write_bytes(data)
    weights = SnapshotWeights(copy)
    with pytest.raises(SnapshotDamaged, match="wrong bytes"):
        weights.load(None)
    assert weights.held_bytes == 0


def test_processor_with_bfloat16_products_runs_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.cpu.runner.is_packing_faster", lambda dtype: False)
    model = random_llama()
    torch.nn.Module.to(model, torch.bfloat16)
    targets = {1: list(range(40)), 2: list(range(60, 20, -1))}
    forced = TeacherForced(new_runner(model), targets)
    run_forced(forced, targets, EngineConfig(max_num_batched_tokens=9), num_prompt_tokens=30)
    torch.nn.Module.to(model, torch.float32)
    assert forced.largest_error(model) < 0.05 * reference_logits(model, targets[1]).abs().max()


@pytest.mark.model
def test_release_shrinks_the_process_by_what_it_held(smollm2_snapshot: Path) -> None:
    runner = CpuRunner.open(smollm2_snapshot, EngineConfig())
    runner.load_weights()
    runner.allocate_kv()
    generate(runner, num_tokens=3)
    held = runner.weights_bytes
    before = resident_bytes()
    freed = runner.release()
    assert freed > 0.9 * held
    assert before - resident_bytes() > 0.9 * held


def test_bias_penalties_and_logprobs_are_those_of_their_definitions() -> None:
    model = random_llama()
    sampling = SamplingParams(
        temperature=0.0, repetition_penalty=1.7, frequency_penalty=0.4, presence_penalty=0.3,
        logit_bias={8: 0.5}, num_logprobs=3, max_tokens=8,
    )  # fmt: skip
    prompt = [3, 1, 4, 1, 5]
    engine = Engine(EngineConfig(), new_runner(model), frozenset())
    engine.submit(new_request(1, prompt, sampling=sampling))
    tokens: list[int] = []
    while engine.has_work():
        result = engine.step()
        raw = reference_logits(model, [*prompt, *tokens])[-1]
        logits = raw.clone()
        logits[8] += 0.5
        for token in {*prompt, *tokens}:
            logits[token] = logits[token] / 1.7 if logits[token] > 0 else logits[token] * 1.7
        for token in tokens:
            logits[token] -= 0.4
        for token in set(tokens):
            logits[token] -= 0.3
        [(key, token_id)] = result.tokens
        assert token_id == int(logits.argmax())
        found = result.logprobs[key]
        expected = raw.log_softmax(-1)
        assert found.logprob == pytest.approx(float(expected[token_id]), abs=1e-4)
        assert list(found.top_token_ids) == expected.topk(3).indices.tolist()
        assert list(found.top_logprobs) == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
        tokens.append(token_id)
    assert len(tokens) == 8


@pytest.mark.parametrize("budget", [4, 64])
def test_prompt_logprobs_are_those_of_the_model_whatever_the_cache_and_the_chunks(
    budget: int,
) -> None:
    model = random_llama()
    config = EngineConfig(
        max_num_batched_tokens=budget, max_num_seqs=2, block_size=4, kv_cache_bytes=1 << 20
    )
    engine = Engine(config, new_runner(model), frozenset())
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    expected = reference_logits(model, prompt).log_softmax(-1)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, num_prompt_logprobs=2)
    for id in (1, 2):  # the second finds all of it in the prefix cache
        engine.submit(new_request(id, prompt, sampling=sampling))
        found: dict[int, tuple[float, list[int], list[float]]] = {}
        while engine.has_work():
            for part in engine.step().prompt_logprobs.values():
                for i, logprob in enumerate(part.logprobs):
                    tops = slice(2 * i, 2 * i + 2)
                    found[part.first + i] = (
                        logprob, list(part.top_token_ids[tops]), list(part.top_logprobs[tops])
                    )  # fmt: skip
        assert sorted(found) == list(range(1, len(prompt)))
        for position, (logprob, top_ids, top) in found.items():
            row = expected[position - 1]
            assert logprob == pytest.approx(float(row[prompt[position]]), abs=1e-4)
            assert top_ids == row.topk(2).indices.tolist()
            assert top == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
