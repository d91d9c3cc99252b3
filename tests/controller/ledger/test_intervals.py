from decimal import Decimal

import pytest

from controller.ledger.intervals import (
    DAY_US,
    HOUR_US,
    WHOLE_PPM,
    AdoptedClaim,
    Claim,
    DeviceTimeline,
    Interval,
    LedgerState,
    close_all,
    fill,
)

RATE = Decimal("2.50")
IDLE_RATE = Decimal("1.00")
NOON_US = 20_000 * DAY_US + 12 * HOUR_US
S = LedgerState


def claim(replica_id: str, state: LedgerState, rate: Decimal = RATE) -> Claim:
    return Claim(replica_id=replica_id, function="smol", state=state, rate_usd_per_hour=rate)


def timeline(start_us: int = NOON_US) -> DeviceTimeline:
    return DeviceTimeline("gpu", rate_usd_per_hour=IDLE_RATE, start_us=start_us)


def shares(line: DeviceTimeline) -> dict[str | None, tuple[LedgerState, int]]:
    return {one.replica_id: (one.state, one.share_ppm) for one in line.open_intervals}


def spans(intervals: list[Interval]) -> list[tuple[str | None, LedgerState, int, int | None]]:
    return [(one.replica_id, one.state, one.start_us, one.end_us) for one in intervals]


def test_unclaimed_device_is_unallocated_at_its_own_rate() -> None:
    (interval,) = timeline().open_intervals
    assert (interval.function, interval.replica_id) == (None, None)
    assert (interval.state, interval.share_ppm) == (S.UNALLOCATED, WHOLE_PPM)
    assert interval.rate_usd_per_hour == IDLE_RATE


def test_claim_closes_unallocated_time_and_opens_its_own() -> None:
    line = timeline()
    closed = line.set_claim(claim("r1", S.LOADING), NOON_US + 7)
    assert spans(closed) == [(None, S.UNALLOCATED, NOON_US, NOON_US + 7)]
    assert shares(line) == {"r1": (S.LOADING, WHOLE_PPM)}
    assert line.open_intervals[0].rate_usd_per_hour == RATE


def test_same_claim_again_closes_nothing() -> None:
    line = timeline()
    line.set_claim(claim("r1", S.ACTIVE), NOON_US + 1)
    assert line.set_claim(claim("r1", S.ACTIVE), NOON_US + 2) == []


def test_holders_share_equally_and_the_first_takes_the_remainder() -> None:
    line = timeline()
    for replica_id in ("r1", "r2", "r3"):
        line.set_claim(claim(replica_id, S.ACTIVE), NOON_US)
    assert [one.share_ppm for one in line.open_intervals] == [333_334, 333_333, 333_333]


def test_parked_replica_takes_no_share_from_a_holder() -> None:
    line = timeline()
    line.set_claim(claim("r1", S.PARKED), NOON_US)
    line.set_claim(claim("r2", S.IDLE), NOON_US + 1)
    assert shares(line) == {"r2": (S.IDLE, WHOLE_PPM)}


def test_parked_replicas_share_what_nobody_holds() -> None:
    line = timeline()
    line.set_claim(claim("r1", S.PARKED), NOON_US)
    line.set_claim(claim("r2", S.PARKED), NOON_US)
    assert shares(line) == {"r1": (S.PARKED, 500_000), "r2": (S.PARKED, 500_000)}


def test_state_change_of_one_replica_leaves_the_others_open() -> None:
    line = timeline()
    line.set_claim(claim("r1", S.IDLE), NOON_US)
    line.set_claim(claim("r2", S.IDLE), NOON_US)
    closed = line.set_claim(claim("r2", S.ACTIVE), NOON_US + 5)
    assert spans(closed) == [("r2", S.IDLE, NOON_US, NOON_US + 5)]


def test_new_rate_begins_a_new_interval() -> None:
    line = timeline()
    line.set_claim(claim("r1", S.IDLE), NOON_US)
    (closed,) = line.set_claim(claim("r1", S.IDLE, Decimal(3)), NOON_US + 5)
    assert closed.rate_usd_per_hour == RATE
    assert line.open_intervals[0].rate_usd_per_hour == 3


def test_interval_without_length_vanishes() -> None:
    assert timeline().set_claim(claim("r1", S.LOADING), NOON_US) == []


