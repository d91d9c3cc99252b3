"""One request on its way through a function: wait for a lease, run, stream, give back."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from controller.clock import Clock
from controller.errors import (
    ActivationTimeout,
    ApiError,
    FirstTokenTimeout,
    InternalError,
    InvalidRequest,
    Overloaded,
    RuntimeDied,
)
from controller.scaling.generation import GenerationRecord, GenerationRequest, TokenChunk
from controller.scaling.lifecycle import Tier
from controller.scaling.link import SequenceStream
from controller.scaling.replica import Replica, Waiter
from functions.spec import FunctionSpec
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRpcError, RuntimeUnavailable, StreamOverrun

FINISH_REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}
MAX_ATTEMPTS = 2
OVERRUN_RETRY_S = 1.0


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket(Waiter):
    """A waiter that can be awaited; `decided` is set with the lease or the failure.

    Attributes:
        may_wake: Whether it may wait for a replica; else it wants one that has room now.
        queued_at: Monotonic second its present or last wait began.
        waited_s: All its waits that are over, together.
    """

    may_wake: bool = True
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    queued_at: float = 0.0
    waited_s: float = 0.0

    def queued(self, now: float) -> None:
        """Begin a wait: the first, or another one after a replica was lost."""
        self.decided.clear()
        self.queued_at = now

    def leased(self, now: float) -> None:
        """End a wait."""
        self.waited_s += now - self.queued_at


class LiveRequest(Protocol):
    """An admitted request, as its function keeps it until it is over."""

    record: GenerationRecord
    received_at: float | None
    admitted_at: float

    @property
    def replica(self) -> Replica | None:
        """The replica it has a lease of; None while it waits for one."""

    @property
    def queued_at(self) -> float:
        """Monotonic second it began to wait for the replica it has."""

    def check_deadlines(self, now: float) -> None:
        """End the request if it has waited too long for something."""


class Host(Protocol):
    """What a generation needs of the function it runs on."""

    clock: Clock

    @property
    def name(self) -> str:
        """The function's name."""

    @property
    def spec(self) -> FunctionSpec:
        """The current revision."""

    @property
    def tier(self) -> Tier:
        """The warmest tier a new request would find."""

    @property
    def obstacle(self) -> str:
        """What others hold that keeps a replica from its place; empty if nothing does."""

    def admit(self, ticket: Ticket) -> None:
        """Lease or queue at once, or raise QueueFull or ActivationFailed."""

    def readmit(self, ticket: Ticket) -> None:
        """Queue again, at the head."""

    def abandon(self, ticket: Ticket) -> None:
        """Leave the queue."""

    def release(self, replica: Replica) -> None:
        """Give a lease back."""

    def attachment(self, replica: Replica) -> SequenceStream:
        """Return a leased replica's stream."""

    def eta_s(self, tier: str, waited_s: float) -> float | None:
        """Return the expected rest of a cold start."""

    def entered(self, generation: LiveRequest) -> None:
        """Note that a request was admitted."""

    def first_token(self, generation: LiveRequest, replica: Replica) -> None:
        """Note a request's first token."""

    def left(self, generation: LiveRequest) -> None:
        """Note that a request is over; its record is complete."""


def expire_in_queue(host: Host, ticket: Ticket, now: float) -> None:
    """End a ticket's wait for a lease if it has lasted too long, all its waits together."""
    limit = host.spec.queue.timeout
    if ticket.replica is None and ticket.waited_s + now - ticket.queued_at > limit:
        host.abandon(ticket)
        why = f": {obstacle}" if (obstacle := host.obstacle) else ""
        ticket.failure = ActivationTimeout(
            f"no replica of {host.name!r} became ready within queue.timeout, {limit:g} s{why}; "
            "retry, or raise the limit",
            retry_after_s=1.0,
        )
        ticket.decided.set()


