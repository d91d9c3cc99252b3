"""Request bodies as JSON, read so that no input is ambiguous and none can hurt."""

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from controller.errors import InvalidRequest

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRoute(APIRoute):
    """A route whose body, if it declares one, is parsed by `parse_object`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the framework's handler behind our parser."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def parse_and_handle(request: Request) -> Response:
            return await handle(await _JsonRequest.parsed(request))

        return parse_and_handle


class _JsonRequest(Request):
    """A request whose JSON is known already."""

    _document: dict[str, Any]

    @classmethod
    async def parsed(cls, request: Request) -> "_JsonRequest":
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise InvalidRequest(
                f"the body has Content-Type {media_type[:64]!r}; send JSON as 'application/json'"
            )
        parsed = cls(request.scope, request.receive)
        parsed._document = parse_object(await parsed.body())
        return parsed

    async def json(self) -> dict[str, Any]:
        return self._document


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object, more strictly than the standard library does.

    Raises:
        InvalidRequest: Not UTF-8, not JSON, not an object, a key twice in one object, NaN or
            infinity, a number or nesting beyond reason, or half a surrogate pair.
    """
    try:
        document = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if _SURROGATE.search(body):
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise InvalidRequest("a string in the body has half a surrogate pair") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InvalidRequest(f"the body is not JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise InvalidRequest(f"the body has a number out of range: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest("the body must be a JSON object")
    return document


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # an ordered search
        raise InvalidRequest(f"the key {twice[:64]!r} appears twice in one object", param=twice)
    return keys


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"the body contains {name}, which is not JSON; send a finite number")


def _finite(text: str) -> float:
    number = float(text)
    if abs(number) == float("inf"):
        raise InvalidRequest(f"the number {text[:32]} is out of range; send a finite number")
    return number
