"""The input of a batch: one request a line, all checked before any is run.

Blocking; a thread's work. Lines are found again by their offsets, so that the input is never
whole in memory.
"""

import json
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_REQUESTS = 50_000
MAX_ERRORS = 100
MAX_CUSTOM_ID_CHARS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class LineError:
    """What is wrong with one line; numbers start at 1, None means the file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return it as the API shows it."""
        return {
            "code": self.code,
            "message": self.message,
            "line": self.line,
            "param": self.param,
        }


@dataclass(slots=True, kw_only=True)
class BatchInput:
    """What a valid input holds.

    Attributes:
        path: The file.
        model: What all requests name.
        custom_ids: One per request, in order.
        offsets: Where each request's line starts.
    """

    path: Path
    model: str = ""
    custom_ids: list[str] = field(default_factory=list)
    offsets: "array[int]" = field(default_factory=lambda: array("Q"))

    def body(self, index: int) -> bytes:
        """Return a request's body as JSON."""
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return json.dumps(json.loads(file.readline())["body"]).encode()


def read_input(
    path: Path, endpoint: str, *, max_line_bytes: int
) -> tuple[BatchInput, list[LineError]]:
    """Read and check a batch's input; it is valid if there are no errors."""
    found = BatchInput(path=path)
    errors: list[LineError] = []
    if not path.exists():
        return found, [LineError(code="file_gone", message="the input has expired")]
    seen: set[str] = set()
    for number, offset, line in _lines(path, max_line_bytes):
        time.sleep(0)  # lets the event loop have the interpreter, which streams wait for
        if len(found.custom_ids) >= MAX_REQUESTS:
            errors.append(
                LineError(
                    code="too_many_requests",
                    message=f"a batch has at most {MAX_REQUESTS} requests; split it",
                )
            )
            break
        try:
            request = _checked(line, endpoint, number)
            _check_together(request, found.model, seen, number)
        except _BadLine as bad:
            errors.append(bad.error)
            if len(errors) >= MAX_ERRORS:
                break
            continue
        seen.add(request["custom_id"])
        found.model = found.model or request["body"]["model"]
        found.custom_ids.append(request["custom_id"])
        found.offsets.append(offset)
    if not found.custom_ids and not errors:
        errors.append(LineError(code="empty_file", message="the input has no requests"))
    return found, errors


class _BadLine(Exception):
    def __init__(self, code: str, message: str, line: int, param: str | None = None) -> None:
        super().__init__(message)
        self.error = LineError(code=code, message=message, line=line, param=param)


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield number, offset and content of each line that is not blank; None if it is too long."""
    with path.open("rb") as file:
        number = 0
        while True:
            offset = file.tell()
            line = file.readline(max_line_bytes + 1)
            if not line:
                return
            number += 1
            if len(line) > max_line_bytes:
                while line and not line.endswith(b"\n"):
                    line = file.readline(max_line_bytes)
                yield number, offset, None
            elif line.strip():
                yield number, offset, line


def _checked(line: bytes | None, endpoint: str, number: int) -> dict[str, Any]:
    if line is None:
        raise _BadLine("line_too_long", "the line is longer than a request may be", number)
    try:
        request = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _BadLine("invalid_json_line", f"the line is not JSON: {error}", number) from error
    if not isinstance(request, dict):
        raise _BadLine("invalid_json_line", "the line is not a JSON object", number)
    custom_id, body = request.get("custom_id"), request.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        message = f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters"
        raise _BadLine("invalid_custom_id", message, number, "custom_id")
    if request.get("method") != "POST":
        raise _BadLine("invalid_method", "method must be 'POST'", number, "method")
    if request.get("url") != endpoint:
        message = f"url must be {endpoint!r}, the batch's endpoint"
        raise _BadLine("invalid_url", message, number, "url")
    if not isinstance(body, dict):
        raise _BadLine("invalid_body", "body must be an object", number, "body")
    if not isinstance(body.get("model"), str):
        raise _BadLine("missing_model", "body.model must be a string", number, "body.model")
    if body.get("stream"):
        raise _BadLine("invalid_body", "a batch does not stream", number, "body.stream")
    if body.get("background"):
        raise _BadLine("invalid_body", "a batch is background", number, "body.background")
    return request


def _check_together(request: dict[str, Any], model: str, seen: set[str], number: int) -> None:
    custom_id = request["custom_id"]
    if custom_id in seen:
        message = f"custom_id {custom_id!r} is that of an earlier line"
        raise _BadLine("duplicate_custom_id", message, number, "custom_id")
    if model and request["body"]["model"] != model:
        message = f"body.model must be {model!r}, that of the first line"
        raise _BadLine("mismatched_model", message, number, "body.model")
