"""What a command can fail with, and the exit code of each.

CliError                 1  the operation failed
├── UsageProblem         2  options, arguments or settings are wrong
├── NotFoundProblem      3  no function, key or page of this name
├── Unreachable          4  nothing answers at the controller's address
├── SpecProblem          5  a function spec is not valid
├── KeyRefused           6  the API key is missing, wrong, expired or revoked
└── TryLater             7  the controller cannot do it now; the same call can work later
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of every command."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 4
    INVALID_SPEC = 5
    UNAUTHORIZED = 6
    TRY_LATER = 7
    INTERRUPTED = 130


EXIT_CODES = {
    ExitCode.OK: "done",
    ExitCode.FAILURE: "the operation failed",
    ExitCode.USAGE: "wrong options, arguments or settings",
    ExitCode.NOT_FOUND: "no function or key of this name",
    ExitCode.UNREACHABLE: "no controller answers",
    ExitCode.INVALID_SPEC: "a function spec is not valid",
    ExitCode.UNAUTHORIZED: "the API key is missing or not accepted",
    ExitCode.TRY_LATER: "not possible now, the same call can work later",
    ExitCode.INTERRUPTED: "interrupted",
}


class CliError(Exception):
    """A failure to tell the user about.

    Args:
        message: What failed, with the value.
        hint: What to do about it.
    """

    exit_code = ExitCode.FAILURE

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageProblem(CliError):
    """Options, arguments or settings are wrong."""

    exit_code = ExitCode.USAGE


class NotFoundProblem(CliError):
    """No function, key or page of this name."""

    exit_code = ExitCode.NOT_FOUND


class Unreachable(CliError):
    """Nothing answers at the controller's address."""

    exit_code = ExitCode.UNREACHABLE


class SpecProblem(CliError):
    """A function spec is not valid."""

    exit_code = ExitCode.INVALID_SPEC


class KeyRefused(CliError):
    """The API key is missing, wrong, expired or revoked."""

    exit_code = ExitCode.UNAUTHORIZED


class TryLater(CliError):
    """The controller cannot do it now; the same call can work later."""

    exit_code = ExitCode.TRY_LATER
