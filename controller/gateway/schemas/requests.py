"""Bodies of /v1/requests."""

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from controller.batches.lines import ENDPOINTS
from controller.gateway.schemas.base import ApiBody, wrong_field
from controller.gateway.schemas.batches import checked_metadata

DEFAULT_TIMEOUT_S = 3600.0
MAX_TIMEOUT_S = 7 * 86_400.0


class AsyncRequestBody(ApiBody):
    """A request to be answered later."""

    endpoint: str = Field(description="One of " + ", ".join(ENDPOINTS))
    body: dict[str, Any] = Field(description="What that endpoint takes; it cannot stream.")
    timeout_s: float | None = Field(
        default=None,
        ge=1,
        le=MAX_TIMEOUT_S,
        allow_inf_nan=False,
        description="Seconds until it must be answered, 3600 by default; it has failed then.",
    )
    webhook_url: str | None = Field(
        default=None,
        max_length=2048,
        description="Told of the answer, signed; must be allowed by the function's spec.",
    )
    metadata: dict[str, str] | None = Field(
        default=None, description="Up to 16 pairs of text, kept and shown."
    )

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str) -> str:
        if endpoint not in ENDPOINTS:
            raise wrong_field(f"must be one of {', '.join(ENDPOINTS)}, got {endpoint[:64]!r}")
        return endpoint

    @field_validator("body")
    @classmethod
    def _check_body(cls, body: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(body.get("model"), str):
            raise wrong_field("required, as text", field="model")
        if body.get("stream"):
            raise wrong_field("must be false: nobody is there to read a stream", field="stream")
        if body.get("background"):
            raise wrong_field("must be false: it is that already", field="background")
        return body

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        return checked_metadata(metadata)


class AsyncAnswer(BaseModel):
    """What the endpoint has answered; without the body in a list."""

    status_code: int
    body: Any = None


class AsyncWebhook(BaseModel):
    """Whether somebody was told; `status` is null before there is an answer."""

    url: str
    status: Literal["pending", "delivered", "failed"] | None
    attempts: int
    last_error: str | None


class AsyncRequest(BaseModel):
    """A request that was accepted."""

    id: str
    object: Literal["async_request"] = "async_request"
    endpoint: str
    model: str
    status: Literal["in_progress", "completed", "failed", "cancelled"]
    created_at: int
    expires_at: int
    ended_at: int | None
    response: AsyncAnswer | None
    webhook: AsyncWebhook | None
    metadata: dict[str, str] | None


class AsyncRequestList(BaseModel):
    """Some of a caller's requests, newest first."""

    object: Literal["list"] = "list"
    data: list[AsyncRequest]
    first_id: str | None
    last_id: str | None
    has_more: bool


class AsyncRequestDeleted(BaseModel):
    """That a request is forgotten."""

    id: str
    object: Literal["async_request"] = "async_request"
    deleted: Literal[True] = True


class WebhookSecret(BaseModel):
    """What a caller's webhooks are signed with, as libraries of Standard Webhooks take it."""

    object: Literal["webhook_secret"] = "webhook_secret"
    secret: str
