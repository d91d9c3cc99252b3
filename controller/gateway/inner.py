"""Calls of the OpenAI API that come from the controller itself: batches and the like.

They run through the same routes as everybody's, so that they are checked and answered alike, but
without what stands in front of strangers. Their key was checked when they were accepted, and is
once more before each call.
"""

import asyncio
import json
from collections.abc import Iterable
from typing import Protocol

import structlog
from fastapi import APIRouter, FastAPI
from starlette.types import Message

from controller.batches.calls import InnerAnswer, InnerCall
from controller.errors import ApiError, InternalError, Unauthorized
from controller.gateway.calls import Gateway
from controller.gateway.failures import add_error_handlers
from controller.gateway.routes import chat, completions, embeddings

log = structlog.get_logger(__name__)


class KeyCheck(Protocol):
    """Says whether a key may still call."""

    async def may_call(self, key_id: str) -> bool:
        """Return whether a key that was good once still is."""


class InnerCalls:
    """Makes calls; cancelling one ends it as a client that leaves would.

    Args:
        gateway: What the routes work with.
        keys: Asked before every call that a key pays for: it may have been revoked since.
        routers: More endpoints.
    """

    def __init__(self, gateway: Gateway, keys: KeyCheck, routers: Iterable[APIRouter] = ()) -> None:
        self._keys = keys
        self._app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        self._app.state.gateway = gateway
        add_error_handlers(self._app)
        openai = (chat.router, completions.router, embeddings.router)
        for router in (*openai, *routers):
            self._app.include_router(router)

    async def __call__(self, call: InnerCall) -> InnerAnswer:
        """Make a call and return its whole answer, whatever its status."""
        try:
            await self._check_key(call.key_id)
        except ApiError as error:
            return _refused(error)
        answer = InnerAnswer()
        bodies = [call.body]

        async def receive() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await asyncio.Event().wait()  # nobody leaves but by cancelling
            raise AssertionError("never set")

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
            else:
                answer.body += message.get("body", b"")

        try:
            await self._app(_scope(call), receive, send)
        except Exception:  # the root of a call: its batch must go on
            log.exception("inner call failed", request_id=call.request_id)
            return _refused(
                InternalError(f"the controller failed; its log has request {call.request_id!r}")
            )
        return answer

    async def _check_key(self, key_id: str | None) -> None:
        if key_id is not None and not await self._keys.may_call(key_id):
            raise Unauthorized("the API key that this was accepted from was revoked or has expired")


def _refused(error: ApiError) -> InnerAnswer:
    return InnerAnswer(error.status, bytearray(json.dumps(error.envelope()).encode()))


def _scope(call: InnerCall) -> dict[str, object]:
    state = {
        "request_id": call.request_id,
        "key_id": call.key_id,
        "may_wake": call.may_wake,
        "priority": call.priority,
        "function": "",
        "tier": "ready",
        "code": None,
    }
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
        "state": state,
    }