class TokenBuffer:
    """Where a sequence's tokens wait for their reader; the writer never blocks.

    Holds at most the sequence's max_tokens ids, so it needs no bound of its own.
    """

    __slots__ = (
        "_loop", "_on_end", "_wakeup", "error", "finished", "logprobs", "num_cached_tokens",
        "num_tokens", "prompt_logprobs", "tokens",
    )  # fmt: skip

    def __init__(self, on_end: Callable[[], None]) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[pb.TokenLogprobs] = []
        self.prompt_logprobs: list[pb.PromptLogprobs] = []
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished: pb.Finished | None = None
        self.error: ApiError | RuntimeRpcError | None = None
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()  # costs a system call, so not for every token
        self._wakeup: asyncio.Future[None] | None = None

    def on_started(self, started: pb.Started) -> None:
        """Take what is known with the first token."""
        self.num_cached_tokens = started.num_cached_tokens

    def on_logprobs(self, logprobs: pb.TokenLogprobs) -> None:
        """Take how likely the next token is."""
        self.logprobs.append(logprobs)

    def on_prompt_logprobs(self, logprobs: pb.PromptLogprobs) -> None:
        """Take how likely a part of the prompt is."""
        self.prompt_logprobs.append(logprobs)

    def on_token(self, token_id: int) -> None:
        """Take one token."""
        self.tokens.append(token_id)
        self.num_tokens += 1
        if self._wakeup is not None:
            self._wake()

    def on_finished(self, finished: pb.Finished) -> None:
        """Take the end of the sequence."""
        self.finished = finished
        self._on_end()
        self._wake()

    def on_broken(self, error: RuntimeRpcError) -> None:
        """Take the end of the stream."""
        if self.error is None:
            self.error = error
        self._on_end()
        self._wake()

    def fail(self, error: ApiError) -> None:
        """End the reader's wait; the sequence itself may still run."""
        if self.error is None:
            self.error = error
        self._wake()

    def take(self, finish_reason: str | None) -> TokenChunk:
        """Return what has arrived, and forget it."""
        chunk = TokenChunk(
            self.tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            finish_reason=finish_reason,
        )
        self.tokens, self.logprobs, self.prompt_logprobs = [], [], []
        return chunk

    async def wait(self) -> None:
        """Return once there is something to read."""
        while not self.tokens and self.finished is None and self.error is None:
            self._wakeup = self._loop.create_future()
            await self._wakeup

    def _wake(self) -> None:
        wakeup, self._wakeup = self._wakeup, None
        if wakeup is not None and not wakeup.done():
            wakeup.set_result(None)


