"""Transformers as the reference: random models, their weights as the engine takes them, logits."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from runtime.config import EngineConfig
from runtime.cpu.runner import CpuRunner
from runtime.engine.batch import SampledTokens, ScheduledBatch
from runtime.engine.engine import Engine
from runtime.engine.sequence import FinishedSequence, SamplingParams, SequenceKey, SequenceRequest
from runtime.memory.weights import OnProgress
from runtime.model.config import ModelConfig
from snapshots.loader import LoadReport

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


class TensorWeights:
    """Weights that are in memory already."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.dtype = tensors["embed_tokens.weight"].dtype
        self.total_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self.held_bytes = 0
        self.is_read = True
        self.discarded: list[Tensor] = []
        self.num_tidied = 0

    def start(self) -> Mapping[str, Tensor]:
        self.held_bytes = self.total_bytes
        return self.tensors

    def load(self, on_progress: OnProgress | None) -> tuple[Mapping[str, Tensor], LoadReport]:
        self.held_bytes = self.total_bytes
        return self.tensors, LoadReport(num_bytes=self.total_bytes, read_s=0.0, verify_s=0.0)

    def tidy(self) -> None:
        self.num_tidied += 1

    def discard(self, weight: Tensor) -> None:
        self.discarded.append(weight)

    def release(self) -> None:
        self.held_bytes = 0


def random_llama(*, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Return a tiny random Llama in fp32, all its weights and biases far from zero and one."""
    options: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 100,
        "max_position_embeddings": 256,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**options | overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    model.train(mode=False)
    return model


def engine_tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Return a model's weights fused and named as in a snapshot."""
    tensors = {
        name.removeprefix("model."): parameter.detach()
        for name, parameter in model.named_parameters()
    }
    for index in range(model.config.num_hidden_layers):
        for fused, parts in FUSED.items():
            for kind in ("weight", "bias"):
                names = [f"layers.{index}.{part}.{kind}" for part in parts]
                if names[0] in tensors:
                    rows = [tensors.pop(name) for name in names]
                    tensors[f"layers.{index}.{fused}.{kind}"] = torch.cat(rows)
    return tensors


def new_runner(model: LlamaForCausalLM, config: EngineConfig | None = None) -> CpuRunner:
    """Return a runner of a model, everything in memory."""
    runner = CpuRunner(
        ModelConfig.from_hf(model.config.to_dict()),
        config or EngineConfig(kv_cache_bytes=1 << 22),
        TensorWeights(engine_tensors(model)),
    )
    runner.load_weights()
    runner.allocate_kv()
    return runner


@torch.no_grad()
def reference_logits(model: LlamaForCausalLM, token_ids: Sequence[int]) -> Tensor:
    """Return transformers' logits, fp32 [num_tokens, vocab_size]."""
    logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits.float()


class LogitsRunner(Protocol):
    """A runner that gives all its logits away."""

    @property
    def num_kv_blocks(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def max_step_tokens(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def all_logits(self, batch: ScheduledBatch) -> Tensor: ...


class TeacherForced:
    """A runner that samples given tokens and keeps the logits of every token it computes."""

    def __init__(self, runner: LogitsRunner, targets: Mapping[int, Sequence[int]]) -> None:
        self.num_kv_blocks = runner.num_kv_blocks
        self.max_model_len = runner.max_model_len
        self.max_step_tokens = runner.max_step_tokens
        self.max_in_flight = 1
        self.num_late_compilations = 0
        self.vocab_size = runner.vocab_size
        self.logits: dict[int, dict[int, Tensor]] = {id: {} for id in targets}
        self.batch_sizes: list[int] = []
        self._runner = runner
        self._targets = targets

    def max_prefill_tokens(self, num_decodes: int) -> int:
        return self.max_step_tokens

    def check_device(self) -> None:
        pass

    def use_idle_time(self) -> bool:
        return False

    def launch(self, batch: ScheduledBatch) -> SampledTokens:
        rows = iter(self._runner.all_logits(batch))
        for item in batch.sequences:
            for position in range(item.start, item.end):
                self.logits[item.key.sequence_id][position] = next(rows).cpu().clone()
        self.batch_sizes.append(len(batch.sequences))
        sampled = [item for item in batch.sequences if item.is_sampled]
        token_ids = [self._targets[item.key.sequence_id][item.end] for item in sampled]
        return SampledTokens(token_ids=token_ids, faults={})

    def largest_error(self, model: LlamaForCausalLM) -> float:
        """Return the largest difference to transformers over all logits that were computed."""
        errors = []
        for id, logits in self.logits.items():
            expected = reference_logits(model, self._targets[id])
            positions = sorted(logits)
            computed = torch.stack([logits[position] for position in positions])
            errors.append((computed - expected[positions]).abs().max().item())
        return max(errors)


def run_forced(
    forced: TeacherForced,
    targets: Mapping[int, Sequence[int]],
    config: EngineConfig,
    *,
    num_prompt_tokens: int,
    together: bool = True,
) -> tuple[Engine, list[FinishedSequence]]:
    """Run each target through an engine: a prompt, then decodes that follow the target.

    The last token is sampled and never run.
    """
    engine = Engine(config, forced, frozenset())
    finished: list[FinishedSequence] = []
    for id, token_ids in targets.items():
        sampling = SamplingParams(
            temperature=0.0, max_tokens=len(token_ids) - num_prompt_tokens, ignore_eos=True
        )
        engine.submit(
            SequenceRequest(
                key=SequenceKey(0, id),
                prompt_token_ids=token_ids[:num_prompt_tokens],
                sampling=sampling,
            )
        )
        while not together and engine.has_work():
            finished += engine.step().finished
    while engine.has_work():
        finished += engine.step().finished
    assert not [end.error for end in finished if end.error]
    return engine, finished
