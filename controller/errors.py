"""Everything the controller can refuse or fail with, and the HTTP answer to each.

ApiError
├── InvalidRequest            400  the body or a field is wrong; says what to change
│   ├── ContextLengthExceeded 400
│   └── PreviousResponseNotFound  400
├── Unauthorized              401
├── Forbidden                 403  a web page of another site has made a browser call
├── NotFound                  404
│   └── ModelNotFound         404
├── RequestTimedOut           408  the client sent its body too slowly
├── Conflict                  409  the function is not in a state that allows this
├── BodyTooLarge              413
├── InvalidSpec               422  a function spec that cannot be accepted
├── QueueFull                 429  temporary, Retry-After
├── InternalError             500
├── RuntimeDied               502  the replica went away while it served this request
├── ActivationFailed          503  temporary, Retry-After
├── StoreUnavailable          503  temporary, Retry-After
├── Overloaded                503  temporary, Retry-After
├── ShuttingDown              503  temporary, Retry-After
├── ActivationTimeout         504  no replica became ready within the queue timeout
└── FirstTokenTimeout         504  a replica took the request and produced nothing in time

The envelope is OpenAI's: {"error": {"message", "type", "param", "code"}}.
"""

from typing import ClassVar


class ApiError(Exception):
    """A failure with an HTTP status and OpenAI's error fields.

    Args:
        message: What failed, the value, and what to do about it.
        param: The request field at fault, if there is one.
        retry_after_s: Seconds after which a retry can help; None when it cannot.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def envelope(self) -> dict[str, dict[str, str | None]]:
        """Return the error body as OpenAI's clients expect it."""
        fields = {"message": self.message, "type": self.type}
        return {"error": {**fields, "param": self.param, "code": self.code}}


class InvalidRequest(ApiError):
    """The body or one of its fields is wrong."""

    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and requested tokens do not fit the model's context."""

    code = "context_length_exceeded"


class PreviousResponseNotFound(InvalidRequest):
    """The response that a new one is to follow is not kept."""

    code = "previous_response_not_found"


class Unauthorized(ApiError):
    """The API key is missing, wrong, expired or revoked."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(ApiError):
    """A web page of another site has made a browser call, or may have."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class NotFound(ApiError):
    """No such resource."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """No deployed function serves this model name."""

    code = "model_not_found"


class RequestTimedOut(ApiError):
    """The client did not send its whole request in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class Conflict(ApiError):
    """The function is not in a state that allows the operation."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTooLarge(ApiError):
    """The request body is over the limit."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class InvalidSpec(ApiError):
    """A function spec that cannot be accepted."""

    status = 422
    type = "invalid_request_error"
    code = "invalid_spec"


class QueueFull(ApiError):
    """The function's queue has no place left."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class InternalError(ApiError):
    """A defect of ours; the log has the traceback under the request id."""

    code = "internal_error"


class RuntimeDied(ApiError):
    """The replica went away while it served the request."""

    status = 502
    code = "runtime_died"


class ActivationFailed(ApiError):
    """A replica could not be brought up."""

    status = 503
    code = "activation_failed"


class StoreUnavailable(ApiError):
    """The database cannot be used now; what is warm and known serves on."""

    status = 503
    code = "store_unavailable"


class Overloaded(ApiError):
    """Too much is on its way into the controller at once."""

    status = 503
    code = "overloaded"


class ShuttingDown(ApiError):
    """The controller is stopping and takes no new work."""

    status = 503
    code = "server_shutting_down"


class ActivationTimeout(ApiError):
    """No replica became ready within the queue timeout."""

    status = 504
    code = "activation_timeout"


class FirstTokenTimeout(ApiError):
    """A replica took the request and produced no token in time."""

    status = 504
    code = "first_token_timeout"
