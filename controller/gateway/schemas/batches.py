"""Bodies of /v1/batches."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator

from controller.batches.lines import ENDPOINTS
from controller.gateway.schemas.base import ApiBody, Neutral, wrong_field
from functions.units import parse_duration

MIN_WINDOW_S, MAX_WINDOW_S = 1.0, 30 * 86_400.0
MAX_METADATA = 16
MAX_KEY_CHARS, MAX_VALUE_CHARS = 64, 512


class BatchRequest(ApiBody):
    """A file of requests to be answered within a window of time."""

    unsupported: ClassVar[dict[str, Neutral]] = {"output_expires_after": ()}

    input_file_id: str = Field(min_length=1, max_length=64)
    endpoint: str = Field(
        description="What all requests of the file are for: " + ", ".join(ENDPOINTS)
    )
    completion_window: str = Field(
        max_length=32,
        description="Time until every request has been tried, from 1s to 30d; `24h` say.",
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

    @field_validator("completion_window")
    @classmethod
    def _check_window(cls, window: str) -> str:
        try:
            seconds = parse_duration(window)
        except ValueError as error:
            raise wrong_field(str(error)) from error
        if not MIN_WINDOW_S <= seconds <= MAX_WINDOW_S:
            raise wrong_field(f"must be from 1s to 30d, got {window!r}")
        return window

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        return checked_metadata(metadata)

    @property
    def window_s(self) -> float:
        """The window in seconds."""
        return parse_duration(self.completion_window)


def checked_metadata(metadata: dict[str, str] | None) -> dict[str, str] | None:
    """Return metadata within OpenAI's limits."""
    pairs = (metadata or {}).items()
    if len(pairs) > MAX_METADATA:
        raise wrong_field(f"has {len(pairs)} pairs; at most {MAX_METADATA} are allowed")
    if any(len(key) > MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS for key, value in pairs):
        raise wrong_field(
            f"keys have up to {MAX_KEY_CHARS} characters and values up to {MAX_VALUE_CHARS}"
        )
    return metadata


class BatchErrors(BaseModel):
    """Why an input was refused: lines with code, message, line and param."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class RequestCounts(BaseModel):
    """How far a batch is."""

    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """Some of a caller's batches, newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
