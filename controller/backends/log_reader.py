"""Reads what log_writer keeps: the last lines, then new ones, across the log's replacement."""

import os
from pathlib import Path
from typing import BinaryIO

from controller.backends.lines import LineSplitter


class LogReader:
    """One reader of one log. Every method blocks on the disk: call it off the event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._splitter = LineSplitter()

    def tail(self, num_lines: int, *, is_over: bool) -> list[str]:
        """Return the last lines, and go on from there.

        Args:
            num_lines: At most so many.
            is_over: Whether nothing more will be read: a line without an end is one then, too.
        """
        lines = self.rest() if is_over else self.new_lines()
        if len(lines) < num_lines:
            lines = self._previous_lines() + lines
        return lines[max(0, len(lines) - num_lines) :]

    def new_lines(self) -> list[str]:
        """Return the lines that have ended since the last call."""
        lines = self._splitter.feed(self._read())
        if self._is_replaced():
            lines += self._splitter.feed(self._read())
            self.close()
            lines += self._splitter.feed(self._read())
        return lines

    def rest(self) -> list[str]:
        """Return the lines since the last call and the one that never ended, if there is one."""
        return self.new_lines() + self._splitter.rest()

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
        return LineSplitter().feed(data)
