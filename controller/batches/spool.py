"""The answers of a batch on disk, as they come: which requests are done is what is written here.

Every answer is one line, appended once by one writer. So a controller that starts again reads
what is done from the very file its client will get, and an answer cannot be there twice: a line
is either whole, and its request is not run again, or it was cut off, and is cut away.

Blocking; a thread's work.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One line: what was answered to one request, or why nothing was."""

    custom_id: str
    line: bytes
    is_error: bool


class Spool:
    """Both files of one batch; opened by `open`, closed by `close`.

    Attributes:
        done: The custom ids that have a line.
        num_completed: Lines of answers.
        num_failed: Lines of errors.
    """

    def __init__(self, outputs: BinaryIO, errors: BinaryIO) -> None:
        self._outputs = outputs
        self._errors = errors
        self.num_completed = 0
        self.num_failed = 0
        self.done: set[str] = set()
        self._lock = threading.Lock()  # a caller that is cancelled leaves its thread behind

    @classmethod
    def open(cls, output_path: Path, error_path: Path) -> Self:
        """Open a batch's files, new ones or those an earlier controller has left."""
        output_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        spool = cls(_open(output_path), _open(error_path))
        for custom_id in _recovered(spool._outputs):
            spool.done.add(custom_id)
            spool.num_completed += 1
        for custom_id in _recovered(spool._errors):
            spool.done.add(custom_id)
            spool.num_failed += 1
        return spool

    def append(self, answers: Sequence[Answer]) -> None:
        """Write answers; one whose request has a line already is left out."""
        with self._lock:
            for answer in answers:
                if answer.custom_id in self.done:
                    continue
                _write(self._errors if answer.is_error else self._outputs, answer.line)
                self.done.add(answer.custom_id)
                self.num_failed += answer.is_error
                self.num_completed += not answer.is_error

    def sync(self) -> None:
        """Bring everything to the disk."""
        for file in (self._outputs, self._errors):
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._outputs.close()
            self._errors.close()


def _open(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)


def _recovered(file: BinaryIO) -> Iterator[str]:
    """Yield the custom ids of whole lines; what is after the last of them is cut away."""
    end = 0
    file.seek(0)
    with os.fdopen(os.dup(file.fileno()), "rb") as reader:
        for line in reader:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            time.sleep(0)  # lets the event loop have the interpreter, which streams wait for
            yield json.loads(line)["custom_id"]
    file.truncate(end)
    file.seek(end)


def _write(file: BinaryIO, line: bytes) -> None:
    """Write a whole line; a disk that fills up in its middle leaves nothing of it."""
    start = file.tell()
    view = memoryview(line)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError:
        file.truncate(start)
        file.seek(start)
        raise
