"""Reads what log_writer keeps: the last lines, then new ones, across the log's replacement."""

import os
from pathlib import Path
from typing import BinaryIO

from controller.backends.log_writer import MAX_LINE_BYTES


class LogReader:
    """One reader of one log. Every method blocks on the disk: call it off the event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._begun = b""

    def tail(self, num_lines: int) -> list[str]:
        """Return the last lines, but for one that has no end yet, and go on from there."""
        lines = self.new_lines()
        if len(lines) < num_lines:
            lines = self._previous_lines() + lines
        return lines[max(0, len(lines) - num_lines) :]

    def new_lines(self) -> list[str]:
        """Return the lines that have ended since the last call."""
        data = self._begun + self._read()
        if self._is_replaced():
            self.close()
            data += self._read()
        *lines, self._begun = data.split(b"\n")
        return [text_of(line) for line in lines]

    def rest(self) -> list[str]:
        """Return the lines since the last call and the one that never ended, if there is one."""
        lines = self.new_lines()
        begun, self._begun = self._begun, b""
        return [*lines, text_of(begun)] if begun else lines

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> bytes:
        if self._file is None:
            try:
                self._file = self._path.open("rb")
            except FileNotFoundError:
                return b""
        return self._file.read()

    def _is_replaced(self) -> bool:
        """Whether the file we read is no longer the log; it will then grow no more."""
        if self._file is None:
            return False
        try:
            return self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return False

    def _previous_lines(self) -> list[str]:
        try:
            data = self._path.with_name(f"{self._path.name}.1").read_bytes()
        except FileNotFoundError:
            return []
        return [text_of(line) for line in data.split(b"\n")[:-1]]


def text_of(line: bytes) -> str:
    """Return one line, without its end, as text of bounded length."""
    return line[:MAX_LINE_BYTES].decode(errors="replace").rstrip("\r")
