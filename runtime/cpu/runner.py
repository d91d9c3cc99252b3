"""Tensors of one engine on the CPU: weights, KV cache, forward pass, sampling.

Knows nothing of requests beyond the batch it is given.
"""

import os
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from runtime.config import EngineConfig
from runtime.cpu.adjustments import adjust, mask
from runtime.cpu.attention import AttentionPlan, AttentionSpan
from runtime.cpu.linear import is_packing_faster
from runtime.cpu.llama import Llama
from runtime.cpu.packing import Packer
from runtime.cpu.prompt_logprobs import report_prompts
from runtime.cpu.sampler import SamplingRow, sample
from runtime.cpu.threads import ThreadTuner, usable_cores
from runtime.engine.batch import (
    PendingTokens,
    SampledTokens,
    ScheduledBatch,
    ScheduledSequence,
    TokenMasks,
)
from runtime.engine.sequence import SamplingParams, TokenLogprobs
from runtime.engine_api import NothingCompiled
from runtime.environment import cpu_environment
from runtime.linux import resident_bytes
from runtime.memory.kv_plan import KvSizes, plan_kv
from runtime.memory.slab import HostSlab, trim_malloc
from runtime.memory.weights import OnProgress, SnapshotWeights, Weights
from runtime.model.config import ModelConfig
from runtime.model.description import check_dtype, read_model
from snapshots.loader import LoadReport

MAX_PREFILL_TOKENS = 256  # products are at full speed, and decodes wait for one such step at most
ACTIVATION_COPIES = 4  # of the widest intermediate result, all alive at once
NOT_FINITE = "the model computed numbers that are not finite"


