"""One response from its beginning to its end, and the events that tell of it."""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import count

from controller.clock import Clock
from controller.errors import ApiError, InvalidRequest, QueueFull
from controller.gateway.pieces import Piece
from controller.gateway.response_api.output_items import Event, Happening, OutputItems
from controller.gateway.schemas.common import Usage
from controller.gateway.schemas.response_object import (
    IncompleteDetails,
    ResponseFailure,
    ResponseObject,
    ResponseUsage,
)

Keep = Callable[[ResponseObject], Awaitable[bool]]
"""Keeps a response that is over; returns whether that was possible."""


class ResponseDraft:
    """A response that is being made.

    Args:
        response: What was asked for; filled in.
        output: Fresh.
        keep: What keeps it in the end; None if it is not to be kept.
        usage: Returns the tokens so far.
        clock: Dates the end.
    """

    def __init__(
        self,
        response: ResponseObject,
        output: OutputItems,
        *,
        keep: Keep | None,
        usage: Callable[[], Usage],
        clock: Clock,
    ) -> None:
        self.response = response
        self._output = output
        self._keep = keep
        self._usage = usage
        self._clock = clock
        self._finish_reason = ""

    def begin(self) -> Iterator[Event]:
        """Yield what tells that the response is being made."""
        yield self._event("created")
        yield self._event("in_progress")

    def add(self, piece: Piece) -> Iterator[Happening]:
        """Take what is new of the answer; yield what happens by it. To be read to its end."""
        self._finish_reason = piece.finish_reason or self._finish_reason
        return self._output.add(piece)

    async def end(self) -> list[Event]:
        """End the response, keep it, and return what tells of that."""
        is_complete = self._finish_reason != "length"
        events = list(self._output.end(is_complete=is_complete))
        response = self._close()
        if is_complete:
            response.status = "completed"
            response.completed_at = int(self._clock.now().timestamp())
        else:
            response.status = "incomplete"
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        if self._keep is not None:
            response.store = await self._keep(response)
        return [*events, self._event(response.status)]

    def fail(self, error: ApiError) -> Event:
        """End the response because it cannot be made, and return what tells of that."""
        response = self._close()
        response.status = "failed"
        response.store = False
        response.error = ResponseFailure(code=_failure_code(error), message=error.message)
        return self._event("failed")

    def _close(self) -> ResponseObject:
        self.response.output = self._output.done
        self.response.usage = ResponseUsage.of(self._usage())
        return self.response

    def _event(self, name: str) -> Event:
        return Event(f"response.{name}", {"response": self.response.model_dump(mode="json")})


class ResponseWriter:
    """Server-sent events of one streamed response.

    Args:
        draft: The response.
    """

    def __init__(self, draft: ResponseDraft) -> None:
        self._draft = draft
        self._numbers = count()
        self._is_begun = False

    def opening(self, index: int) -> bytes:
        """Return what comes before anything of the answer; there is one answer only."""
        self._is_begun = True
        return self._written(self._draft.begin())

    def piece(self, index: int, piece: Piece) -> bytes:
        """Return the events of what is new of the answer."""
        return self._written(self._draft.add(piece))

    async def closing(self) -> bytes:
        """Return the events that end the stream."""
        return self._written(await self._draft.end())

    def error(self, error: ApiError) -> bytes:
        """Return the events that end a stream that failed."""
        opening = b"" if self._is_begun else self.opening(0)
        return opening + self._written([self._draft.fail(error)])

    def _written(self, events: Iterable[Happening]) -> bytes:
        return "".join([event.written(next(self._numbers)) for event in events]).encode()


def _failure_code(error: ApiError) -> str:
    """Return the nearest of OpenAI's codes for what can become of a response."""
    if isinstance(error, QueueFull):
        return "rate_limit_exceeded"
    return "invalid_prompt" if isinstance(error, InvalidRequest) else "server_error"