class FunctionGeneration:
    """One admitted request; see `controller.scaling.generation.Generation`."""

    def __init__(self, host: Host, request: GenerationRequest) -> None:
        self.record = GenerationRecord(
            request_id=request.request_id,
            function=host.name,
            tier=str(host.tier),
            key_id=request.key_id,
            num_prompt_tokens=len(request.prompt_token_ids),
        )
        self.received_at = request.received_at
        self.admitted_at = 0.0
        self._host = host
        self._request = request
        self._ticket = Ticket(num_bytes=request.num_bytes, may_wake=request.may_wake)
        self._buffer: TokenBuffer | None = None
        self._sequence: tuple[SequenceStream, int] | None = None
        self._num_attempts = 0
        self._is_done = False
        self._progress = (0, 0.0)

    async def __aenter__(self) -> Self:
        self.admitted_at = self._host.clock.monotonic()
        self.record.tier = str(self._host.tier)
        self._ticket.queued(self.admitted_at)
        self._host.admit(self._ticket)
        self._host.entered(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, ApiError):
            self.record.outcome = error.code or error.type
        elif self._buffer is not None and self.record.outcome == "disconnected":
            # Computed for a client that did not stay, or was too slow, to read it.
            self.record.num_output_tokens += len(self._buffer.tokens)
            self.record.num_cached_tokens = self._buffer.num_cached_tokens
        self.record.duration_s = self._elapsed_s()
        self._host.abandon(self._ticket)
        if self._buffer is None:
            self._give_back()
        elif self._sequence is not None and self._buffer.finished is None:
            attachment, sequence_id = self._sequence
            attachment.cancel(sequence_id)
        self._host.left(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenChunk:
        if self._is_done:
            raise StopAsyncIteration
        while True:
            buffer = self._buffer or await self._start()
            await buffer.wait()
            if buffer.tokens or buffer.finished is not None:
                return self._chunk(buffer)
            assert buffer.error is not None
            if not self._may_retry(buffer.error):
                raise self._translate(buffer.error)
            self._buffer = None
            self._ticket.queued(self._host.clock.monotonic())
            self._host.readmit(self._ticket)

    @property
    def replica(self) -> Replica | None:
        """The replica it has a lease of; None while it waits for one."""
        return self._ticket.replica

    @property
    def queued_at(self) -> float:
        """Monotonic second it began to wait for the replica it has."""
        return self._ticket.queued_at

    def eta_s(self) -> float | None:
        """Return the expected seconds to the first token while cold; None when not known."""
        return self._host.eta_s(self.record.tier, self._elapsed_s())

    def check_deadlines(self, now: float) -> None:
        """End the request if it has waited too long for a lease, a first or a next token."""
        timeouts, name = self._host.spec.timeouts, self._host.name
        if self._buffer is None:
            expire_in_queue(self._host, self._ticket, now)
            return
        num_tokens, since = self._progress
        if self._buffer.num_tokens != num_tokens:
            self._progress = (self._buffer.num_tokens, now)
        elif num_tokens == 0 and now - since > timeouts.first_token:
            self._buffer.fail(
                FirstTokenTimeout(
                    f"{name!r} produced no token within timeouts.first_token, "
                    f"{timeouts.first_token:g} s; shorten the prompt, retry, or raise the limit"
                )
            )
        elif num_tokens > 0 and now - since > timeouts.stream_idle:
            self._buffer.fail(
                RuntimeDied(
                    f"{name!r} produced nothing for timeouts.stream_idle, "
                    f"{timeouts.stream_idle:g} s; the answer is incomplete"
                )
            )

    async def _start(self) -> TokenBuffer:
        """Wait for a lease and submit the sequence."""
        if self._ticket.replica is None:
            await self._ticket.decided.wait()
        if self._ticket.failure is not None:
            raise self._ticket.failure
        replica = self._ticket.replica
        assert replica is not None
        now = self._host.clock.monotonic()
        self._ticket.leased(now)
        self.record.queue_s = self._ticket.waited_s
        self.record.replica_id = replica.id
        self._num_attempts += 1
        self._progress = (0, now)
        buffer = TokenBuffer(on_end=lambda: self._host.release(replica))
        self._buffer = buffer
        try:
            attachment = self._host.attachment(replica)
            sequence_id = attachment.submit(
                self._request.prompt_token_ids,
                self._request.sampling,
                buffer,
                priority=self._request.priority,
                cache_salt=self._request.cache_salt,
            )
        except RuntimeRpcError as error:
            buffer.on_broken(error)
        else:
            self._sequence = (attachment, sequence_id)
        return buffer

    def _chunk(self, buffer: TokenBuffer) -> TokenChunk:
        num_tokens = len(buffer.tokens)
        if num_tokens and self.record.first_token_s is None:
            self.record.first_token_s = self._elapsed_s()
            assert self._ticket.replica is not None
            self._host.first_token(self, self._ticket.replica)
        self.record.num_output_tokens += num_tokens
        self.record.num_cached_tokens = buffer.num_cached_tokens
        finished = buffer.finished
        if finished is None:
            return buffer.take(None)
        self._is_done = True
        reason = FINISH_REASONS.get(finished.reason)
        if reason is None:
            raise self._abnormal_end(finished)
        self.record.outcome = reason
        return buffer.take(reason)

    def _abnormal_end(self, finished: pb.Finished) -> ApiError:
        if finished.reason == pb.FINISH_REASON_REFUSED:
            return InvalidRequest(finished.error)
        if finished.reason == pb.FINISH_REASON_CANCELLED:
            return RuntimeDied(f"{self._host.name!r} was stopped; the answer is incomplete")
        return InternalError(f"the engine could not finish the sequence: {finished.error}")

    def _may_retry(self, error: ApiError | RuntimeRpcError) -> bool:
        is_lost = isinstance(error, RuntimeUnavailable)
        is_untouched = self.record.num_output_tokens == 0
        return is_lost and is_untouched and self._num_attempts < MAX_ATTEMPTS

    def _translate(self, error: ApiError | RuntimeRpcError) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, StreamOverrun):
            return Overloaded(
                f"the controller fell behind the replica of {self._host.name!r}: {error}; the "
                "answer is incomplete",
                retry_after_s=OVERRUN_RETRY_S,
            )
        if not isinstance(error, RuntimeUnavailable):
            return InternalError(f"the runtime did not take the sequence: {error}")
        return RuntimeDied(
            f"the replica of {self._host.name!r} went away while it answered: {error}; retry"
        )

    def _give_back(self) -> None:
        """Return a lease that was granted and never used."""
        if self._ticket.replica is not None:
            self._host.release(self._ticket.replica)
            self._ticket.replica = None

    def _elapsed_s(self) -> float:
        return self._host.clock.monotonic() - self.admitted_at
