"""What scheduler and runner pass each other: a batch to run, and what it yields. No torch."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from runtime.engine.sequence import SamplingParams, SequenceKey, TokenLogprobs


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """What a batch yields, for its sequences with `is_sampled`, in batch order.

    Attributes:
        token_ids: The sampled tokens; meaningless where the sequence is faulty.
        faults: What is wrong with a sequence, by its index in the batch.
        logprobs: Of the sequences that ask for it, by their index in the batch.
    """

    token_ids: SequenceOf[int]
    faults: dict[int, str]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)

    def wait(self) -> "SampledTokens":
        """Return itself: a runner that has finished already is not waited for."""
        return self


class PendingTokens(Protocol):
    """What a launched batch will yield."""

    def wait(self) -> SampledTokens:
        """Return it when the device is done with the batch."""
