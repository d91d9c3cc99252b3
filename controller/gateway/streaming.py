"""Answers as server-sent events: chunks of text, comments while nothing comes, errors in line.

A token's chunk is a concatenation of strings prepared once per call and the escaped text.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from controller.errors import ApiError, InternalError
from controller.gateway.answers import Answer
from controller.gateway.logprobs import Write, off_loop
from controller.gateway.pieces import Piece
from controller.gateway.schemas.common import Usage
from controller.gateway.stalls import ClientStalled, StallWatch
from controller.gateway.tool_calls.base import CallDelta
from controller.scaling.activation import PhaseTiming

DONE = b"data: [DONE]\n\n"
_CHOICES = '"choices":[{"index":'

log = structlog.get_logger()
_escape = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkShape:
    """How an endpoint wraps text: JSON before it and after it, and what opens each choice.

    The prompt of a conversation is told once; of several prompts, with the choices of each.
    """

    object: str
    before_text: str
    after_text: str
    no_text: str
    opening: str | None
    has_one_prompt: bool


CHAT_CHUNK = ChunkShape(
    object="chat.completion.chunk",
    before_text='"delta":{"content":',
    after_text="}",
    no_text='"delta":{}',
    opening='"delta":{"role":"assistant","content":"","refusal":null}',
    has_one_prompt=True,
)
TEXT_CHUNK = ChunkShape(
    object="text_completion",
    before_text='"text":',
    after_text="",
    no_text='"text":""',
    opening=None,
    has_one_prompt=False,
)


class EventWriter(Protocol):
    """Makes the events of one streamed answer."""

    def opening(self, index: int) -> bytes:
        """Return what comes before a choice's first piece; may be nothing."""

    def piece(self, index: int, piece: Piece) -> bytes:
        """Return what tells of a piece of a choice."""

    async def closing(self) -> bytes:
        """Return what ends the stream of a whole answer."""

    def error(self, error: ApiError) -> bytes:
        """Return what ends a stream that failed."""


class ChunkWriter:
    """Chunks of one streamed answer.

    Args:
        shape: The endpoint's.
        identity: The fields every chunk repeats: id, created and model.
        usage: Returns the usage so far.
        includes_usage: Whether the stream ends with a usage chunk; then the others say null.
        continues_usage: Whether every chunk carries the usage so far.
        logprobs: Writes a piece's log-probabilities, if they are asked for.
        prompt_of: Returns the prompt of a choice, if chunks are to name its tokens and their own.
    """

    def __init__(
        self,
        shape: ChunkShape,
        identity: Mapping[str, object],
        *,
        usage: Callable[[], Usage],
        includes_usage: bool,
        continues_usage: bool = False,
        logprobs: Write | None = None,
        prompt_of: Callable[[int], list[int]] | None = None,
    ) -> None:
        self._shape = shape
        self._usage = usage
        self._includes_usage = includes_usage
        self._continues_usage = continues_usage
        self._logprobs = logprobs
        self._prompt_of = prompt_of
        self._prompts_told: set[int] = set()
        self._is_plain = not (continues_usage or logprobs or prompt_of)
        head = _escape({**identity, "object": shape.object})
        self._head = f"data: {head[:-1]},"
        self._choice_head = f"{self._head}{_CHOICES}"
        self._tail = ',"usage":null}\n\n' if includes_usage else "}\n\n"
        self._unfinished = f'{shape.after_text},"logprobs":null,"finish_reason":null}}]{self._tail}'

    def opening(self, index: int) -> bytes:
        """Return what comes before a choice's first text; may be nothing."""
        if self._shape.opening is None:
            return b""
        return self._event(index, self._shape.opening, Piece(""))

    def piece(self, index: int, piece: Piece) -> bytes:
        """Return the chunk of what is new of a choice."""
        shape = self._shape
        if (
            piece.finish_reason is None
            and self._is_plain
            and not piece.calls
            and not piece.reasoning
        ):
            body = f"{self._choice_head}{index},{shape.before_text}{_escape(piece.text)}"
            return f"{body}{self._unfinished}".encode()
        if piece.reasoning or piece.calls:
            return self._event(index, f'"delta":{_escape(_delta(piece))}', piece)
        text = piece.text
        body = f"{shape.before_text}{_escape(text)}{shape.after_text}" if text else shape.no_text
        return self._event(index, body, piece)

    async def closing(self) -> bytes:
        """Return the chunk that carries the usage, if that is asked for, and the end."""
        if not self._includes_usage:
            return DONE
        usage = self._usage().model_dump_json()
        return f'{self._head}"choices":[],"usage":{usage}}}\n\n'.encode() + DONE

    def error(self, error: ApiError) -> bytes:
        """Return the event that ends a stream that failed."""
        return f"data: {_escape(error.envelope())}\n\n".encode()

    def _event(self, index: int, body: str, piece: Piece) -> bytes:
        logprobs = b"null"
        if self._logprobs is not None and piece.tokens:
            logprobs = self._logprobs(piece.tokens)
        fields: dict[str, object] = {"finish_reason": piece.finish_reason}
        if piece.finish_reason is not None:
            fields["stop_reason"] = piece.stop_reason
        if self._prompt_of is not None:
            fields["token_ids"] = [token.token_id for token in piece.tokens]
        head, tail = self._choice_head, self._tail
        if prompt := self._new_prompt(index):
            if self._shape.has_one_prompt:
                head = f"{self._head}{_escape(prompt)[1:-1]},{_CHOICES}"
            else:
                fields |= prompt
        if self._continues_usage:
            tail = f',"usage":{self._usage().model_dump_json()}}}\n\n'
        before = f'{head}{index},{body},"logprobs":'.encode()
        return before + logprobs + f",{_escape(fields)[1:]}]{tail}".encode()

    def _new_prompt(self, index: int) -> dict[str, list[int]]:
        """Return the prompt of a choice as a field, the first time if it is to be told."""
        place = 0 if self._shape.has_one_prompt else index
        if self._prompt_of is None or place in self._prompts_told:
            return {}
        self._prompts_told.add(place)
        return {"prompt_token_ids": self._prompt_of(index)}


