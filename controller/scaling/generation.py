"""What the gateway asks of a function, and what it gets back.

Token ids only: text belongs to the gateway, replicas to the rest of this package.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from controller.scaling.activation import PhaseTiming
from controller.scaling.embedding import Embedding, EmbeddingRequest, Pooling
from functions.spec import FunctionSpec
from runtime.rpc import inference_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate.

    Attributes:
        request_id: Correlates logs, headers and the usage record.
        prompt_token_ids: The prompt; at least one id, all inside the vocabulary.
        sampling: Complete sampling parameters, max_tokens included.
        num_bytes: Share of the request body, counted against the queue's byte bound.
        key_id: The API key that pays, if keys are in use.
        received_at: Monotonic second the call arrived; None if nobody knows.
        may_wake: Whether a replica is brought up for it; else it is refused unless one has room.
        priority: Inside a replica, lower ones start first.
        cache_salt: Cached prefixes are shared with the same salt only.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: pb.SamplingParams
    num_bytes: int
    key_id: str | None = None
    received_at: float | None = None
    may_wake: bool = True
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionLoad:
    """What a function has to do now.

    Attributes:
        num_ready: Replicas that can serve.
        in_flight: Requests on replicas.
        num_queued: Requests that wait for one.
        wake_s: What it is expected to take to bring one up; 0 while one is ready.
    """

    num_ready: int
    in_flight: int
    num_queued: int
    wake_s: float


@dataclass(slots=True, kw_only=True)
class GenerationRecord:
    """What became of one request; filled in as it happens.

    Durations are seconds since admission except `queue_s`, all waits for a lease together.
    `outcome` is a finish reason, an error code, or "disconnected". `timeline` has the phases of a
    cold start that the request waited for, from the call's arrival to the first token. Prompt
    tokens are what was asked, output tokens what was computed, read or not.
    """

    request_id: str
    function: str
    tier: str
    key_id: str | None = None
    replica_id: str | None = None
    queue_s: float | None = None
    first_token_s: float | None = None
    duration_s: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    outcome: str = "disconnected"
    timeline: Sequence[PhaseTiming] = ()


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """New tokens of a sequence; the last chunk carries the finish reason and may be empty.

    Attributes:
        logprobs: One for each token, if the request asked for them.
        prompt_logprobs: In the first chunk, if the request asked for them: parts of the prompt,
            which may overlap.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[pb.TokenLogprobs] = field(default=(), kw_only=True)
    prompt_logprobs: Sequence[pb.PromptLogprobs] = field(default=(), kw_only=True)
    finish_reason: str | None = field(default=None, kw_only=True)  # "stop" | "length"


class Generation(Protocol):
    """One admitted request: enter to admit, iterate for tokens, exit to release.

    Entering admits at once or raises QueueFull, ActivationFailed, ModelNotFound or ShuttingDown.
    Iterating waits for a replica, then yields chunks as steps arrive; it raises any of these, or
    ActivationTimeout, RuntimeDied or FirstTokenTimeout. Exiting cancels what still runs, gives the
    lease back and writes the usage record, also when the task is being cancelled.
    """

    record: GenerationRecord

    def eta_s(self) -> float | None:
        """Return the expected seconds to the first token while cold; None when not known."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[TokenChunk]: ...


class ServedFunction(Protocol):
    """A deployed function whose snapshot is built."""

    @property
    def name(self) -> str:
        """The function's name; clients call it by its served names."""

    @property
    def spec(self) -> FunctionSpec:
        """The current revision."""

    @property
    def served_names(self) -> tuple[str, ...]:
        """Every model name that reaches this function."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output, in tokens."""

    @property
    def snapshot_path(self) -> Path:
        """Directory with tokenizer.json, chat_template.jinja and generation_config.json."""

    @property
    def created(self) -> int:
        """Unix seconds of the first deployment."""

    @property
    def tier(self) -> str:
        """The warmest tier any replica is in: ready, parked, standby or stopped."""

    @property
    def load(self) -> FunctionLoad:
        """What it has to do now."""

    @property
    def pooling(self) -> Pooling | None:
        """How it embeds; None for one that generates."""

    def generate(self, request: GenerationRequest) -> Generation:
        """Prepare one generation; nothing happens until it is entered."""

    def embed(self, request: EmbeddingRequest) -> Embedding:
        """Prepare one call to embed; nothing happens until it is entered."""


class FunctionRegistry(Protocol):
    """The deployed functions by the names they serve."""

    def resolve(self, model: str) -> ServedFunction:
        """Return the function that serves this model name.

        Raises:
            ModelNotFound: None does; the message lists near names.
            ActivationFailed: Its snapshot is still being built, or could not be.
        """

    def served(self) -> Sequence[ServedFunction]:
        """Return every function that can take requests, by name."""