class CpuRunner(NothingCompiled):
    """Brings a model into memory and out again, and runs batches in between.

    Args:
        model_config: The model's shape.
        config: Limits of the engine.
        weights: Where the tensors come from.
        eos_token_ids: The model's own end-of-sequence tokens.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: EngineConfig,
        weights: Weights,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.eos_token_ids = eos_token_ids
        self._model_config = model_config
        self._config = config
        self._weights = weights
        self._is_packed = is_packing_faster(weights.dtype)
        self._dtype = torch.float32 if self._is_packed else weights.dtype
        self._kv_plan = plan_kv(config, self._kv_sizes())
        self._model: Llama | None = None
        self._packer: Packer | None = None
        self._has_answered = False
        self._kv_slab: HostSlab | None = None
        self._kv_cache = torch.empty(0)
        self._num_cores = usable_cores()
        self._tuner = ThreadTuner(self._num_cores)

    @classmethod
    def open(cls, snapshot_dir: Path, config: EngineConfig) -> Self:
        """Read a snapshot's configuration and header; weights come later.

        Raises:
            LoadFailed: The engine cannot run this model, or not with this configuration.
            SnapshotDamaged: A file is missing or not what the manifest says.
            OutOfMemory: The memory limits leave no room for a KV cache.
        """
        description = read_model(snapshot_dir)
        weights = SnapshotWeights(snapshot_dir)
        check_dtype(config, weights.dtype)
        return cls(description.config, config, weights, description.eos_token_ids)

    @property
    def weights_bytes(self) -> int:
        """Memory held for weights, packed copies included, now."""
        packed_bytes = 0 if self._packer is None else self._packer.packed_bytes
        return self._weights.held_bytes + packed_bytes

    @property
    def kv_cache_bytes(self) -> int:
        """Memory set aside for KV blocks, now; pages are taken as blocks are first used."""
        return 0 if self._kv_slab is None else self._kv_slab.num_bytes

    @property
    def max_model_len(self) -> int:
        """The limit in force, in tokens."""
        return self._kv_plan.max_model_len

    @property
    def max_step_tokens(self) -> int:
        """Most tokens one step can run: a decode of every sequence, and a piece of a prompt."""
        return MAX_PREFILL_TOKENS + self._config.max_num_seqs

    def max_prefill_tokens(self, num_decodes: int) -> int:
        """Return how many tokens of prompts a step should run, whatever else it does."""
        return MAX_PREFILL_TOKENS

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self._model_config.vocab_size

    @property
    def num_kv_blocks(self) -> int:
        """Blocks in the KV cache."""
        return self._kv_plan.num_blocks

    def start_loading(self) -> None:
        """Do nothing: all cores are needed to read them."""

    def load_weights(self, on_progress: OnProgress | None = None) -> LoadReport:
        """Read and verify weights, on all cores.

        Raises:
            SnapshotDamaged: Bytes are not those that were built; nothing is held.
        """
        torch.set_num_threads(self._num_cores)
        tensors, report = self._weights.load(on_progress)
        with torch.inference_mode():
            model = Llama(self._model_config, tensors, is_packed=self._is_packed)
        self._model = model
        self._packer = Packer(
            model.packables,
            num_threads=self._num_cores,
            discard=lambda weight: self._discard(weight, model.embedding),
        )
        self._has_answered = False
        return report

    def environment(self) -> dict[str, str]:
        """Return what of machine and software its profile depends on."""
        return cpu_environment()

    def allocate_kv(self) -> int:
        """Allocate the KV cache; return its number of blocks."""
        shape = self._model_config
        self._kv_slab = HostSlab(
            self.num_kv_blocks * self._config.block_size * self._bytes_per_token(),
            huge_pages=False,
        )
        self._kv_cache = self._kv_slab.tensor.view(self._dtype).view(
            shape.num_layers,
            self.num_kv_blocks,
            self._config.block_size,
            2,
            shape.num_kv_heads,
            shape.head_dim,
        )
        return self.num_kv_blocks

    def warm_up(self) -> None:
        """Do nothing: on the CPU, nothing is compiled."""

    def check_device(self) -> None:
        """Do nothing: a processor computes on, whatever went wrong."""

    def use_idle_time(self) -> bool:
        """Do nothing; return whether anything was done."""
        return False

    def release(self) -> int:
        """Give weights and KV memory back; return by how many bytes the process shrank."""
        resident_before = resident_bytes()
        self._model = None
        self._packer = None
        self._weights.release()
        self._kv_cache = torch.empty(0)
        if self._kv_slab is not None:
            self._kv_slab.release()
            self._kv_slab = None
        trim_malloc()
        return max(0, resident_before - resident_bytes())

    @property
    def kept_reason(self) -> str:
        """Nothing is kept."""
        return ""

    @property
    def kept_bytes(self) -> int:
        """Nothing is kept."""
        return 0

    @property
    def num_late_compilations(self) -> int:
        """None: nothing is compiled."""
        return 0

    @property
    def max_in_flight(self) -> int:
        """One: a launched batch has run when `launch` returns."""
        return 1

    def launch(self, batch: ScheduledBatch) -> PendingTokens:
        """Run a batch; sequences whose logits are not finite are reported as faults."""
        assert self._packer is not None, "weights are loaded"
        with torch.inference_mode():
            if not self._packer.is_done:
                torch.set_num_threads(self._num_cores)
                if self._has_answered:
                    self._packer.pack_group()
                self._has_answered |= any(item.is_sampled for item in batch.sequences)
                return self._execute(batch)
            num_threads = self._tuner.choose(batch.num_tokens)
            torch.set_num_threads(num_threads)
            started = time.perf_counter()
            pending = self._execute(batch)
            self._tuner.record(batch.num_tokens, num_threads, time.perf_counter() - started)
            return pending

    def _execute(self, batch: ScheduledBatch) -> PendingTokens:
        """Run the model, and choose tokens unless their masks are still to come."""
        assert self._model is not None, "weights are loaded"
        hidden = self._forward(batch.sequences)
        last_rows, sampled = _sampled_rows(batch.sequences)
        unsampled = SampledTokens(
            token_ids=(),
            faults=self._faults_of_chunks(batch.sequences, hidden),
            prompt_logprobs=report_prompts(batch.sequences, hidden, self._model.logits),
        )
        if not sampled:
            return unsampled
        logits = self._model.logits(hidden[last_rows])
        if batch.is_constrained:
            return _PendingChoice(lambda masks: self._choose(logits, sampled, masks, unsampled))
        return self._choose(logits, sampled, None, unsampled)

    @torch.inference_mode()
    def _choose(
        self,
        logits: Tensor,
        sampled: list[tuple[int, ScheduledSequence]],
        masks: TokenMasks | None,
        unsampled: SampledTokens,
    ) -> SampledTokens:
        rows = [
            SamplingRow(params=item.sampling, seed=item.seed, position=item.end)
            for _, item in sampled
        ]
        raw_logprobs = {
            row: logits[row].log_softmax(-1)
            for row, (_, item) in enumerate(sampled)
            if item.sampling.num_logprobs is not None
        }
        for row, (_, item) in enumerate(sampled):
            adjust(logits[row], item.sampling, item.all_token_ids, item.num_prompt_tokens)
        if masks is not None:
            mask(logits, masks)
        token_ids, unsound = sample(logits, rows)
        for row in unsound:
            self._scrub(sampled[row][1].block_ids)
        logprobs = {
            sampled[row][0]: _token_logprobs(found, token_ids[row], sampled[row][1].sampling)
            for row, found in raw_logprobs.items()
            if row not in unsound
        }
        faults = {sampled[row][0]: NOT_FINITE for row in unsound}
        return SampledTokens(
            token_ids=token_ids,
            faults=unsampled.faults | faults,
            logprobs=logprobs,
            prompt_logprobs=unsampled.prompt_logprobs,
        )

    @torch.inference_mode()
    def all_logits(self, batch: ScheduledBatch) -> Tensor:
        """Run a batch; return the logits of every token, fp32 [num_tokens, vocab_size]."""
        assert self._model is not None, "weights are loaded"
        return self._model.logits(self._forward(batch.sequences))

    def _forward(self, items: Sequence[ScheduledSequence]) -> Tensor:
        assert self._model is not None, "weights are loaded"
        plan = AttentionPlan.build(
            [
                AttentionSpan(
                    start=item.start, num_tokens=item.num_tokens, block_ids=item.block_ids
                )
                for item in items
            ],
            self._config.block_size,
            self._dtype,
        )
        token_ids = torch.tensor([token_id for item in items for token_id in item.token_ids])
        return self._model.forward(token_ids, self._kv_cache, plan)

    def _faults_of_chunks(
        self, items: Sequence[ScheduledSequence], hidden: Tensor
    ) -> dict[int, str]:
        """Return what is wrong with sequences in the midst of their prompts, by their index.

        What is no number in one token is in all after it, so the last one tells of all.
        """
        ends = accumulate(item.num_tokens for item in items)
        found = {}
        for index, (item, end) in enumerate(zip(items, ends, strict=True)):
            if not item.is_sampled and not bool(hidden[end - 1].isfinite().all()):
                self._scrub(item.block_ids)
                found[index] = NOT_FINITE
        return found

    def _scrub(self, block_ids: Sequence[int]) -> None:
        """Make blocks finite again: masked, they would still turn their next owner's into NaN."""
        indices = torch.tensor(block_ids)
        self._kv_cache[:, indices] = self._kv_cache[:, indices].nan_to_num_(0.0, 0.0, 0.0)

    def _discard(self, weight: Tensor, embedding: Tensor) -> None:
        if weight.data_ptr() != embedding.data_ptr():  # a tied head's weight is still looked up
            self._weights.discard(weight)

    def _bytes_per_token(self) -> int:
        return self._model_config.kv_elements_per_token * self._dtype.itemsize

    def _kv_sizes(self) -> KvSizes:
        shape = self._model_config
        head_bytes = shape.vocab_size * shape.hidden_size * self._weights.dtype.itemsize
        packed_head_bytes = head_bytes * (self._is_packed and shape.tie_word_embeddings)
        widest = max(
            2 * shape.intermediate_size, shape.hidden_size, shape.num_heads * shape.head_dim
        )
        step_elements = self.max_step_tokens * (
            ACTIVATION_COPIES * widest + shape.max_position_embeddings
        )
        logit_elements = 4 * self._config.max_num_seqs * shape.vocab_size
        return KvSizes(
            bytes_per_token=self._bytes_per_token(),
            weights_bytes=self._weights.total_bytes + packed_head_bytes,
            activation_bytes=4 * (step_elements + logit_elements),
            machine_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            model_max_len=shape.max_position_embeddings,
        )


