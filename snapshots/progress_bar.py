"""The progress of a build as bars on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as ProgressBar

from snapshots.progress import OnProgress, Progress


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """Draw one bar per phase for the length of a block."""
    with ProgressBar(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        yield _BarReporter(bar)


class _BarReporter:
    """Moves the bar of the phase it is told of."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.phase not in self._tasks:
            self._tasks[progress.phase] = self._bar.add_task(progress.phase, total=None)
        self._bar.update(
            self._tasks[progress.phase],
            completed=progress.done_bytes,
            total=progress.total_bytes,
        )
