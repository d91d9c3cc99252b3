"""A request inside the engine: what was asked, how far it is, how it ended. No torch.

A sequence is its tokens and three counts:

    0 <= num_computed_tokens <= num_tokens = len(token_ids) + num_pending_tokens

Computed tokens have their keys and values in the KV cache, or will have after the steps that
are scheduled. Pending tokens are sampled by a step that is scheduled but not committed: their
number is known, their ids are not. There are no prefill and decode phases, only computed tokens
catching up with tokens.
"""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from runtime.engine.pooling import Pooled


class SequenceKey(NamedTuple):
    """Names a sequence: the stream it came on, and the client's number within that stream."""

    stream_id: int
    sequence_id: int


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    Attributes:
        temperature: 0 is greedy; the filters below then have no effect.
        top_p: Keep the smallest set of tokens with at least this mass; 1 is off.
        top_k: Keep this many most likely tokens; 0 is off.
        min_p: Keep tokens at least this likely relative to the likeliest; 0 is off.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that are in
            the prompt or the output; 1 is off.
        frequency_penalty: Taken from a token's logit for each time it is in the output.
        presence_penalty: Taken once from the logit of every token that is in the output.
        logit_bias: Added to the logits of these tokens, before the penalties.
        num_logprobs: Report the log-probability of each token, and of this many of the likeliest
            ones, before bias, penalties and temperature; None reports none.
        num_prompt_logprobs: The same of the prompt's tokens, each after those before it; the
            prompt is then computed as a whole, whatever the prefix cache holds.
        seed: None for a random one, chosen when the sequence is submitted.
        max_tokens: Most tokens to generate.
        stop_token_ids: Tokens that end the sequence, beside the model's own.
        ignore_eos: Whether the model's own end-of-sequence tokens are ordinary ones.
        min_tokens: Before this many, no token that would end the sequence is chosen.
        allowed_token_ids: The only tokens to choose from; empty allows all.
        bad_words: Runs of tokens that are never completed in the output.
        grammar: What the output must match, as `runtime.engine.grammars` reads it; empty for
            anything.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    seed: int | None = None
    max_tokens: int = 16
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    allowed_token_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""

    @property
    def has_penalties(self) -> bool:
        """Whether a token's chance depends on which tokens there are already."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )


class TokenLogprobs(NamedTuple):
    """How likely a token was, and which were likeliest, by the model alone.

    Attributes:
        logprob: Natural logarithm of the chosen token's probability.
        top_token_ids: The likeliest tokens, likeliest first.
        top_logprobs: Theirs.
    """

    logprob: float
    top_token_ids: SequenceOf[int]
    top_logprobs: SequenceOf[float]


class PromptLogprobs(NamedTuple):
    """How likely consecutive tokens of a prompt were, by the model alone.

    Attributes:
        first: Position of the first of them.
        logprobs: Natural logarithms.
        top_token_ids: The likeliest tokens in each place, as many as were asked for, in a row.
        top_logprobs: Theirs.
    """

    first: int
    logprobs: SequenceOf[float]
    top_token_ids: SequenceOf[int]
    top_logprobs: SequenceOf[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """A prompt and what to do with it.

    Attributes:
        priority: Sequences of a lower one start first, and are the last to be preempted.
        cache_salt: Cached prefixes are shared with the same salt only.
    """

    key: SequenceKey
    prompt_token_ids: SequenceOf[int]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSequence:
    """How a sequence ended, and its counts for the usage record.

    Attributes:
        num_cached_tokens: Prompt tokens that the prefix cache saved when the sequence started.
        num_output_tokens: Includes the token that stopped it.
        error: For people; empty unless the reason is ERROR or REFUSED.
    """

    key: SequenceKey
    reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one engine step produced; a stop token is reported like any other.

    Attributes:
        started: Sequences whose first token this is, with the prompt tokens that were cached.
        logprobs: Of the tokens whose sequences asked for it.
        prompt_logprobs: Of the part of a prompt that was computed; tokens may come again.
        pooled: Texts that were embedded, by an engine whose task that is.
    """

    tokens: list[tuple[SequenceKey, int]]
    finished: list[FinishedSequence]
    started: Mapping[SequenceKey, int] = field(default_factory=dict)
    logprobs: Mapping[SequenceKey, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[SequenceKey, PromptLogprobs] = field(default_factory=dict)
    pooled: "SequenceOf[Pooled]" = ()


class Constraint(Protocol):
    """What restricts a sequence's next token; see `runtime.engine.constraints`."""

    def accept(self, token_id: int) -> bool:
        """Take over a token that was chosen; return whether the output is complete with it."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A live sequence; scheduler and block manager own its counts and its block table.

    Attributes:
        number: Unique within an engine, by arrival; a key may come again, a number never.
        max_tokens: Most tokens it may ever have, prompt and output.
        stop_token_ids: All tokens that end it, the model's own included unless ignored.
        token_ids: Prompt, then output.
        constraint: What restricts its output, if anything does.
        priority: Lower ones go first.
        cache_salt: Cached prefixes are shared with the same salt only.
        num_cached_tokens: Tokens the prefix cache saved when it was first admitted.
        block_ids: Block table: block i holds tokens [i * block_size, (i + 1) * block_size).
        num_published_blocks: Leading blocks whose content the prefix cache knows.
        prefix_id: Identity of that content; see `runtime.engine.block_manager`.
        num_preemptions: How often it lost its blocks to an earlier sequence.
    """

    key: SequenceKey
    number: int
    sampling: SamplingParams
    seed: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    token_ids: list[int]
    constraint: Constraint | None = None
    priority: int = 0
    cache_salt: str = ""
    num_prompt_tokens: int = field(init=False)
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_published_blocks: int = 0
    prefix_id: int = 0
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens it has, sampled but uncommitted ones included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """What sequences are ordered by: priority, then arrival."""
        return self.priority, self.number

    @property
    def num_output_tokens(self) -> int:
        """Committed tokens after the prompt."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens the next steps have to run; 1 in steady decode."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_complete(self) -> bool:
        """Whether all tokens it may have are sampled, committed or not."""
        return self.num_tokens >= self.max_tokens

    def append(self, token_id: int) -> FinishReason | None:
        """Add a sampled token; return why the sequence ends with it, or None."""
        self.token_ids.append(token_id)
        is_complete = self.constraint is not None and self.constraint.accept(token_id)
        if is_complete or token_id in self.stop_token_ids:
            return FinishReason.STOP
        if len(self.token_ids) >= self.max_tokens:
            return FinishReason.LENGTH
        return None

    def finished(self, reason: FinishReason, error: str = "") -> FinishedSequence:
        """Return the record of its end."""
        return FinishedSequence(
            key=self.key,
            reason=reason,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            error=error,
        )
