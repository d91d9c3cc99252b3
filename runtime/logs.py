"""Structured logs of every runtime process: JSON lines on stderr, never prompts or outputs."""

import contextlib
import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

import structlog


def configure_logs(level: str, **context: str) -> None:
    """Send log lines to stderr.

    Args:
        level: Name of the lowest level that is written, as in `logging`.
        **context: Fields put on every line of this process.
    """

    def add_context(
        _logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        return {**context, **event}

    structlog.configure(
        processors=[
            add_context,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, LossyStderr())),
    )


class LossyStderr:
    """A stream that drops what cannot be written: a lost line must not end what is logged."""

    def write(self, text: str) -> None:
        """Write to what is stderr now."""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Flush what is stderr now."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()
