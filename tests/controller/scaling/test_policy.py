"""Pure scaling decisions."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.scaling.policy import (
    MAX_BACKOFF_S,
    backoff_s,
    is_in_window,
    needed_replicas,
    replica_floor,
)
from functions.spec import ScalingSpec, ScheduleSpec

OFFICE = ScheduleSpec(cron="0 8 * * 1-5", timezone="Europe/Berlin", duration="10h")


@pytest.mark.parametrize(
    ("load", "floor", "needed"),
    [(0, 0, 0), (1, 0, 1), (32, 0, 1), (33, 0, 2), (10_000, 0, 4), (0, 2, 2), (0, 9, 4)],
)
def test_replicas_follow_load_between_floor_and_maximum(load: int, floor: int, needed: int) -> None:
    scaling = ScalingSpec(max_replicas=4, target_concurrency=32)
    assert needed_replicas(scaling, load=load, floor=floor) == needed


@pytest.mark.parametrize(
    ("moment", "is_open"),
    [
        ("2026-11-23T06:59:59", False),  # Monday, 07:59 in Berlin
        ("2026-11-23T07:00:00", True),
        ("2026-11-23T16:59:59", True),
        ("2026-11-23T17:00:01", False),
        ("2026-11-22T09:00:00", False),  # Sunday
        ("2026-07-06T06:00:00", True),  # Monday, summer time
    ],
)
def test_a_schedule_counts_weekdays_as_cron_does_in_its_own_zone(
    moment: str, is_open: bool
) -> None:
    assert is_in_window(OFFICE, datetime.fromisoformat(moment).replace(tzinfo=UTC)) is is_open


def test_the_floor_is_the_highest_of_minimum_and_open_windows() -> None:
    monday_noon = datetime(2026, 11, 23, 11, tzinfo=UTC)
    wide = OFFICE.model_copy(update={"min_replicas": 3})
    assert replica_floor(ScalingSpec(max_replicas=4), [OFFICE, wide], monday_noon) == 3
    assert replica_floor(ScalingSpec(min_replicas=1), [], monday_noon) == 1
    assert replica_floor(ScalingSpec(), [], monday_noon) == 0


@given(st.integers(min_value=1, max_value=10_000))
def test_backoff_grows_and_is_bounded(num_failures: int) -> None:
    assert 0 < backoff_s(num_failures) <= backoff_s(num_failures + 1) <= MAX_BACKOFF_S