class EventStream(Response):
    """Runs an answer and streams it.

    Admission, and whatever fails before the first event or heartbeat, is raised and becomes a
    proper status. After that a failure is an event, and the stream has no other end. A client
    that stops reading holds the engine back, until the stall is noticed.

    Args:
        answer: Not entered yet.
        writer: Makes the events.
        heartbeat_s: Silence, in seconds, after which a comment shows that the call is alive.
    """

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, writer: EventWriter, *, heartbeat_s: float) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._answer = answer
        self._writer = writer
        self._heartbeat_s = heartbeat_s
        self._opened: set[int] = set()
        self._is_started = False
        self._is_quiet = True
        self._starting = asyncio.Lock()
        self._stall = StallWatch()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream the whole answer; cancelling this leaves every generation at once."""
        self._send = send
        try:
            async with self._stall:
                await self._stream(scope)
        except ClientStalled:
            log.info("client_stalled", request_id=scope["state"]["request_id"])

    async def _stream(self, scope: Scope) -> None:
        try:
            async with self._answer, self._heartbeat():
                await self._answer.run(self._emit)
            await self._write(await self._writer.closing(), is_last=True)
        except ApiError as error:
            await self._fail(error, scope)
        except Exception:  # a defect of ours must still end the stream in good order
            if not self._is_started:
                raise
            log.exception("stream_failed", request_id=scope["state"]["request_id"])
            failure = InternalError("the controller failed while it streamed this answer")
            await self._fail(failure, scope)

    async def _emit(self, index: int, piece: Piece) -> None:
        opening = b""
        if index not in self._opened:
            if not self._opened and self._is_started and self._answer.timeline:
                # The headers went out with a heartbeat, before there was anything to tell.
                await self._write(f": timing {server_timing(self._answer.timeline)}\n\n".encode())
            self._opened.add(index)
            opening = self._writer.opening(index)
        if piece.tokens:
            write = partial(self._writer.piece, index, piece)
            event = await off_loop(write, num_tokens=len(piece.tokens))
        else:
            event = self._writer.piece(index, piece)
        await self._write(opening + event)

    async def _fail(self, error: ApiError, scope: Scope) -> None:
        if not self._is_started:
            raise error
        scope["state"]["code"] = error.status
        await self._write(self._writer.error(error), is_last=True)

    @asynccontextmanager
    async def _heartbeat(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._beat(), name="stream-heartbeat")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _beat(self) -> None:
        while True:
            self._is_quiet = True
            await asyncio.sleep(self._heartbeat_s)
            if self._is_quiet:
                await self._write(self._comment().encode())

    def _comment(self) -> str:
        if self._opened or self._answer.tier == "ready":
            return ": waiting\n\n"
        eta_s = self._answer.eta_s()
        return ": waking\n\n" if eta_s is None else f": waking, {eta_s:.1f} s left\n\n"

    async def _write(self, event: bytes, *, is_last: bool = False) -> None:
        self._is_quiet = False
        stall = self._stall
        stall.begin()
        if not self._is_started:
            async with self._starting:
                if not self._is_started:
                    await self._start()
        await self._send({"type": "http.response.body", "body": event, "more_body": not is_last})
        stall.end()

    async def _start(self) -> None:
        self.headers.update(answer_headers(self._answer))
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        )
        self._is_started = True


def _delta(piece: Piece) -> dict[str, Any]:
    """Return what is new of a message with reasoning or calls."""
    delta: dict[str, Any] = {}
    if piece.reasoning:
        delta["reasoning_content"] = piece.reasoning
        delta["reasoning"] = piece.reasoning
    if piece.text:
        delta["content"] = piece.text
    if piece.calls:
        delta["tool_calls"] = [_call(call) for call in piece.calls]
    return delta


def _call(call: CallDelta) -> dict[str, Any]:
    if call.call_id is None:
        return {"index": call.number, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.number, "id": call.call_id, "type": "function", "function": function}


def answer_headers(answer: Answer) -> dict[str, str]:
    """Return how cold the call was and, as soon as that is over, how long it queued."""
    return headers_of(answer.tier, answer.queue_s, answer.timeline)


def headers_of(
    tier: str, queue_s: float | None, timeline: Sequence[PhaseTiming] = ()
) -> dict[str, str]:
    """Return the headers that tell how cold a call was and where its wait went, as far as known."""
    headers = {"x-coldspark-tier": tier}
    if queue_s is not None:
        headers["x-coldspark-queue-ms"] = str(round(queue_s * 1000))
    if timeline:
        headers["server-timing"] = server_timing(timeline)
    return headers


def server_timing(timeline: Iterable[PhaseTiming]) -> str:
    """Return phases as a Server-Timing header has them, in milliseconds (W3C Server Timing)."""
    return ", ".join(f"{phase.name};dur={1000 * phase.seconds:.1f}" for phase in timeline)
