"""When a batch's requests run. Pure: figures in, a number of requests out.

Scale to zero and batches fit: a batch takes what room is left on replicas that are up for
interactive requests anyway, and wakes the function for itself only when its deadline nears.
"""

import math
from dataclasses import dataclass

SAFETY = 2.0
"""How much longer than expected a batch is allowed to take."""
MAX_MARGIN_S = 600.0
MARGIN_SHARE = 0.1  # of the window, if that is less
UNKNOWN_REQUEST_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What is known when a batch is looked at.

    Attributes:
        left_s: Until its deadline.
        window_s: From its creation to its deadline.
        num_left: Requests without an answer, those that run included.
        request_s: What one takes, as far as is known.
        wake_s: What it takes to wake the function; 0 if it is up.
        num_ready: Replicas that are up.
        num_others: Requests of anybody else, in flight, queued or about to be.
        num_queued: Of those, the queued ones.
        target_concurrency: Requests one replica should carry.
        max_replicas: Most replicas there may be.
    """

    left_s: float
    window_s: float
    num_left: int
    request_s: float | None
    wake_s: float
    num_ready: int
    num_others: int
    num_queued: int
    target_concurrency: int
    max_replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How many of a batch's requests may run now, and whether they may wake the function."""

    num_requests: int
    may_wake: bool


def allowance(now: Situation) -> Allowance:
    """Return what a batch may do now."""
    if is_pressing(now):
        replicas = min(max(needed_replicas(now), 1), now.max_replicas)
        return Allowance(
            num_requests=min(now.num_left, replicas * now.target_concurrency), may_wake=True
        )
    if now.num_ready == 0 or now.num_queued > 0:
        return Allowance(num_requests=0, may_wake=False)
    # Only replicas that the others keep up count, or a batch would keep up those they have left.
    kept_up = max(math.ceil(now.num_others / now.target_concurrency), 1)
    room = min(kept_up, now.num_ready) * now.target_concurrency - now.num_others
    return Allowance(num_requests=max(min(now.num_left, room), 0), may_wake=False)


def is_pressing(now: Situation) -> bool:
    """Return whether a batch must begin now, come what may, to be done in time."""
    return now.left_s <= start_before_s(now)


def start_before_s(now: Situation) -> float:
    """Return how long before its deadline a batch has to begin on one replica of its own."""
    margin_s = min(MAX_MARGIN_S, MARGIN_SHARE * now.window_s)
    return now.wake_s + SAFETY * _work_s(now) / now.target_concurrency + margin_s


def needed_replicas(now: Situation) -> int:
    """Return how many replicas it takes to be done in the time that is left."""
    usable_s = max(now.left_s - now.wake_s, 1.0)
    return math.ceil(SAFETY * _work_s(now) / (now.target_concurrency * usable_s))


def _work_s(now: Situation) -> float:
    request_s = UNKNOWN_REQUEST_S if now.request_s is None else now.request_s
    return now.num_left * request_s
