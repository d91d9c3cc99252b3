"""The answer to one API call: one generation per prompt, as text, with its usage.

Admits all generations together, runs them at once and releases each as soon as its text is
complete. Does not know how the text is sent.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

from controller.clock import Clock
from controller.errors import InternalError
from controller.gateway.logprobs import off_loop
from controller.gateway.pieces import Piece, TokenReport
from controller.gateway.prompt_echo import PromptEcho
from controller.gateway.reader import AnswerReader
from controller.gateway.reply import ReplyReader
from controller.gateway.schemas.common import (
    CompletionTokensDetails,
    PromptTokensDetails,
    Usage,
)
from controller.metrics import Metrics
from controller.scaling.activation import PhaseTiming
from controller.scaling.generation import Generation, TokenChunk

Emit = Callable[[int, Piece], Awaitable[None]]
"""Takes a choice's index and what is new of it."""


class Choice:
    """One generation as text.

    Args:
        generation: Not entered yet.
        reader: Fresh, of the generation's model.
        prompt_token_ids: What the generation goes on from.
        echo: The reader's, if the prompt is told too.
    """

    def __init__(
        self,
        generation: Generation,
        reader: AnswerReader | ReplyReader,
        prompt_token_ids: Sequence[int],
        echo: PromptEcho | None = None,
    ) -> None:
        self.generation = generation
        self.prompt_token_ids = prompt_token_ids
        self.echo = echo
        self.num_output_tokens = 0
        self._reader = reader
        self._admission = AsyncExitStack()

    @property
    def num_reasoning_tokens(self) -> int:
        """How many of its tokens are thoughts, so far."""
        return self._reader.num_reasoning_tokens

    async def admit(self) -> AsyncExitStack:
        """Enter the generation; closing the returned stack leaves it, at the latest."""
        await self._admission.enter_async_context(self.generation)
        return self._admission

    async def run(self, index: int, emit: Emit, metrics: Metrics, clock: Clock) -> None:
        """Generate to the end; the generation is left before the last text is emitted."""
        gaps = metrics.inter_token(self.generation.record.function)
        last_at: float | None = None
        async for chunk in self.generation:
            if self.echo is None or not self.echo.drops_answer:
                self.num_output_tokens += len(chunk.token_ids)
            if chunk.token_ids:
                now = clock.monotonic()
                if last_at is not None:
                    gaps.observe((now - last_at) / len(chunk.token_ids))
                last_at = now
            piece = await self._told(chunk) if chunk.prompt_logprobs else self._reader.read(chunk)
            if piece.finish_reason is not None:
                self.generation.record.outcome = piece.finish_reason
                await self._admission.aclose()
                await emit(index, piece)
                return
            if piece.text or piece.reasoning or piece.calls:
                await emit(index, piece)
        raise InternalError("the generation ended without a finish reason")

    async def _told(self, chunk: TokenChunk) -> Piece:
        """Read the chunk that tells of the prompt."""
        read = partial(self._reader.read, chunk)
        return await off_loop(read, num_tokens=len(self.prompt_token_ids))


class Answer:
    """All choices of one call; enter to admit them, run to generate, exit to leave them.

    Args:
        choices: Those of one prompt are in a row.
        num_per_prompt: How many choices each prompt has.
    """

    def __init__(
        self, choices: Sequence[Choice], *, num_per_prompt: int, metrics: Metrics, clock: Clock
    ) -> None:
        self._choices = choices
        self._num_per_prompt = num_per_prompt
        self._metrics = metrics
        self._clock = clock
        self._admissions = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            for choice in self._choices:
                self._admissions.push_async_exit(await choice.admit())
        except BaseException as error:
            await self._admissions.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._admissions.__aexit__(kind, error, traceback)

    async def run(self, emit: Emit) -> None:
        """Generate all choices at once; the first failure ends the others and is raised."""
        if len(self._choices) == 1:
            await self._choices[0].run(0, emit, self._metrics, self._clock)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for index, choice in enumerate(self._choices):
                    group.create_task(
                        choice.run(index, emit, self._metrics, self._clock),
                        name=f"choice-{index}-{choice.generation.record.request_id}",
                    )
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def prompt_of(self, index: int) -> list[int]:
        """Return the prompt of a choice."""
        return list(self._choices[index].prompt_token_ids)

    def prompt_tokens(self, number: int) -> Sequence[TokenReport]:
        """Return what is to be told of a prompt, once its first choice has begun."""
        echo = self._choices[number * self._num_per_prompt].echo
        return () if echo is None else echo.tokens

    @property
    def size(self) -> int:
        """The number of choices."""
        return len(self._choices)

    @property
    def tier(self) -> str:
        """The tier that the call met."""
        return self._choices[0].generation.record.tier

    @property
    def queue_s(self) -> float | None:
        """How long the call waited for a replica; None while any choice still waits."""
        waits = [choice.generation.record.queue_s for choice in self._choices]
        known = [wait for wait in waits if wait is not None]
        return max(known) if len(known) == len(waits) else None

    @property
    def timeline(self) -> Sequence[PhaseTiming]:
        """The phases of the cold start that the call waited for; none before the first token."""
        return next(filter(None, (one.generation.record.timeline for one in self._choices)), ())

    def eta_s(self) -> float | None:
        """Return the expected seconds to the first token, if that is known."""
        return self._choices[0].generation.eta_s()

    @property
    def usage(self) -> Usage:
        """Tokens of each prompt once and of all choices, as far as they were generated."""
        records = [choice.generation.record for choice in self._choices[:: self._num_per_prompt]]
        num_prompt = sum(record.num_prompt_tokens for record in records)
        num_output = sum(choice.num_output_tokens for choice in self._choices)
        num_cached = sum(record.num_cached_tokens for record in records)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_output,
            total_tokens=num_prompt + num_output,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=sum(choice.num_reasoning_tokens for choice in self._choices)
            ),
        )
