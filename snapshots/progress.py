"""How a build tells how far it is."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """What a build is doing."""

    DOWNLOAD = "download"
    CONVERT = "convert"
    CHECKSUM = "checksum"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the current phase is."""

    phase: Phase
    done_bytes: int
    total_bytes: int


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """Take a report and do nothing with it."""
