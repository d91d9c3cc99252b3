"""What every place for the ledger's books must do, the fake included."""

from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import pytest

from controller.ledger.intervals import DAY_US, HOUR_US, WHOLE_PPM, Interval, LedgerState
from controller.ledger.ledger import Batch, LedgerRepository
from controller.store.database import Database
from controller.store.ledger import LedgerStore
from tests.fakes.books import FakeBooks

START_US = 20_000 * DAY_US + 20 * HOUR_US
RATE = Decimal("0.1234567890123")
S = LedgerState


@pytest.fixture(params=["fake", "sqlite"])
def books(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LedgerRepository]:
    if request.param == "fake":
        yield FakeBooks()
        return
    database = Database.open(f"sqlite:///{tmp_path / 'books.db'}")
    yield LedgerStore(database)
    database.close()


def held(
    state: LedgerState,
    start: int,
    end: int | None,
    *,
    replica: str | None = "r1",
    device: str = "gpu",
    share: int = WHOLE_PPM,
) -> Interval:
    return Interval(
        device=device,
        function=replica and "smol",
        replica_id=replica,
        state=state,
        start_us=START_US + start,
        end_us=None if end is None else START_US + end,
        share_ppm=share,
        rate_usd_per_hour=RATE,
    )


async def save(
    books: LedgerRepository,
    heartbeat: int,
    closed: Sequence[Interval] = (),
    current: Sequence[Interval] = (),
    replaces_from: int = 0,
) -> None:
    await books.save(
        Batch(
            from_us=START_US + replaces_from,
            closed=closed,
            open_intervals=current,
            heartbeat_us=START_US + heartbeat,
        )
    )


async def times(
    books: LedgerRepository, since: int = 0, until: int = 10 * HOUR_US
) -> dict[tuple[str | None, LedgerState], int]:
    figures = await books.figures(START_US + since, START_US + until)
    sums: Counter[tuple[str | None, LedgerState]] = Counter()
    for one in figures.device_times:
        sums[one.replica_id, one.state] += one.device_time
    return dict(sums)


async def test_new_books_are_empty(books: LedgerRepository) -> None:
    known = await books.last_known()
    assert known.heartbeat_us is None
    assert list(known.open_intervals) == []
    assert dict(known.device_ends_us) == {}
    assert await times(books) == {}


async def test_saved_batch_is_where_the_books_end(books: LedgerRepository) -> None:
    current = held(S.ACTIVE, 50, None)
    await save(books, 90, [held(S.IDLE, 0, 50)], [current])
    known = await books.last_known()
    assert known.heartbeat_us == START_US + 90
    assert list(known.open_intervals) == [current]
    assert dict(known.device_ends_us) == {"gpu": START_US + 50}


async def test_open_time_counts_up_to_the_heartbeat(books: LedgerRepository) -> None:
    await save(books, 90, [held(S.IDLE, 0, 50)], [held(S.ACTIVE, 50, None)])
    assert await times(books) == {
        ("r1", S.IDLE): 50 * WHOLE_PPM,
        ("r1", S.ACTIVE): 40 * WHOLE_PPM,
    }


async def test_window_cuts_what_crosses_its_ends(books: LedgerRepository) -> None:
    await save(books, 90, [held(S.IDLE, 0, 50)], [held(S.ACTIVE, 50, None)])
    assert await times(books, since=40, until=60) == {
        ("r1", S.IDLE): 10 * WHOLE_PPM,
        ("r1", S.ACTIVE): 10 * WHOLE_PPM,
    }
    assert await times(books, since=90, until=100) == {}


async def test_batch_written_twice_counts_once(books: LedgerRepository) -> None:
    await save(books, 10, [], [held(S.IDLE, 0, None)])
    for _ in range(2):
        closed = [held(S.IDLE, 0, 50), held(S.ACTIVE, 50, 60)]
        await save(books, 70, closed, [held(S.IDLE, 60, None)], replaces_from=10)
    assert await times(books) == {
        ("r1", S.IDLE): 60 * WHOLE_PPM,
        ("r1", S.ACTIVE): 10 * WHOLE_PPM,
    }


