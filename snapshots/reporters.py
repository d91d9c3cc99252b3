"""How the command line shows the progress of a build: a bar, JSON lines, or nothing."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum

import typer

from snapshots.progress import OnProgress, Progress, ignore_progress

JSON_INTERVAL_S = 0.1


class ProgressStyle(StrEnum):
    """How progress is shown."""

    BAR = "bar"
    JSON = "json"
    NONE = "none"


@contextmanager
def reporter(style: ProgressStyle) -> Iterator[OnProgress]:
    """Show progress for the length of a block."""
    if style is ProgressStyle.BAR:
        from snapshots.progress_bar import progress_bar  # imports rich

        with progress_bar() as on_progress:
            yield on_progress
    elif style is ProgressStyle.JSON:
        yield _JsonReporter(time.monotonic)
    else:
        yield ignore_progress


class _JsonReporter:
    """Prints a line on stdout at each phase's start and end, and now and then between."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._phase = ""
        self._next_s = 0.0

    def __call__(self, progress: Progress) -> None:
        is_edge = progress.phase != self._phase or progress.done_bytes == progress.total_bytes
        if not is_edge and self._monotonic() < self._next_s:
            return
        self._phase = progress.phase
        self._next_s = self._monotonic() + JSON_INTERVAL_S
        print_event("progress", **asdict(progress))


def print_event(event: str, **fields: object) -> None:
    """Print one JSON line at once."""
    typer.echo(json.dumps({"event": event, **fields}))