def test_dropping_an_unknown_claim_changes_nothing() -> None:
    assert timeline().drop_claim("r1", NOON_US + 5) == []


def test_dropped_claim_frees_the_device() -> None:
    line = timeline()
    line.set_claim(claim("r1", S.DRAINING), NOON_US)
    assert spans(line.drop_claim("r1", NOON_US + 5)) == [("r1", S.DRAINING, NOON_US, NOON_US + 5)]
    assert shares(line) == {None: (S.UNALLOCATED, WHOLE_PPM)}


def test_closed_intervals_are_split_at_midnight_and_every_hour() -> None:
    start_us = NOON_US + 11 * HOUR_US + HOUR_US // 2
    midnight_us = NOON_US + 12 * HOUR_US
    closed = timeline(start_us).cut(midnight_us + HOUR_US + 5)
    assert [(one.start_us, one.end_us) for one in closed] == [
        (start_us, midnight_us),
        (midnight_us, midnight_us + HOUR_US),
        (midnight_us + HOUR_US, midnight_us + HOUR_US + 5),
    ]


def test_cut_goes_on_with_the_same_claims() -> None:
    line = timeline()
    line.set_claim(claim("r1", S.ACTIVE), NOON_US)
    line.cut(NOON_US + 9)
    assert spans(list(line.open_intervals)) == [("r1", S.ACTIVE, NOON_US + 9, None)]


def test_roll_closes_at_the_hour_and_only_what_began_before_it() -> None:
    line = timeline(NOON_US - 10)
    assert spans(line.roll(NOON_US + 3)) == [(None, S.UNALLOCATED, NOON_US - 10, NOON_US)]
    assert line.roll(NOON_US + 4) == []
    assert line.open_intervals[0].start_us == NOON_US


def test_close_all_drops_what_began_at_the_end() -> None:
    line = timeline()
    assert close_all(line.open_intervals, NOON_US) == []
    assert spans(close_all(line.open_intervals, NOON_US + 1)) == [
        (None, S.UNALLOCATED, NOON_US, NOON_US + 1)
    ]


def adopted(state: LedgerState, last_active_us: int | None = None) -> AdoptedClaim:
    return AdoptedClaim(
        function="smol",
        devices=["gpu"],
        state=state,
        rate_usd_per_hour=RATE,
        last_active_us=last_active_us,
    )


def filled(found: dict[str, AdoptedClaim], length_us: int = 100) -> list[Interval]:
    return fill(
        "gpu",
        rate_usd_per_hour=IDLE_RATE,
        start_us=NOON_US,
        end_us=NOON_US + length_us,
        adopted=found,
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, [(None, S.UNALLOCATED, 0, 100)]),
        ({"r1": adopted(S.PARKED)}, [("r1", S.PARKED, 0, 100)]),
        ({"r1": adopted(S.IDLE)}, [("r1", S.IDLE, 0, 100)]),
        ({"r1": adopted(S.IDLE, NOON_US - 5)}, [("r1", S.IDLE, 0, 100)]),
        (
            {"r1": adopted(S.IDLE, NOON_US + 30)},
            [("r1", S.ACTIVE, 0, 30), ("r1", S.IDLE, 30, 100)],
        ),
        ({"r1": adopted(S.ACTIVE, NOON_US + 500)}, [("r1", S.ACTIVE, 0, 100)]),
        ({"r1": adopted(S.PARKED, NOON_US + 30)}, [("r1", S.PARKED, 0, 100)]),
    ],
)
def test_downtime_is_filled_with_what_the_adopted_did(
    found: dict[str, AdoptedClaim],
    expected: list[tuple[str | None, LedgerState, int, int]],
) -> None:
    told = [
        (name, state, a - NOON_US, (b or 0) - NOON_US) for name, state, a, b in spans(filled(found))
    ]
    assert told == expected


def test_adopted_replica_of_another_device_fills_nothing() -> None:
    elsewhere = AdoptedClaim(
        function="smol", devices=["other"], state=S.IDLE, rate_usd_per_hour=RATE
    )
    assert [one.state for one in filled({"r1": elsewhere})] == [S.UNALLOCATED]


def test_filling_no_time_gives_nothing() -> None:
    assert filled({"r1": adopted(S.IDLE)}, length_us=0) == []
