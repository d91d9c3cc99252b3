import asyncio
import contextlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from decimal import Decimal

import pytest

from controller.clock import unix_us
from controller.ledger.intervals import AdoptedClaim, Interval, LedgerState
from controller.ledger.ledger import Ledger, UnknownDevice
from controller.ledger.report import GroupBy
from controller.store.errors import DatabaseUnavailable
from tests.fakes.books import Failure, FakeBooks
from tests.fakes.clock import START, FakeClock

RATE = Decimal("2.50")
DEVICES = {"gpu0": Decimal(2), "gpu1": Decimal(2)}
START_US = unix_us(START)
S = LedgerState


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def books() -> FakeBooks:
    return FakeBooks()


async def opened(
    clock: FakeClock,
    books: FakeBooks,
    adopted: Mapping[str, AdoptedClaim] | None = None,
    *,
    max_pending: int = 1000,
) -> Ledger:
    ledger = Ledger(devices=DEVICES, clock=clock, repository=books, max_pending=max_pending)
    await ledger.recover(adopted or {})
    return ledger


def claim(
    ledger: Ledger, state: LedgerState, *devices: str, replica: str = "r1", function: str = "smol"
) -> None:
    ledger.set_claim(
        replica,
        function=function,
        devices=devices or ("gpu0",),
        state=state,
        rate_usd_per_hour=RATE,
    )


async def seconds(ledger: Ledger, since: datetime = START) -> dict[tuple[str | None, str], float]:
    report = await ledger.cost(since=since)
    return {
        (row.group, str(state)): round(float(time), 3)
        for row in report.rows
        for state, time in row.seconds.items()
        if time >= Decimal("0.001")
    }


async def test_time_is_counted_in_the_state_it_was_spent_in(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books)
    clock.advance(10)
    claim(ledger, S.LOADING)
    clock.advance(3)
    claim(ledger, S.ACTIVE)
    clock.advance(20)
    claim(ledger, S.IDLE)
    clock.advance(7)
    ledger.drop_claim("r1")
    clock.advance(5)
    assert await seconds(ledger) == {
        ("smol", "loading"): 3,
        ("smol", "active"): 20,
        ("smol", "idle"): 7,
        (None, "unallocated"): 10 + 5 + 45,
    }


async def test_what_goes_on_counts_up_to_now(clock: FakeClock, books: FakeBooks) -> None:
    ledger = await opened(clock, books)
    claim(ledger, S.ACTIVE)
    clock.advance(4)
    assert (await seconds(ledger))["smol", "active"] == 4
    clock.advance(2)
    assert (await seconds(ledger))["smol", "active"] == 6


async def test_replica_on_two_devices_costs_both(clock: FakeClock, books: FakeBooks) -> None:
    ledger = await opened(clock, books)
    claim(ledger, S.ACTIVE, "gpu0", "gpu1")
    clock.advance(3600)
    assert (await ledger.cost(since=START)).total.cost_usd == 5


async def test_replica_that_moves_leaves_its_old_devices(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books)
    claim(ledger, S.ACTIVE, "gpu0", "gpu1")
    claim(ledger, S.ACTIVE, "gpu1")
    clock.advance(10)
    assert await seconds(ledger) == {("smol", "active"): 10, (None, "unallocated"): 10}


async def test_unknown_device_is_refused_and_nothing_changes(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books)
    with pytest.raises(UnknownDevice, match="no device 'gpu9'; this node has"):
        claim(ledger, S.ACTIVE, "gpu0", "gpu9")
    clock.advance(1)
    assert await seconds(ledger) == {(None, "unallocated"): 2}


async def test_unallocated_is_no_claim(clock: FakeClock, books: FakeBooks) -> None:
    ledger = await opened(clock, books)
    with pytest.raises(AssertionError):
        claim(ledger, S.UNALLOCATED)


async def test_dropping_an_unknown_replica_is_harmless(clock: FakeClock, books: FakeBooks) -> None:
    (await opened(clock, books)).drop_claim("nobody")


