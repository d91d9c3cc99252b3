"""What `python -m snapshots` ends with. Zero to seven mean what they mean for `coldspark`."""

from enum import IntEnum

from snapshots import errors


class ExitCode(IntEnum):
    """The exit codes of every command."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAUTHORIZED = 6
    TRY_LATER = 7
    CORRUPTED = 8
    DISK_FULL = 9


EXIT_CODES = {
    ExitCode.OK: "done",
    ExitCode.FAILURE: "the source cannot be used",
    ExitCode.USAGE: "wrong options or arguments",
    ExitCode.NOT_FOUND: "no such source or snapshot",
    ExitCode.UNAUTHORIZED: "the hub wants a token",
    ExitCode.TRY_LATER: "the hub is away, the same call can work later",
    ExitCode.CORRUPTED: "a snapshot is damaged",
    ExitCode.DISK_FULL: "no room in the store or for a download",
}

_BY_ERROR: dict[type[errors.SnapshotError], ExitCode] = {
    errors.SourceNotFound: ExitCode.NOT_FOUND,
    errors.SourceGated: ExitCode.UNAUTHORIZED,
    errors.SourceUnreachable: ExitCode.TRY_LATER,
    errors.PickleRefused: ExitCode.FAILURE,
    errors.SourceInvalid: ExitCode.FAILURE,
    errors.SourceUnsupported: ExitCode.FAILURE,
    errors.TensorParallelUnsupported: ExitCode.FAILURE,
    errors.DiskFull: ExitCode.DISK_FULL,
    errors.InvalidName: ExitCode.USAGE,
    errors.SnapshotNotFound: ExitCode.NOT_FOUND,
    errors.SnapshotAmbiguous: ExitCode.USAGE,
    errors.ManifestError: ExitCode.CORRUPTED,
    errors.SnapshotCorrupted: ExitCode.CORRUPTED,
}


def exit_code_of(error: errors.SnapshotError) -> ExitCode:
    """Return the exit code of a failure."""
    return _BY_ERROR[type(error)]
