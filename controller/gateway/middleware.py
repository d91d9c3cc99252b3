"""What every call passes on its way in, outermost first; all of it pure ASGI.

- `RequestContext`: request id, figures, and an answer when all else fails.
- `OriginGate` (origin.py): nothing that another web site makes a browser send.
- `ApiKeys` (auth.py), where keys are required.
- `BodyGate`: the whole body within its limits, then a watch on the client: when it leaves, the
  call is cancelled, whatever it was waiting for.
"""

import asyncio
import re
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.clock import Clock
from controller.errors import (
    ApiError,
    BodyTooLarge,
    InternalError,
    InvalidRequest,
    Overloaded,
    RequestTimedOut,
)
from controller.gateway.failures import error_response
from controller.metrics import Metrics

OPENAI_PREFIX = "/v1/"
UPLOAD_PATHS = frozenset({"/v1/files"})
CLIENT_CLOSED_REQUEST = 499
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

log = structlog.get_logger()


class RequestContext:
    """Gives each call an id and counts it; state keys: request_id, function, tier, code."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, clock: Clock) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the call and see it off."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, key_id=None, function="", tier="ready", code=None)
        started_at = state["received_at"] = self._clock.monotonic()
        is_complete = False
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started, is_complete
            if message["type"] == "http.response.start":
                has_started = True
                state["code"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif not message.get("more_body", False):
                is_complete = True
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:  # the task root of a call: nothing may pass untold
            log.exception("request_failed", request_id=request_id, path=scope["path"])
            if has_started:
                raise
            failure = InternalError(f"the controller failed; its log has request {request_id!r}")
            await error_response(failure)(scope, receive, send_with_id)
        finally:
            if scope["path"].startswith(OPENAI_PREFIX):
                if not is_complete:
                    phase = "streaming" if has_started else "waiting"
                    self._metrics.client_disconnected(function=state["function"], phase=phase)
                self._metrics.request_finished(
                    function=state["function"],
                    code=state["code"] if is_complete else CLIENT_CLOSED_REQUEST,
                    is_cold=state["tier"] != "ready",
                    seconds=self._clock.monotonic() - started_at,
                )


class BodyGate:
    """Reads bodies within their bounds, then cancels the call when the client leaves.

    Only calls of the OpenAI API end with their client; the others run to their end. Uploads are
    passed on unread: their route takes them piece by piece, within limits of its own.

    Args:
        app: The rest of the application.
        max_body_bytes: Longest body; not a byte more is kept.
        max_unread_bytes: Most bytes of all bodies that are being read; nothing is admitted yet, so
            no queue bounds them.
        body_timeout_s: Longest time from the head to the last byte of the body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        max_unread_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self._app = app
        self._max_unread_bytes = max_unread_bytes
        self._num_unread_bytes = 0
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 400, 408, 413 or 503, or pass the call on with its body at hand."""
        is_body = scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH")
        if not is_body or scope["path"] in UPLOAD_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is None:
            return
        call = _Call(body, receive)
        if scope["path"].startswith(OPENAI_PREFIX):
            await call.run_while_connected(self._app, scope, send)
        else:
            await self._app(scope, call.receive, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the body, or None if the client left before it was complete."""
        encoding = headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise InvalidRequest(
                f"the body has Content-Encoding {encoding[:64]!r}; send it uncompressed"
            )
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:19]) > self._max_body_bytes:
            raise self._too_large()
        pieces, num_bytes = [], 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while (message := await receive())["type"] == "http.request":
                    piece = message.get("body", b"")
                    num_bytes += len(piece)
                    self._num_unread_bytes += len(piece)
                    if num_bytes > self._max_body_bytes:
                        raise self._too_large()
                    if self._num_unread_bytes > self._max_unread_bytes:
                        raise self._too_many()
                    pieces.append(piece)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError as error:
            raise RequestTimedOut(
                f"the body was not complete after {self._body_timeout_s:g} s; send it faster"
            ) from error
        finally:
            self._num_unread_bytes -= num_bytes
        return None

    def _too_many(self) -> Overloaded:
        return Overloaded(
            f"request bodies of more than {self._max_unread_bytes} bytes are being sent at once; "
            "retry shortly, or raise COLDSPARK_MAX_UNREAD_BYTES",
            retry_after_s=1.0,
        )

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body is larger than {self._max_body_bytes} bytes; send less, "
            "or raise COLDSPARK_MAX_BODY_BYTES"
        )


class _Call:
    """One call whose body has been read."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self._is_left = asyncio.Event()

    async def receive(self) -> Message:
        """Return the body once, then what the client does next."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._receive()

    async def run_while_connected(self, app: ASGIApp, scope: Scope, send: Send) -> None:
        """Run the application; cancel it as soon as the client is gone."""

        async def run() -> None:
            await app(scope, self._receive_watched, send)

        running = asyncio.create_task(run(), name=f"call-{scope['state']['request_id']}")
        watching = asyncio.create_task(self._watch(), name="client-watch")
        try:
            await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            running.cancel()
            watching.cancel()
            await asyncio.wait({running, watching})
        if not running.cancelled():
            running.result()

    async def _receive_watched(self) -> Message:
        if self._body is not None:
            return await self.receive()
        await self._is_left.wait()
        return {"type": "http.disconnect"}

    async def _watch(self) -> None:
        """Return when the client has left; servers say so after the last byte, too."""
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except OSError:
            pass  # a broken connection is a client that has left
        self._is_left.set()
