"""Uploads as multipart/form-data, a piece at a time; no file is ever whole in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from controller.errors import InvalidRequest, RequestTimedOut

MAX_FIELD_BYTES = 4096
MAX_FIELDS = 16
FILE_FIELD = "file"


class FileSink(Protocol):
    """Where the file's bytes go."""

    async def write(self, piece: bytes) -> None:
        """Take the next bytes, or raise that there are too many."""


@dataclass(slots=True)
class Form:
    """What a form holds beside its file.

    Attributes:
        fields: The text fields.
        filename: The file's name, as the client calls it; None while there was no file.
    """

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def read_form(request: Request, sink: FileSink, *, timeout_s: float) -> Form:
    """Read a form with one file, whose bytes go to the sink as they come.

    Args:
        request: Its body is unread.
        sink: For the file.
        timeout_s: Longest silence.

    Raises:
        InvalidRequest: It is no such form.
        RequestTimedOut: The client went silent.
        ClientDisconnect: The client left.
    """
    reader = _FormReader(_boundary(request))
    async for piece in _pieces(request, timeout_s):
        for data in reader.feed(piece):
            await sink.write(data)
    return reader.finish()


async def _pieces(request: Request, timeout_s: float) -> AsyncIterator[bytes]:
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                piece = await anext(stream)
        except TimeoutError as error:
            raise RequestTimedOut(
                f"nothing of the upload came for {timeout_s:g} s; send it faster"
            ) from error
        except StopAsyncIteration:
            return
        yield piece


def _boundary(request: Request) -> bytes:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise InvalidRequest(
            f"the body has Content-Encoding {encoding[:64]!r}; send it uncompressed"
        )
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if media_type != b"multipart/form-data" or not 1 <= len(boundary) <= 70:
        raise InvalidRequest("send the file as multipart/form-data with a boundary")
    return boundary


class _FormReader:
    """Turns the parser's callbacks into fields and pieces of the file."""

    def __init__(self, boundary: bytes) -> None:
        self._form = Form()
        self._header = (bytearray(), bytearray())
        self._name = ""
        self._value = bytearray()
        self._file_data: list[bytes] = []
        self._is_file = False
        self._is_complete = False
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._take,
            "on_part_end": self._end,
            "on_end": self._complete,
        }
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]  # a TypedDict

    def feed(self, piece: bytes) -> list[bytes]:
        """Take a piece of the body; return what of it belongs to the file."""
        try:
            self._parser.write(piece)
        except MultipartParseError as error:
            raise InvalidRequest(f"the form cannot be read: {error}") from error
        data, self._file_data = self._file_data, []
        return data

    def finish(self) -> Form:
        """Return the form."""
        if not self._is_complete:
            raise InvalidRequest("the form ends before its last boundary; was it cut off?")
        if self._form.filename is None:
            raise InvalidRequest("file: required", param=FILE_FIELD)
        return self._form

    def _begin(self) -> None:
        self._name, self._is_file = "", False
        self._value.clear()

    def _end_header(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            _, options = parse_options_header(bytes(value))
            self._name = _text(options.get(b"name", b""))
            if b"filename" in options:
                if self._name != FILE_FIELD or self._form.filename is not None:
                    raise InvalidRequest(
                        f"{self._name[:64]}: send one file, as the field 'file'", param=self._name
                    )
                self._is_file = True
                self._form.filename = _text(options[b"filename"])
        name.clear()
        value.clear()

    def _end_headers(self) -> None:
        if not self._name:
            raise InvalidRequest("a part of the form has no name")
        if not self._is_file and self._name == FILE_FIELD:
            raise InvalidRequest("file: must have a file name", param=FILE_FIELD)
        if len(self._form.fields) >= MAX_FIELDS:
            raise InvalidRequest(f"the form has more than {MAX_FIELDS} fields")

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._file_data.append(data[start:end])
            return
        self._value.extend(data[start:end])
        if len(self._value) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"{self._name[:64]}: is longer than {MAX_FIELD_BYTES} bytes")

    def _end(self) -> None:
        if self._is_file:
            return
        if self._name in self._form.fields:
            raise InvalidRequest(f"{self._name[:64]}: appears twice", param=self._name[:64])
        self._form.fields[self._name] = _text(bytes(self._value))

    def _complete(self) -> None:
        self._is_complete = True


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the form is not UTF-8: {data[:64]!r}") from error


__all__ = ["ClientDisconnect", "FileSink", "Form", "read_form"]
