from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from controller.ledger.intervals import (
    DAY_US,
    HOUR_US,
    WHOLE_PPM,
    Claim,
    DeviceTimeline,
    Interval,
    LedgerState,
)
from controller.ledger.merging import merge, split

RATE = Decimal("2.50")
START_US = 20_000 * DAY_US + 5 * HOUR_US
S = LedgerState


def one(replica: str | None, state: LedgerState, start: int, end: int, share: int) -> Interval:
    return Interval(
        device="gpu",
        function=replica and "smol",
        replica_id=replica,
        state=state,
        start_us=START_US + start,
        end_us=START_US + end,
        share_ppm=share,
        rate_usd_per_hour=RATE,
    )


def sums(intervals: Iterable[Interval]) -> Counter[tuple[object, ...]]:
    """Device time by everything a cost report can ask for."""
    counter: Counter[tuple[object, ...]] = Counter()
    for interval in intervals:
        assert interval.end_us is not None
        key = (
            interval.device,
            interval.function,
            interval.replica_id,
            interval.state,
            interval.rate_usd_per_hour,
        )
        counter[key] += (interval.end_us - interval.start_us) * interval.share_ppm
    return counter


def assert_gap_free(intervals: Sequence[Interval], start_us: int, end_us: int) -> None:
    """At every moment of [start_us, end_us) the shares of the one device add up to one."""
    changes: Counter[int] = Counter()
    for interval in intervals:
        assert interval.end_us is not None
        assert interval.start_us < interval.end_us
        changes[interval.start_us] += interval.share_ppm
        changes[interval.end_us] -= interval.share_ppm
    level, moments = 0, sorted(changes)
    assert (moments[0], moments[-1]) == (start_us, end_us)
    for moment in moments[:-1]:
        level += changes[moment]
        assert level == WHOLE_PPM


def test_states_of_one_replica_are_gathered() -> None:
    fine = [
        one("r1", S.ACTIVE if index % 2 else S.IDLE, index * 10, index * 10 + 10, WHOLE_PPM)
        for index in range(6)
    ]
    assert merge(fine) == [
        one("r1", S.IDLE, 0, 30, WHOLE_PPM),
        one("r1", S.ACTIVE, 30, 60, WHOLE_PPM),
    ]


def test_sharing_replicas_keep_their_own_states() -> None:
    fine = [
        one("r1", S.IDLE, 0, 10, 500_000),
        one("r1", S.ACTIVE, 10, 20, 500_000),
        one("r1", S.IDLE, 20, 40, 500_000),
        one("r2", S.ACTIVE, 0, 15, 500_000),
        one("r2", S.IDLE, 15, 25, 500_000),
        one("r2", S.ACTIVE, 25, 40, 500_000),
    ]
    merged = merge(fine)
    assert sums(merged) == sums(fine)
    assert len(merged) == 4
    assert_gap_free(merged, START_US, START_US + 40)


def test_nothing_moves_across_an_hour() -> None:
    fine = [
        one("r1", S.IDLE, 0, HOUR_US, WHOLE_PPM),
        one("r1", S.IDLE, HOUR_US, 2 * HOUR_US, WHOLE_PPM),
    ]
    assert merge(fine) == fine
    assert merge(fine, stretch_us=DAY_US) == [one("r1", S.IDLE, 0, 2 * HOUR_US, WHOLE_PPM)]


def test_stretch_with_a_hole_is_left_alone() -> None:
    fine = [
        one("r1", S.IDLE, 0, 10, WHOLE_PPM),
        one("r1", S.ACTIVE, 10, 20, WHOLE_PPM),
        one("r1", S.IDLE, 30, 40, WHOLE_PPM),
    ]
    assert merge(fine) == fine


def test_stretch_that_is_only_told_in_part_is_left_alone() -> None:
    fine = [
        one("r1", S.IDLE, 0, 10, 500_000),
        one("r1", S.ACTIVE, 10, 20, 500_000),
        one("r1", S.IDLE, 20, 30, 500_000),
    ]
    assert merge(fine) == fine


def test_nothing_merges_to_nothing() -> None:
    assert merge([]) == []


def test_split_divides_what_crosses_the_moment() -> None:
    before, after = split(
        [
            one("r1", S.IDLE, 0, 10, WHOLE_PPM),
            one("r1", S.ACTIVE, 10, 30, WHOLE_PPM),
            one("r1", S.IDLE, 30, 40, WHOLE_PPM),
        ],
        START_US + 20,
    )
    assert before == [one("r1", S.IDLE, 0, 10, WHOLE_PPM), one("r1", S.ACTIVE, 10, 20, WHOLE_PPM)]
    assert after == [one("r1", S.ACTIVE, 20, 30, WHOLE_PPM), one("r1", S.IDLE, 30, 40, WHOLE_PPM)]


CLAIMS = st.tuples(
    st.integers(1, HOUR_US // 3),
    st.sampled_from(["r1", "r2", "r3"]),
    st.sampled_from([S.LOADING, S.ACTIVE, S.IDLE, S.PARKED, None]),
)


@given(st.lists(CLAIMS, max_size=40))
def test_merging_keeps_every_sum_and_leaves_no_gap(
    steps: list[tuple[int, str, LedgerState | None]],
) -> None:
    line = DeviceTimeline("gpu", rate_usd_per_hour=RATE, start_us=START_US)
    at_us, fine = START_US, []
    for duration_us, replica_id, state in steps:
        at_us += duration_us
        if state is None:
            fine += line.drop_claim(replica_id, at_us)
        else:
            claim = Claim(
                replica_id=replica_id, function="smol", state=state, rate_usd_per_hour=RATE
            )
            fine += line.set_claim(claim, at_us)
    fine += line.cut(at_us + 1)
    for stretch_us in (HOUR_US, DAY_US):
        merged = merge(fine, stretch_us=stretch_us)
        assert sums(merged) == sums(fine)
        assert len(merged) <= len(fine)
        assert_gap_free(merged, START_US, at_us + 1)
        assert sorted(map(repr, merge(merged, stretch_us=stretch_us))) == sorted(map(repr, merged))