class _PendingChoice:
    """Logits that wait for their masks; implements `runtime.engine.batch.PendingTokens`."""

    def __init__(self, choose: Callable[[TokenMasks | None], SampledTokens]) -> None:
        self._choose = choose
        self._chosen: SampledTokens | None = None

    def choose(self, masks: TokenMasks | None) -> None:
        self._chosen = self._choose(masks)

    def wait(self) -> SampledTokens:
        assert self._chosen is not None, "tokens are chosen before they are waited for"
        return self._chosen


def _sampled_rows(
    items: Sequence[ScheduledSequence],
) -> tuple[list[int], list[tuple[int, ScheduledSequence]]]:
    """Return the batch rows to sample from, and whose they are, with their index in the batch."""
    rows: list[int] = []
    sampled: list[tuple[int, ScheduledSequence]] = []
    end = 0
    for index, item in enumerate(items):
        end += item.num_tokens
        if item.is_sampled:
            rows.append(end - 1)
            sampled.append((index, item))
    return rows, sampled


def _token_logprobs(logprobs: Tensor, token_id: int, sampling: SamplingParams) -> TokenLogprobs:
    """Return what to report of a token, given all log-probabilities, fp32 [vocab_size]."""
    top = logprobs.topk(sampling.num_logprobs or 0)
    return TokenLogprobs(float(logprobs[token_id]), top.indices.tolist(), top.values.tolist())
