"""How soon something that keeps dying is started again: at once, then ever later, then not."""

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60.0
MAX_DEATHS = 5  # within the window; one more and it is left dead
FIRST_DELAY_S = 0.5  # after the second death


class Restarts:
    """Counts deaths within the last WINDOW_S seconds.

    Args:
        monotonic: The clock.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._deaths: deque[float] = deque()

    def note_death(self) -> None:
        """Count a death now."""
        now = self._monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - WINDOW_S:
            self._deaths.popleft()

    @property
    def num_deaths(self) -> int:
        """Deaths within the window, as of the last one."""
        return len(self._deaths)

    @property
    def is_hopeless(self) -> bool:
        """Whether starting again is no use."""
        return self.num_deaths > MAX_DEATHS

    @property
    def delay_s(self) -> float:
        """How long to wait before the next start: 0, then doubling."""
        return 0.0 if self.num_deaths < 2 else FIRST_DELAY_S * 2.0 ** (self.num_deaths - 2)
