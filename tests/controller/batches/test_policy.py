from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.batches.policy import Situation, allowance, is_pressing, start_before_s

DAY_S = 86_400.0
COLD = Situation(
    left_s=DAY_S,
    window_s=DAY_S,
    num_left=1000,
    request_s=2.0,
    wake_s=5.0,
    num_ready=0,
    num_others=0,
    num_queued=0,
    target_concurrency=10,
    max_replicas=4,
)
READY = replace(COLD, num_ready=1, wake_s=0.0)


@pytest.mark.parametrize(
    ("situation", "num_requests", "may_wake"),
    [
        (COLD, 0, False),
        (READY, 10, False),
        (replace(READY, num_others=3), 7, False),
        (replace(READY, num_others=10), 0, False),
        (replace(READY, num_others=50), 0, False),
        (replace(READY, num_left=2), 2, False),
        (replace(READY, num_queued=1, num_others=1), 0, False),
        # Two replicas are up, one of them only since a moment ago for others that have left.
        (replace(READY, num_ready=2, num_others=4), 6, False),
        (replace(READY, num_ready=2, num_others=15), 5, False),
        # 1000 requests of 2 s, 10 at once: 200 s, twice that for safety, and 10 min of margin.
        (replace(COLD, left_s=1006), 0, False),
        (replace(COLD, left_s=1005), 10, True),
        (replace(READY, left_s=1000), 10, True),
        # Late: more replicas than one are needed, as many as there may be.
        (replace(COLD, left_s=205), 20, True),
        (replace(COLD, left_s=10), 40, True),
        (replace(COLD, left_s=-5, num_left=7), 7, True),
        # Nothing is known of how long a request takes: 5 s are assumed.
        (replace(COLD, request_s=None, left_s=1605), 10, True),
        (replace(COLD, request_s=None, left_s=1606), 0, False),
        # A short window has a short margin.
        (replace(COLD, window_s=100, left_s=100, num_left=1), 0, False),
        (replace(COLD, window_s=100, left_s=15, num_left=1), 1, True),
    ],
)
def test_table(situation: Situation, num_requests: int, may_wake: bool) -> None:
    allowed = allowance(situation)
    assert (allowed.num_requests, allowed.may_wake) == (num_requests, may_wake)


SITUATIONS = st.builds(
    Situation,
    left_s=st.floats(-1e4, 1e6),
    window_s=st.floats(1, 1e6),
    num_left=st.integers(1, 50_000),
    request_s=st.none() | st.floats(0, 1e4),
    wake_s=st.floats(0, 900),
    num_ready=st.integers(0, 8),
    num_others=st.integers(0, 500),
    num_queued=st.integers(0, 100),
    target_concurrency=st.integers(1, 256),
    max_replicas=st.integers(1, 8),
)


@given(SITUATIONS)
def test_never_more_than_there_is_and_never_woken_without_need(now: Situation) -> None:
    allowed = allowance(now)
    assert 0 <= allowed.num_requests <= now.num_left
    assert allowed.may_wake == is_pressing(now)
    if not allowed.may_wake and allowed.num_requests:
        assert now.num_ready > 0
        assert now.num_queued == 0
        assert allowed.num_requests + now.num_others <= now.num_ready * now.target_concurrency
    if allowed.may_wake:
        assert allowed.num_requests > 0


@given(SITUATIONS, st.floats(1, 1e5))
def test_less_time_never_means_less_haste(now: Situation, seconds: float) -> None:
    later = replace(now, left_s=now.left_s - seconds)
    assert is_pressing(later) >= is_pressing(now)
    assert start_before_s(later) == start_before_s(now)
