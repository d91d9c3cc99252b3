"""What scheduler and runner pass each other: a batch to run, and what it yields. No torch."""

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from runtime.engine.sequence import (
    Constraint,
    PromptLogprobs,
    SamplingParams,
    SequenceKey,
    TokenLogprobs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSequence:
    """What one step does for one sequence.

    Attributes:
        number: The sequence's; stable as long as it lives.
        start: Position of the first token to run; all before it are in the KV cache.
        token_ids: Tokens to run, from `start` on.
        num_pending_tokens: Tokens to run after those, which the steps in flight still sample.
        block_ids: Block table, long enough for all tokens to run.
        is_sampled: Whether the step yields the next token; False in the midst of a prompt.
        num_preemptions: The sequence's when this was scheduled.
        all_token_ids: The sequence's own list of all tokens, prompt and output; it grows.
        num_prompt_tokens: How many of those are the prompt.
        constraint: What restricts the token to sample; it follows the committed tokens.
    """

    key: SequenceKey
    number: int
    start: int
    token_ids: tuple[int, ...]
    num_pending_tokens: int
    all_token_ids: SequenceOf[int] = ()
    num_prompt_tokens: int = 0
    block_ids: tuple[int, ...]
    is_sampled: bool
    sampling: SamplingParams
    seed: int
    num_preemptions: int
    constraint: Constraint | None = None

    @property
    def is_constrained(self) -> bool:
        """Whether the token to sample depends on all tokens before it, by more than the model."""
        return self.is_sampled and self.constraint is not None

    @property
    def reported_prompt(self) -> SequenceOf[int]:
        """The prompt's tokens to report log-probabilities of; run token i predicts the ith."""
        if self.sampling.num_prompt_logprobs is None:
            return ()
        return self.all_token_ids[self.start + 1 : min(self.end + 1, self.num_prompt_tokens)]

    @property
    def num_tokens(self) -> int:
        """Tokens to run."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def end(self) -> int:
        """Position after the last token to run: that of the token to sample."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledBatch:
    """One step: decodes first, then pieces of prompts, each group by arrival.

    Attributes:
        retired: Numbers of sequences that have lost their blocks since the batch before; one that
            was preempted may come back.
    """

    sequences: tuple[ScheduledSequence, ...]
    retired: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens to run."""
        return sum(item.num_tokens for item in self.sequences)

    @property
    def is_constrained(self) -> bool:
        """Whether tokens can be chosen only once all earlier batches are committed."""
        return any(item.is_constrained for item in self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMasks:
    """Which tokens may be chosen, for some of the sequences with `is_sampled`.

    Attributes:
        rows: Their indices among those, ascending.
        bits: int32 [len(rows), num_words] as bytes, num_words = ceil(vocab_size / 32); bit
            t % 32 of word t // 32 says whether token t may be chosen. One of them always may.
    """

    rows: tuple[int, ...]
    bits: memoryview

    def part(self, first: int, end: int) -> "TokenMasks | None":
        """Return the masks of a batch of those from `first` to before `end`; None if it has none."""
        begin, stop = bisect_left(self.rows, first), bisect_left(self.rows, end)
        if begin == stop:
            return None
        size = len(self.bits) // len(self.rows)
        return TokenMasks(
            rows=tuple(row - first for row in self.rows[begin:stop]),
            bits=self.bits[begin * size : stop * size],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """What a batch yields, for its sequences with `is_sampled`, in batch order.

    Attributes:
        token_ids: The sampled tokens; meaningless where the sequence is faulty.
        faults: What is wrong with a sequence, by its index in the batch.
        logprobs: Of the sequences that ask for it, by their index in the batch.
        prompt_logprobs: Of their `reported_prompt`, by their index in the batch.
    """

    token_ids: SequenceOf[int]
    faults: dict[int, str]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)

    def choose(self, masks: TokenMasks | None) -> None:
        """Do nothing: the tokens are chosen, and nothing restricted them."""
        assert masks is None, "a batch that is constrained waits for its masks"

    def wait(self) -> "SampledTokens":
        """Return itself: a runner that has finished already is not waited for."""
        return self


class PendingTokens(Protocol):
    """What a launched batch will yield."""

    def choose(self, masks: TokenMasks | None) -> None:
        """Have tokens chosen, those with a mask among what it allows.

        Called once, when all earlier batches are committed and none is launched after this one.
        A batch that is not constrained need not wait for it.
        """

    def wait(self) -> SampledTokens:
        """Return it when the device is done with the batch."""