async def test_nothing_is_written_before_recovery(clock: FakeClock, books: FakeBooks) -> None:
    ledger = Ledger(devices=DEVICES, clock=clock, repository=books)
    clock.advance(1)
    await ledger.flush()
    assert books.heartbeat_us is None
    assert (await ledger.cost(since=START)).rows == ()


async def test_recovery_after_a_claim_is_a_defect(clock: FakeClock, books: FakeBooks) -> None:
    ledger = await opened(clock, books)
    claim(ledger, S.ACTIVE)
    with pytest.raises(AssertionError):
        await ledger.recover({})


@pytest.mark.parametrize("num_flushes", [0, 1, 2])
async def test_all_time_is_told_once(num_flushes: int, clock: FakeClock, books: FakeBooks) -> None:
    told: list[Interval] = []
    ledger = Ledger(
        devices={"gpu0": RATE}, clock=clock, repository=books, on_spent=told.append, max_pending=2
    )
    await ledger.recover({})
    for _ in range(5):
        clock.advance(1)
        claim(ledger, S.ACTIVE)
        clock.advance(1)
        for _ in range(num_flushes):
            await ledger.flush()
        claim(ledger, S.IDLE)
    ledger.drop_claim("r1")
    lengths = [(one.state, (one.end_us or 0) - one.start_us) for one in told]
    assert sum(length for state, length in lengths if state is S.ACTIVE) == 5_000_000
    assert sum(length for _, length in lengths) == 10_000_000


@pytest.mark.parametrize("failure", [None, Failure.BEFORE])
async def test_time_that_goes_on_is_told_at_each_flush(
    clock: FakeClock, books: FakeBooks, failure: Failure | None
) -> None:
    told: list[Interval] = []
    ledger = Ledger(devices={"gpu0": RATE}, clock=clock, repository=books, on_spent=told.append)
    await ledger.recover({})
    claim(ledger, S.ACTIVE)
    books.failure = failure
    for _ in range(3):
        clock.advance(1)
        with contextlib.suppress(DatabaseUnavailable):
            await ledger.flush()
        (second,) = told
        assert (second.end_us or 0) - second.start_us == 1_000_000
        told.clear()


async def test_jump_of_the_wall_clock_neither_loses_nor_invents_time(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books)
    claim(ledger, S.ACTIVE)
    for jump_s in (86_400, -2 * 86_400, 3600):
        clock.jump_wall(jump_s)
        clock.advance(1)
        await ledger.flush()
    assert (await seconds(ledger))["smol", "active"] == 3


async def test_crash_ends_open_time_at_the_last_heartbeat(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books)
    claim(ledger, S.ACTIVE)
    clock.advance(10)
    await ledger.flush()
    clock.advance(5)  # the controller dies without a word
    restarted = await opened(clock, books)
    clock.advance(1)
    told = await seconds(restarted)
    assert told["smol", "active"] == 10
    assert told[None, "unallocated"] == 10 + 2 * 6


async def test_adopted_replica_holds_its_device_while_no_controller_ran(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books)
    claim(ledger, S.ACTIVE)
    clock.advance(10)
    await ledger.flush()
    clock.advance(60)
    adopted = AdoptedClaim(
        function="smol",
        devices=["gpu0"],
        state=S.IDLE,
        rate_usd_per_hour=RATE,
        last_active_us=START_US + 25_000_000,
    )
    restarted = await opened(clock, books, {"r1": adopted})
    clock.advance(30)
    told = await seconds(restarted)
    assert told["smol", "active"] == 25
    assert told["smol", "idle"] == 45 + 30


async def test_adopted_parked_replica_stays_parked(clock: FakeClock, books: FakeBooks) -> None:
    ledger = await opened(clock, books)
    claim(ledger, S.PARKED)
    await ledger.flush()
    clock.advance(60)
    adopted = AdoptedClaim(
        function="smol", devices=["gpu0"], state=S.PARKED, rate_usd_per_hour=RATE
    )
    restarted = await opened(clock, books, {"r1": adopted})
    assert (await seconds(restarted))["smol", "parked"] == 60


