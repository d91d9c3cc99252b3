"""A runner without tensors whose answers depend on every token it can reach through its blocks.

Its KV cache holds a checksum of each token and all before it, read through the block table, as
real keys and values depend on the whole prefix. The next token is a checksum of all of them.
Wrong sharing, early reuse or lost recomputation change the answer. Where it is constrained, it is
the next token that may be chosen.
"""

import zlib
from collections.abc import Callable, Sequence

from runtime.engine.batch import SampledTokens, ScheduledBatch, ScheduledSequence, TokenMasks


def checksum(values: Sequence[int]) -> int:
    return zlib.crc32(str(list(values)).encode())


def answer(prompt: Sequence[int], num_tokens: int, vocab_size: int) -> list[int]:
    """Return what a sequence alone would be answered: the naive reference."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        states: list[int] = []
        for token_id in token_ids:
            states.append(checksum([*states, token_id]))
        token_ids.append(checksum(states) % vocab_size)
    return token_ids[len(prompt) :]


class PendingChoice:
    """A batch whose tokens wait for their masks."""

    def __init__(self, choose: Callable[[TokenMasks | None], SampledTokens]) -> None:
        self._choose = choose
        self._chosen: SampledTokens | None = None

    def choose(self, masks: TokenMasks | None) -> None:
        assert self._chosen is None, "chosen once"
        self._chosen = self._choose(masks)

    def wait(self) -> SampledTokens:
        assert self._chosen is not None, "chosen before"
        return self._chosen


class TokenRunner:
    def __init__(
        self,
        *,
        num_kv_blocks: int = 16,
        block_size: int = 4,
        max_model_len: int = 32,
        vocab_size: int = 50,
        max_step_tokens: int = 1 << 20,
        max_in_flight: int = 1,
    ) -> None:
        self.num_kv_blocks = num_kv_blocks
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.max_step_tokens = max_step_tokens
        self.max_in_flight = max_in_flight
        self.num_late_compilations = 0
        self.batches: list[ScheduledBatch] = []
        self.is_lost = False
        self.fail: Callable[[ScheduledBatch], str | None] = lambda batch: None
        self.fail_late: Callable[[ScheduledBatch], str | None] = lambda batch: None
        self._block_size = block_size
        self._states = [0] * (num_kv_blocks * block_size)
        self._last_tokens: dict[int, int] = {}

    def max_prefill_tokens(self, num_decodes: int) -> int:
        return self.max_step_tokens

    def check_device(self) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def use_idle_time(self) -> bool:
        return False

    def launch(self, batch: ScheduledBatch) -> "SampledTokens | PendingChoice":
        self.batches.append(batch)
        error = self.fail(batch)
        if error is not None:
            raise RuntimeError(error)
        token_ids = [self._run(item) for item in batch.sequences]
        sampled = [
            (item, token_id)
            for item, token_id in zip(batch.sequences, token_ids, strict=True)
            if item.is_sampled
        ]
        if batch.is_constrained:
            return PendingChoice(lambda masks: self._choose(sampled, masks))
        chosen = self._choose(sampled, None)
        error = self.fail_late(batch)  # when the tokens before are overwritten
        if error is not None:
            raise RuntimeError(error)
        return chosen

    def _choose(
        self, sampled: list[tuple[ScheduledSequence, int]], masks: TokenMasks | None
    ) -> SampledTokens:
        token_ids = []
        for row, (item, token_id) in enumerate(sampled):
            mask = None if masks is None else masks.part(row, row + 1)
            if mask is not None:
                bits = int.from_bytes(mask.bits, "little")
                token_id = next(
                    (token_id + step) % self.vocab_size
                    for step in range(self.vocab_size)
                    if bits >> (token_id + step) % self.vocab_size & 1
                )
            self._last_tokens[item.number] = token_id
            token_ids.append(token_id)
        return SampledTokens(token_ids=token_ids, faults={})

    def _run(self, item: ScheduledSequence) -> int:
        assert item.num_tokens > 0, "nothing to sample from"
        token_ids = [*item.token_ids]
        if item.num_pending_tokens > 0:
            token_ids.append(self._last_tokens[item.number])
        states = [self._states[self._slot(item, position)] for position in range(item.start)]
        for position, token_id in enumerate(token_ids, start=item.start):
            states.append(checksum([*states, token_id]))
            self._states[self._slot(item, position)] = states[-1]
        return checksum(states) % self.vocab_size

    def _slot(self, item: ScheduledSequence, position: int) -> int:
        block_id = item.block_ids[position // self._block_size]
        return block_id * self._block_size + position % self._block_size
