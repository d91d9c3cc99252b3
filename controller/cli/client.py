"""HTTP to the controller; its failures become CliErrors here and nowhere else."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import httpx

from controller.cli.connection import DEFAULT_URL, Connection
from controller.cli.errors import (
    CliError,
    KeyRefused,
    NotFoundProblem,
    SpecProblem,
    TryLater,
    Unreachable,
    UsageProblem,
)

CONNECT_TIMEOUT_S = 5.0

_BY_STATUS: dict[int, type[CliError]] = {
    401: KeyRefused,
    403: KeyRefused,
    404: NotFoundProblem,
    422: SpecProblem,
    429: TryLater,
    503: TryLater,
    504: TryLater,
}


class ControllerClient:
    """The controller's HTTP API.

    Every method raises Unreachable when nothing answers and another CliError when the answer is
    a refusal. Operations may take as long as the controller needs: only connecting is timed.

    Read answers inside its context: a field that is not where it is read becomes a CliError there.
    """

    def __init__(self, connection: Connection) -> None:
        headers = {"user-agent": "coldspark-cli"}
        if connection.api_key:
            headers["authorization"] = f"Bearer {_checked_key(connection.api_key)}"
        self._url = connection.url
        self._http = httpx.Client(
            base_url=_checked_url(connection.url),
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            trust_env=False,  # a proxy variable must not capture calls to the controller
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()
        if isinstance(error, LookupError | TypeError | AttributeError):
            raise CliError(
                f"the answer of the controller is not understood: {error!r}",
                hint="is it of another version? compare `coldspark version` and "
                "`coldspark status -o json`",
            ) from error

    def call(
        self, method: str, path: str, *, body: object = None, params: dict[str, Any] | None = None
    ) -> Any:
        """Return the decoded JSON answer; None when it has no content."""
        with self._translated():
            response = self._http.request(method, path, json=body, params=_given(params))
            _raise_for_status(response)
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError as error:
            raise self._not_ours() from error

    @contextmanager
    def stream(
        self, method: str, path: str, *, body: object = None, params: dict[str, Any] | None = None
    ) -> Iterator[httpx.Response]:
        """Yield an answer whose body arrives bit by bit."""
        with (
            self._translated(),
            self._http.stream(method, path, json=body, params=_given(params)) as response,
        ):
            if response.is_error:
                response.read()
            _raise_for_status(response)
            yield response

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unreachable(
                f"no controller answers at {self._url}",
                hint="start one with `coldspark up`, or set --url or COLDSPARK_URL",
            ) from error
        except httpx.RemoteProtocolError as error:
            raise CliError(
                f"the controller at {self._url} broke off: {error}",
                hint="its log says why; the call may work again",
            ) from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise Unreachable(f"the connection to {self._url} failed: {error!r}") from error

    def _not_ours(self) -> CliError:
        return CliError(
            f"what answers at {self._url} is not a Coldspark controller",
            hint="check --url and COLDSPARK_URL",
        )


def _checked_url(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageProblem(f"{url!r} is not an http address", hint=f"write it like {DEFAULT_URL}")
    return parsed


def _checked_key(api_key: str) -> str:
    if not (api_key.isascii() and api_key.isprintable()):
        raise UsageProblem(
            "the API key holds characters no header can carry",
            hint="copy it again; `coldspark keys create` makes a new one",
        )
    return api_key


def error_of(envelope: object, *, status: int, retry_after: str | None = None) -> CliError:
    """Return the failure an OpenAI error envelope describes."""
    fields = envelope.get("error") if isinstance(envelope, dict) else None
    message = fields.get("message") if isinstance(fields, dict) else None
    problem = _BY_STATUS.get(status, CliError)
    hint = None
    if problem is TryLater and retry_after:
        hint = f"try again in {retry_after} s"
    if status == 401:
        hint = "set COLDSPARK_API_KEY or --api-key"
    if problem is NotFoundProblem:
        hint = "`coldspark list` shows what is deployed"
    return problem(str(message or f"the controller answered {status}"), hint=hint)


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        envelope = json.loads(response.content)
    except ValueError:
        envelope = None
    status, retry_after = response.status_code, response.headers.get("retry-after")
    raise error_of(envelope, status=status, retry_after=retry_after)


def _given(params: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (params or {}).items() if value is not None}
