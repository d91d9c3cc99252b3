"""How likely a function is to be called again soon, from how often it has been called."""

import math

HALF_LIFE_S = 600.0
"""A call counts half as much after this long."""
HORIZON_S = 60.0


class CallRate:
    """An exponentially weighted rate of calls, as of a Poisson process."""

    def __init__(self) -> None:
        self._rate = 0.0  # calls a second
        self._at = 0.0

    def note(self, now: float) -> None:
        """Count a call at a monotonic second."""
        self._rate = self._decayed(now) + math.log(2) / HALF_LIFE_S
        self._at = now

    def reuse_probability(self, now: float, *, within_s: float = HORIZON_S) -> float:
        """Return how likely at least one call is within so many seconds."""
        return 1.0 - math.exp(-self._decayed(now) * within_s)

    def _decayed(self, now: float) -> float:
        return self._rate * math.exp2((self._at - now) / HALF_LIFE_S)
