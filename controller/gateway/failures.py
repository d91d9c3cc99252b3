"""Errors as HTTP: every failure leaves in OpenAI's envelope with its status and headers."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from controller.errors import (
    ApiError,
    BodyTooLarge,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestTimedOut,
    Unauthorized,
)
from controller.gateway.schemas.common import ErrorBody

log = structlog.get_logger()

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning}
    for status, meaning in {
        400: "The body or a field is wrong; the message says what to change.",
        401: "The API key is missing, unknown, expired or revoked.",
        403: "A web page of another site has made a browser call.",
        404: "No function serves this model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        429: "The function's queue is full; see Retry-After.",
        500: "A defect of the controller.",
        502: "The replica went away while it answered.",
        503: "No replica could be brought up; see Retry-After.",
        504: "No replica, or no token, in time.",
    }.items()
} | {"default": {"model": ErrorBody, "description": "Any other failure."}}
_EVENT = {
    "type": "object",
    "description": "One event of the stream. Lines that begin with a colon are no events.",
    "properties": {
        "event": {"type": "string", "description": "Its type, on /v1/responses."},
        "data": {"type": "string", "description": "A JSON object, or `[DONE]`."},
    },
    "required": ["data"],
}
ANSWER_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer, or with `stream: true` its chunks as they come.",
        "content": {"text/event-stream": {"schema": _EVENT}},
    },
    **ERROR_RESPONSES,
}


def error_response(error: ApiError) -> JSONResponse:
    """Return the HTTP answer to an error."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, Unauthorized):
        # A browser asks for a login on Basic, so that the dashboard can be seen.
        headers["www-authenticate"] = 'Bearer, Basic realm="Coldspark API key as password"'
    if isinstance(error, BodyTooLarge | RequestTimedOut | Overloaded):
        headers["connection"] = "close"  # the rest of the body is still on its way
    return JSONResponse(error.envelope(), status_code=error.status, headers=headers)


def add_error_handlers(app: FastAPI) -> None:
    """Make the application answer in the envelope, also where the framework refuses."""

    @app.exception_handler(ApiError)
    async def answer_api_error(request: Request, error: ApiError) -> JSONResponse:
        if isinstance(error, InternalError):
            request_id = request.scope["state"]["request_id"]
            log.error("request_failed", request_id=request_id, exc_info=error)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def answer_validation_error(
        request: Request, error: RequestValidationError
    ) -> JSONResponse:
        return error_response(_explain(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def answer_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        target = f"{request.method} {request.url.path[:256]}"
        if error.status_code == 404:
            return error_response(NotFound(f"there is no {target}; see /openapi.json"))
        message = f"{target}: {error.detail}"
        return JSONResponse(
            InvalidRequest(message).envelope(),
            status_code=error.status_code,
            headers=error.headers,
        )


def _explain(details: Mapping[str, Any]) -> InvalidRequest:
    """Turn the first validation error into a message that says what to change."""
    context = details.get("ctx") or {}
    path = [*details["loc"][1:], *([context["field"]] if context.get("field") else [])]
    param = _dotted(path)
    if details["type"] == "wrong_field":
        reason = context["reason"]
    elif details["type"] == "missing":
        reason = "required"
    else:
        message = details["msg"].removeprefix("Value error, ")
        reason = f"{message[0].lower()}{message[1:]}, got {reprlib.repr(details.get('input'))}"
    return InvalidRequest(f"{param or 'the body'}: {reason}", param=param)


def _dotted(path: Sequence[str | int]) -> str | None:
    """Write a path as `messages[0].content`, names cut to a sane length, tags of unions left out."""
    named = (step for step in path if not str(step).startswith("<"))
    steps = (f"[{step}]" if isinstance(step, int) else f".{step[:64]}" for step in named)
    return "".join(steps).removeprefix(".") or None
