"""A runner without tensors whose answers depend on every token it can reach through its blocks.

Its KV cache holds token ids, and the next token is a checksum of all tokens of a sequence, read
through the block table. Wrong sharing, early reuse or lost recomputation change the answer.
"""

import zlib
from collections.abc import Callable, Sequence

from runtime.engine.engine import SampledTokens
from runtime.engine.scheduler import ScheduledBatch, ScheduledSequence

NOTHING = -1


def next_token(token_ids: Sequence[int], vocab_size: int) -> int:
    """Return what the runner samples after these tokens."""
    return zlib.crc32(str(list(token_ids)).encode()) % vocab_size


def answer(prompt: Sequence[int], num_tokens: int, vocab_size: int) -> list[int]:
    """Return what a sequence alone would be answered: the naive reference."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids, vocab_size))
    return token_ids[len(prompt) :]


class TokenRunner:
    def __init__(
        self,
        *,
        num_kv_blocks: int = 16,
        block_size: int = 4,
        max_model_len: int = 32,
        vocab_size: int = 50,
        max_step_tokens: int = 1 << 20,
    ) -> None:
        self.num_kv_blocks = num_kv_blocks
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.max_step_tokens = max_step_tokens
        self.batches: list[ScheduledBatch] = []
        self.fail: Callable[[ScheduledBatch], str | None] = lambda batch: None
        self._block_size = block_size
        self._slots = [NOTHING] * (num_kv_blocks * block_size)
        self._last_tokens: dict[int, int] = {}

    def execute(self, batch: ScheduledBatch) -> SampledTokens:
        self.batches.append(batch)
        error = self.fail(batch)
        if error is not None:
            raise RuntimeError(error)
        token_ids = [self._run(item) for item in batch.sequences]
        sampled = [
            token_id
            for item, token_id in zip(batch.sequences, token_ids, strict=True)
            if item.is_sampled
        ]
        return SampledTokens(token_ids=sampled, faults={})

    def _run(self, item: ScheduledSequence) -> int:
        known = [*item.token_ids, *[self._last_tokens.get(item.number)] * item.num_pending_tokens]
        for position, token_id in enumerate(known, start=item.start):
            assert token_id is not None, "a pending token was sampled before"
            self._slots[self._slot(item, position)] = token_id
        reachable = [self._slots[self._slot(item, position)] for position in range(item.end)]
        assert NOTHING not in reachable, "attended to a token that was never computed"
        token_id = next_token(reachable, self.vocab_size)
        if item.is_sampled:
            self._last_tokens[item.number] = token_id
        return token_id

    def _slot(self, item: ScheduledSequence, position: int) -> int:
        block_id = item.block_ids[position // self._block_size]
        return block_id * self._block_size + position % self._block_size
