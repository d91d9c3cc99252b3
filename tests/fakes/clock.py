"""Time that moves only when a test says so."""

from datetime import UTC, datetime, timedelta

START = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


class FakeClock:
    """Both clocks of `controller.clock.Clock`, kept in whole microseconds."""

    def __init__(self, start: datetime = START) -> None:
        self._start = start
        self._elapsed_us = 0
        self._jumped_us = 0

    def monotonic(self) -> float:
        return self._elapsed_us / 1e6

    def now(self) -> datetime:
        return self._start + timedelta(microseconds=self._elapsed_us + self._jumped_us)

    def advance(self, seconds: float) -> None:
        """Let time pass, on both clocks."""
        assert seconds >= 0
        self._elapsed_us += round(seconds * 1e6)

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward, or back for a negative number; no time passes."""
        self._jumped_us += round(seconds * 1e6)
