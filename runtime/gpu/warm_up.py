"""Batches that use every kernel once, with sequences that are nobody's."""

from collections.abc import Iterator
from itertools import count

from runtime.engine.batch import ScheduledBatch, ScheduledSequence, TokenMasks
from runtime.engine.sequence import SamplingParams, SequenceKey
from runtime.gpu.limits import BatchLimits

EVERYTHING = SamplingParams(
    temperature=1.0,
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    repetition_penalty=1.1,
    logit_bias={0: 1.0},
    num_logprobs=1,
)
USUAL = SamplingParams(temperature=1.0)
GREEDY = SamplingParams(temperature=0.0)
PROMPTS = (500, 50)  # tokens of usual ones, for which products take different kernels


class Anything:
    """A constraint that restricts nothing."""

    def accept(self, token_id: int) -> bool:
        """Return that any other token could follow."""
        return False


def warm_up_batches(
    limits: BatchLimits, block_size: int, max_model_len: int
) -> Iterator[ScheduledBatch]:
    """Yield chunks of prompts, alone and beside a decode, then decodes of every power of two.

    The more requests need what a batch uses, the sooner it comes: not all may be run.
    All sequences share the first blocks: their content is as meaningless as their tokens.
    """
    numbers = count(-1, -1)
    num_tokens, few_tokens = (
        min(size, limits.num_tokens // 2, max_model_len - 1) for size in PROMPTS
    )
    yield _batch(numbers, [num_tokens], block_size, USUAL)
    yield _batch(numbers, [few_tokens], block_size, GREEDY)
    yield _batch(numbers, [1], block_size, GREEDY)
    yield _batch(numbers, [num_tokens], block_size, EVERYTHING)
    yield _batch(numbers, [1, num_tokens], block_size, GREEDY)
    size = 2
    while size < 2 * limits.num_seqs:
        yield _batch(numbers, [1] * min(size, limits.num_seqs), block_size, GREEDY)
        size *= 2


def warm_up_masks(batch: ScheduledBatch, vocab_size: int) -> TokenMasks | None:
    """Return masks that allow everything, for sequences that are constrained."""
    sampled = [item for item in batch.sequences if item.is_sampled]
    rows = tuple(row for row, item in enumerate(sampled) if item.is_constrained)
    if not rows:
        return None
    num_bytes = -(-vocab_size // 32) * 4
    return TokenMasks(rows=rows, bits=memoryview(bytearray(b"\xff" * num_bytes * len(rows))))


def _batch(
    numbers: Iterator[int], sizes: list[int], block_size: int, sampling: SamplingParams
) -> ScheduledBatch:
    return ScheduledBatch(
        sequences=tuple(_sequence(next(numbers), size, block_size, sampling) for size in sizes)
    )


def _sequence(
    number: int, num_tokens: int, block_size: int, sampling: SamplingParams
) -> ScheduledSequence:
    token_ids = (0,) * num_tokens
    return ScheduledSequence(
        key=SequenceKey(-1, -number),
        number=number,
        start=0,
        token_ids=token_ids,
        num_pending_tokens=0,
        all_token_ids=token_ids,
        num_prompt_tokens=num_tokens,
        block_ids=tuple(range(-(-num_tokens // block_size))),
        is_sampled=True,
        sampling=sampling,
        seed=0,
        num_preemptions=0,
        constraint=Anything() if sampling is EVERYTHING else None,
    )