async def test_what_ended_before_the_batch_stays(books: LedgerRepository) -> None:
    await save(books, 10, [held(S.LOADING, 0, 9)])
    await save(books, 30, [held(S.ACTIVE, 10, 30)], replaces_from=10)
    assert await times(books) == {
        ("r1", S.LOADING): 9 * WHOLE_PPM,
        ("r1", S.ACTIVE): 20 * WHOLE_PPM,
    }


async def test_rates_come_back_as_they_were(books: LedgerRepository) -> None:
    await save(books, 10, [held(S.ACTIVE, 0, 10)])
    figures = await books.figures(START_US, START_US + 10)
    assert [one.rate_usd_per_hour for one in figures.device_times] == [RATE]


async def test_days_are_told_apart(books: LedgerRepository) -> None:
    midnight = 4 * HOUR_US
    closed = [held(S.IDLE, midnight - 5, midnight), held(S.IDLE, midnight, midnight + 7)]
    await save(books, midnight + 7, closed)
    figures = await books.figures(START_US, START_US + DAY_US)
    assert {one.day: one.device_time for one in figures.device_times} == {
        20_000: 5 * WHOLE_PPM,
        20_001: 7 * WHOLE_PPM,
    }


async def test_years_of_device_time_do_not_overflow(books: LedgerRepository) -> None:
    years = 20 * 365 * DAY_US
    await save(books, years, [held(S.IDLE, day, day + DAY_US) for day in range(0, years, DAY_US)])
    assert (await times(books, until=years)) == {("r1", S.IDLE): years * WHOLE_PPM}


def alternating(hour: int, num: int, *, until: int = HOUR_US) -> list[Interval]:
    length = until // num
    return [
        held(
            S.ACTIVE if index % 2 else S.IDLE,
            hour * HOUR_US + index * length,
            hour * HOUR_US + (index + 1) * length,
        )
        for index in range(num)
    ]


async def test_compacting_merges_full_hours_and_keeps_the_sums(books: LedgerRepository) -> None:
    closed = [*alternating(0, 60), *alternating(1, 60)]
    await save(books, 2 * HOUR_US, closed, [held(S.IDLE, 2 * HOUR_US, None)])
    before = await times(books)
    assert await books.compact(START_US + HOUR_US) == 58
    assert await times(books) == before
    assert await times(books, until=HOUR_US) == {
        ("r1", S.IDLE): HOUR_US // 2 * WHOLE_PPM,
        ("r1", S.ACTIVE): HOUR_US // 2 * WHOLE_PPM,
    }


async def test_compacting_again_takes_only_new_hours(books: LedgerRepository) -> None:
    await save(books, HOUR_US, alternating(0, 60))
    assert await books.compact(START_US + HOUR_US) == 58
    assert await books.compact(START_US + HOUR_US) == 0
    await save(books, 2 * HOUR_US, alternating(1, 10), replaces_from=HOUR_US + 1)
    assert await books.compact(START_US + 2 * HOUR_US) == 8


async def test_compacting_empty_books_does_nothing(books: LedgerRepository) -> None:
    assert await books.compact(START_US) == 0


async def test_compacting_leaves_an_hour_alone_that_has_nothing_to_merge(
    books: LedgerRepository,
) -> None:
    await save(
        books, HOUR_US, [held(S.IDLE, 0, HOUR_US // 2), held(S.ACTIVE, HOUR_US // 2, HOUR_US)]
    )
    before = await times(books)
    assert await books.compact(START_US + HOUR_US) == 0
    assert await times(books) == before


async def test_empty_batch_only_moves_the_heartbeat(books: LedgerRepository) -> None:
    await save(books, 10)
    await save(books, 20, replaces_from=10)
    known = await books.last_known()
    assert known.heartbeat_us == START_US + 20
    assert await times(books) == {}
