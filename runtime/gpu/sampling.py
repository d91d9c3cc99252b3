"""From logits to tokens on the GPU: fills the sampling table, launches, reads the result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from runtime.engine.batch import SampledTokens, ScheduledSequence, TokenMasks
from runtime.gpu.device import Device, Mark
from runtime.gpu.limits import BatchLimits
from runtime.gpu.logprobs import ChosenLogprobs, LogprobBuffers, PendingLogprobs
from runtime.gpu.memory import WorkMemory
from runtime.gpu.prompt_logprobs import PendingPromptLogprobs
from runtime.gpu.rows import Rows
from runtime.gpu.staging import NUM_BUFFERS
from runtime.kernels.sampling import (
    FAULT,
    PROMPT_BIT,
    SamplingTable,
    adjust_logits,
    mask_logits,
    sample,
)

GREEDY_BELOW = 1e-5  # colder than this, differences of logits overflow
NOT_FINITE = "the model computed logits that are not finite"


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingSample:
    """Tokens on their way to the host.

    Attributes:
        token_ids: int32 [num_sampled], pinned; valid after `mark`.
        batch_indices: Which of the batch's sequences each token is of.
        logprobs: What the sequences that ask for it will get, in parts.
        prompt_logprobs: What those that ask for it will get of their prompts.
    """

    token_ids: Tensor
    batch_indices: Sequence[int]
    logprobs: Sequence[PendingLogprobs]
    mark: Mark
    prompt_logprobs: PendingPromptLogprobs | None = None

    def choose(self, masks: TokenMasks | None) -> None:
        """Do nothing: choosing is launched, and nothing restricts it."""
        assert masks is None, "a batch that is constrained waits for its masks"

    def wait(self) -> SampledTokens:
        """Return the tokens when the device has chosen them."""
        self.mark.wait()
        token_ids = self.token_ids.tolist()
        faults = {
            batch_index: NOT_FINITE
            for batch_index, token_id in zip(self.batch_indices, token_ids, strict=True)
            if token_id == FAULT
        }
        logprobs = {
            self.batch_indices[row]: found
            for part in self.logprobs
            for row, found in part.read().items()
            if self.batch_indices[row] not in faults
        }
        return SampledTokens(
            token_ids=token_ids,
            faults=faults,
            logprobs=logprobs,
            prompt_logprobs={} if self.prompt_logprobs is None else self.prompt_logprobs.read(),
        )


class PendingChoice:
    """Logits of a constrained batch, which wait for their masks.

    Args:
        launch: Launches the choice of tokens.
    """

    def __init__(self, launch: Callable[[TokenMasks | None], PendingSample]) -> None:
        self._launch = launch
        self._chosen: PendingSample | None = None

    def choose(self, masks: TokenMasks | None) -> None:
        """Launch the choice; no other batch may have been launched since."""
        self._chosen = self._launch(masks)

    def wait(self) -> SampledTokens:
        """Return the tokens when the device has chosen them."""
        assert self._chosen is not None, "tokens are chosen before they are waited for"
        return self._chosen.wait()


class GpuSampler:
    """Chooses tokens for whole batches.

    Args:
        limits: Of the batches.
        vocab_size: Token ids are below this.
        device: Where.
        work: Holds the counts of tokens, by far the largest part.
        logprobs: Where log-probabilities are computed.

    Attributes:
        last_tokens: int32 [num_rows], the token sampled last for each row.
    """

    def __init__(
        self,
        limits: BatchLimits,
        vocab_size: int,
        device: Device,
        work: WorkMemory,
        logprobs: LogprobBuffers,
    ) -> None:
        self._device = device
        self._logprobs = logprobs
        self._vocab_size = vocab_size
        self._table = SamplingTable.allocate(
            limits.num_rows,
            vocab_size,
            device.name,
            counts=work.zeros(limits.num_rows, vocab_size, dtype=torch.int32),
        )
        self._token_ids = torch.zeros(limits.num_seqs, dtype=torch.int32, device=device.name)
        self._on_host = cycle(
            [device.pinned(limits.num_seqs, dtype=torch.int32) for _ in range(NUM_BUFFERS)]
        )
        self.last_tokens = torch.zeros(limits.num_rows, dtype=torch.int32, device=device.name)
        self._mask_rows = torch.zeros(limits.num_seqs, dtype=torch.int32, device=device.name)
        num_words = -(-vocab_size // 32)
        self._mask_bits = torch.zeros(
            limits.num_seqs, num_words, dtype=torch.int32, device=device.name
        )

    def launch(
        self,
        logits: Tensor,
        items: Sequence[ScheduledSequence],
        batch_indices: Sequence[int],
        *,
        rows: Rows,
        sampled: Tensor,
        batch_rows: Tensor,
        seq_lens: Tensor,
        masks: TokenMasks | None = None,
        prompt_logprobs: PendingPromptLogprobs | None = None,
    ) -> PendingSample:
        """Choose a token from each row of logits and start copying them to the host.

        Even with nothing to sample, the result is to be waited for: it ends with its batch.

        Args:
            logits: fp32 [num_sampled, vocab_size or more]; changed in place.
            items: The sequence of each row of logits.
            batch_indices: Theirs in the batch, on the host.
            rows: Their places in the tables.
            sampled: The same indices, int32 [num_sampled] on the device.
            batch_rows: int32 [num_seqs], each sequence's row, on the device.
            seq_lens: int32 [num_seqs], position of the token to choose.
            masks: What some of the tokens must be among.
            prompt_logprobs: What else is to be read when the batch is done.
        """
        if not items:
            return PendingSample(
                token_ids=torch.empty(0, dtype=torch.int32),
                batch_indices=(),
                logprobs=(),
                prompt_logprobs=prompt_logprobs,
                mark=self._device.mark(),
            )
        self._fill_table(items, rows)
        token_ids = self._token_ids[: len(items)]
        logprobs = []
        for part in self._parts(items):
            chosen_logprobs = self._chosen_logprobs(logits[part], items[part])
            if any(item.sampling.has_penalties or item.sampling.logit_bias for item in items[part]):
                adjust_logits(logits[part], sampled[part], batch_rows, self._table)
            part_masks = None if masks is None else masks.part(part.start, part.stop)
            if part_masks is not None:
                self._mask(logits[part], part_masks)
            sample(
                logits[part],
                sampled[part],
                batch_rows,
                seq_lens,
                self._table,
                token_ids=token_ids[part],
                last_tokens=self.last_tokens,
            )
            if chosen_logprobs is not None:
                logprobs.append(chosen_logprobs.finish(token_ids[part], part.start))
        on_host = next(self._on_host)[: len(items)]
        on_host.copy_(token_ids, non_blocking=True)
        return PendingSample(
            token_ids=on_host,
            batch_indices=batch_indices,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            mark=self._device.mark(),
        )

    def _parts(self, items: Sequence[ScheduledSequence]) -> Iterator[slice]:
        """Cut a batch so that there is room for each part's log-probabilities; seldom in two."""
        num_asking = sum(item.sampling.num_logprobs is not None for item in items)
        room = self._logprobs.max_rows
        size = len(items) if num_asking <= room else room
        for first in range(0, len(items), size):
            yield slice(first, min(first + size, len(items)))

    def _fill_table(self, items: Sequence[ScheduledSequence], rows: Rows) -> None:
        new = [(rows.of(item), item) for item in items if not rows.of(item).has_sampling]
        if not new:
            return
        floats, ints, seeds = [], [], []
        for row, item in new:
            params = item.sampling
            is_greedy = params.temperature < GREEDY_BELOW
            floats.append(
                (
                    0.0 if is_greedy else params.temperature,
                    params.top_p,
                    params.min_p,
                    params.repetition_penalty,
                    params.frequency_penalty,
                    params.presence_penalty,
                )
            )
            ints.append((params.top_k, int(params.has_penalties), len(params.logit_bias)))
            seeds.append(item.seed - (1 << 64) if item.seed >= 1 << 63 else item.seed)
            if params.has_penalties:
                self._count(row.index, item)
            if params.logit_bias:
                self._set_bias(row.index, params.logit_bias)
            row.has_sampling = True
        table = self._table
        index = self._device.upload([row.index for row, _ in new], torch.int64)
        float_columns = self._device.upload(floats, torch.float32).unbind(1)
        int_columns = self._device.upload(ints, torch.int32).unbind(1)
        for column, values in (
            (table.temperatures, float_columns[0]),
            (table.top_ps, float_columns[1]),
            (table.min_ps, float_columns[2]),
            (table.repetition_penalties, float_columns[3]),
            (table.frequency_penalties, float_columns[4]),
            (table.presence_penalties, float_columns[5]),
            (table.top_ks, int_columns[0]),
            (table.is_counted, int_columns[1]),
            (table.num_biases, int_columns[2]),
            (table.seeds, self._device.upload(seeds, torch.int64)),
        ):
            column.index_copy_(0, index, values)

    def _count(self, row: int, item: ScheduledSequence) -> None:
        """Count the tokens a sequence has, all of them sampled before it got its row."""
        tokens = self._device.upload(list(item.all_token_ids), torch.int64)
        counts = self._table.counts[row]
        counts.zero_()
        outputs = tokens[item.num_prompt_tokens :]
        counts.index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))
        is_prompt = torch.zeros_like(counts)
        is_prompt[tokens[: item.num_prompt_tokens]] = PROMPT_BIT
        counts.add_(is_prompt)

    def _mask(self, logits: Tensor, masks: TokenMasks) -> None:
        num_masked = len(masks.rows)
        rows, bits = self._mask_rows[:num_masked], self._mask_bits[:num_masked]
        rows.copy_(self._device.upload(masks.rows, torch.int32), non_blocking=True)
        on_host = self._device.pinned(*bits.shape, dtype=torch.int32)
        on_host.copy_(torch.frombuffer(masks.bits, dtype=torch.int32).view(bits.shape))
        bits.copy_(on_host, non_blocking=True)
        mask_logits(logits, rows, bits)

    def _set_bias(self, row: int, logit_bias: Mapping[int, float]) -> None:
        size = len(logit_bias)
        ids = self._device.upload(list(logit_bias), torch.int32)
        self._table.bias_token_ids[row, :size].copy_(ids)
        biases = self._device.upload(list(logit_bias.values()), torch.float32)
        self._table.biases[row, :size].copy_(biases)

    def _chosen_logprobs(
        self, logits: Tensor, items: Sequence[ScheduledSequence]
    ) -> ChosenLogprobs | None:
        counts = {
            row: item.sampling.num_logprobs
            for row, item in enumerate(items)
            if item.sampling.num_logprobs is not None
        }
        if not counts:
            return None
        return ChosenLogprobs(logits[:, : self._vocab_size], counts, self._logprobs, self._device)