async def test_clock_that_went_back_overlaps_nothing_at_recovery(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books)
    claim(ledger, S.ACTIVE)
    clock.advance(100)
    await ledger.flush()
    clock.jump_wall(-3600)
    restarted = await opened(clock, books)
    claim(restarted, S.IDLE)
    clock.advance(10)
    told = await seconds(restarted)
    assert (told["smol", "active"], told["smol", "idle"]) == (100, 10)
    assert restarted.now_us() >= START_US + 110_000_000


async def test_device_that_is_gone_is_closed_and_a_new_one_begins_now(
    clock: FakeClock, books: FakeBooks
) -> None:
    first = Ledger(devices={"old": RATE}, clock=clock, repository=books)
    await first.recover({})
    clock.advance(5)
    await first.flush()
    clock.advance(5)
    second = Ledger(devices={"new": RATE}, clock=clock, repository=books)
    await second.recover({})
    clock.advance(2)
    report = await second.cost(since=START, by=GroupBy.DEVICE)
    told = {row.group: round(float(row.seconds[S.UNALLOCATED]), 3) for row in report.rows}
    assert told == {"old": 5, "new": 2}


async def test_failed_write_keeps_everything_for_the_next(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books)
    for failure in (Failure.BEFORE, Failure.AFTER):
        books.failure = failure
        claim(ledger, S.ACTIVE)
        clock.advance(2)
        claim(ledger, S.IDLE)
        clock.advance(1)
        with pytest.raises(DatabaseUnavailable):
            await ledger.flush()
    books.failure = None
    told = await seconds(ledger)
    assert (told["smol", "active"], told["smol", "idle"]) == (4, 2)


async def test_cancelled_write_is_repeated_without_counting_twice(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books)
    claim(ledger, S.ACTIVE)
    clock.advance(2)
    claim(ledger, S.IDLE)
    books.failure = Failure.HANGS
    writing = asyncio.create_task(ledger.flush())
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    books.failure = None
    assert (await seconds(ledger))["smol", "active"] == 2


@pytest.mark.parametrize("since_s", [0, 5, 20])
async def test_window_takes_only_its_part(clock: FakeClock, books: FakeBooks, since_s: int) -> None:
    ledger = await opened(clock, books)
    claim(ledger, S.ACTIVE)
    clock.advance(10)
    report = await ledger.cost(
        since=START + timedelta(seconds=since_s), until=START + timedelta(seconds=8)
    )
    assert report.total.seconds[S.ACTIVE] == max(8 - since_s, 0)


async def test_flood_of_state_changes_is_written_as_a_few_rows(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books)
    for _ in range(500):
        claim(ledger, S.ACTIVE)
        clock.advance(0.001)
        claim(ledger, S.IDLE)
        clock.advance(0.001)
    await ledger.flush()
    assert len(books.intervals) < 10
    told = await seconds(ledger)
    assert (told["smol", "active"], told["smol", "idle"]) == (0.5, 0.5)


async def test_memory_stays_bounded_while_the_store_is_away(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books, max_pending=100)
    await ledger.flush()
    books.failure = Failure.BEFORE
    for second in range(3 * 86_400 // 60):
        claim(ledger, S.ACTIVE, replica=f"r{second % 2}", function=f"f{second % 2}")
        clock.advance(20)
        claim(ledger, S.IDLE, replica=f"r{second % 2}", function=f"f{second % 2}")
        clock.advance(40)
        if second % 10 == 0:
            with pytest.raises(DatabaseUnavailable):
                await ledger.flush()
        assert ledger.num_pending <= 300
    books.failure = None
    told = await seconds(ledger)
    assert told[None, "unallocated"] == 3 * 86_400
    assert sum(told.values()) == pytest.approx(2 * 3 * 86_400, abs=0.01)


async def test_compacting_saves_rows_and_changes_no_figure(
    clock: FakeClock, books: FakeBooks
) -> None:
    ledger = await opened(clock, books)
    for _ in range(300):
        claim(ledger, S.ACTIVE)
        clock.advance(20)
        claim(ledger, S.IDLE)
        clock.advance(40)
        await ledger.flush()
    until = clock.now()
    before = await ledger.cost(since=START, until=until)
    num_before = len(books.intervals)
    await ledger.compact()
    after = await ledger.cost(since=START, until=until)
    assert after == before
    assert len(books.intervals) < num_before / 2
