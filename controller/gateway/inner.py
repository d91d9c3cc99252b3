"""Calls of the OpenAI API that come from the controller itself: batches and the like.

They run through the same routes as everybody's, so that they are checked and answered alike, but
without what stands in front of strangers: their key was checked when they were accepted.
"""

import asyncio
import json

import structlog
from fastapi import FastAPI
from starlette.types import Message

from controller.batches.calls import InnerAnswer, InnerCall
from controller.errors import InternalError
from controller.gateway.calls import Gateway
from controller.gateway.responses import add_error_handlers
from controller.gateway.routes import chat, completions, embeddings

log = structlog.get_logger(__name__)


class InnerCalls:
    """Makes calls; cancelling one ends it as a client that leaves would.

    Args:
        gateway: What the routes work with.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        self._app.state.gateway = gateway
        add_error_handlers(self._app)
        for route in (chat, completions, embeddings):
            self._app.include_router(route.router)

    async def __call__(self, call: InnerCall) -> InnerAnswer:
        """Make a call and return its whole answer, whatever its status."""
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
            error = InternalError(f"the controller failed; its log has request {call.request_id!r}")
            return InnerAnswer(error.status, bytearray(json.dumps(error.envelope()).encode()))
        return answer


def _scope(call: InnerCall) -> dict[str, object]:
    state = {
        "request_id": call.request_id,
        "key_id": call.key_id,
        "may_wake": call.may_wake,
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
