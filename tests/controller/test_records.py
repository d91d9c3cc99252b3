"""The adapter between the parts and the database, over a real one."""

import asyncio
import stat
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from controller.errors import NotFound, StoreUnavailable
from controller.gateway.auth import hash_key
from controller.ledger.ledger import Ledger
from controller.records import Records
from controller.scaling.activation import ColdStart, PhaseTiming
from controller.scaling.entry import StoredFunction
from controller.scaling.generation import GenerationRecord
from controller.scaling.journal import Entry, Journal, TransitionEntry, UsageEntry
from controller.store.database import Database
from controller.store.ledger import LedgerStore
from tests.fakes.clock import FakeClock
from tests.fakes.world import spec_of

DAY_S = 86_400
START_US = 1_772_452_800_000_000


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database.open(f"sqlite:///{tmp_path / 'test.db'}")
    yield database
    database.close()


@pytest.fixture
def records(database: Database, clock: FakeClock) -> Records:
    devices = {"cpu:0": Decimal("2.50")}
    ledger = Ledger(devices=devices, clock=clock, repository=LedgerStore(database))
    return Records(database, ledger, clock)


def cold_start(started_us: int = START_US) -> ColdStart:
    return ColdStart(
        function="tiny",
        replica_id="tiny-1",
        started_us=started_us,
        from_tier="stopped",
        reason="request",
        outcome="ready",
        total_s=1.5,
        phases=(PhaseTiming("queue", 0.5), PhaseTiming("read", 1.0, 16.1)),
    )


async def test_functions_come_back_as_they_were_put(records: Records) -> None:
    spec = spec_of(scaling={"idle_timeout": "5m"})
    await records.put(StoredFunction(spec=spec, backend="docker", created_us=START_US))
    (stored,) = await records.load()
    assert stored.spec == spec
    assert stored.backend == "docker"
    await records.delete("tiny")
    assert await records.load() == []


async def test_a_spec_of_another_version_hides_no_other_function(
    records: Records, database: Database
) -> None:
    for name in ("good", "bad"):
        spec = spec_of().model_copy(update={"name": name})
        await records.put(StoredFunction(spec=spec, backend="process", created_us=START_US))
    await database.run(
        lambda connection: connection.exec_driver_sql(
            "update revisions set spec = '{\"name\": 7}' where function = 'bad'"
        )
    )
    assert [stored.spec.name for stored in await records.load()] == ["good"]


async def test_earlier_revisions_come_with_the_current_one(
    records: Records, clock: FakeClock
) -> None:
    for seconds in (1, 2, 3):
        clock.advance(1)
        spec = spec_of(scaling={"idle_timeout": seconds})
        await records.put(StoredFunction(spec=spec, backend="process", created_us=START_US))
    (stored,) = await records.load()
    found = [one.spec.scaling.idle_timeout for one in (stored, *stored.earlier)]
    assert found == [3, 2, 1]


async def test_the_journal_ends_up_in_the_history(records: Records, clock: FakeClock) -> None:
    journal = Journal(records.write)
    record = GenerationRecord(request_id="r", function="tiny", tier="ready", outcome="stop")
    move = TransitionEntry(
        function="tiny",
        replica_id="tiny-1",
        at_us=START_US,
        from_state=None,
        to_state="starting",
        reason="requests wait",
        epoch=1,
    )
    for entry in (cold_start(), UsageEntry(started_us=START_US, record=record), move):
        journal.add(entry)
    await journal.flush()
    await journal.flush()
    (start,) = await records.cold_starts(function="tiny", limit=10)
    assert start["phases"] == [
        {"name": "queue", "seconds": 0.5, "gb_per_s": 0.0},
        {"name": "read", "seconds": 1.0, "gb_per_s": 16.1},
    ]
    assert start["started_at"] == "2026-03-02T12:00:00+00:00"
    assert await records.cold_starts(function="other", limit=10) == []


async def test_a_journal_that_cannot_be_written_keeps_its_entries_within_a_bound() -> None:
    is_away = True
    written: list[Entry] = []

    async def write(entries: list[Entry]) -> None:
        if is_away:
            raise OSError("disk full")
        written.extend(entries)

    dropped: list[None] = []
    journal = Journal(write, on_dropped=lambda: dropped.append(None))
    for number in range(10_050):
        journal.add(cold_start(number))
    with pytest.raises(OSError, match="disk full"):
        await journal.flush()
    is_away = False
    await journal.flush()
    assert len(dropped) == 50
    assert len(written) == 10_000


@pytest.mark.parametrize("fails", [False, True])
async def test_what_comes_during_a_write_is_neither_lost_nor_written_twice(fails: bool) -> None:
    may_write = asyncio.Event()
    written: list[int] = []

    async def write(entries: list[Entry]) -> None:
        await may_write.wait()
        if fails:
            raise OSError("disk full")
        written.extend(entry.started_us for entry in entries if isinstance(entry, ColdStart))

    dropped: list[None] = []
    journal = Journal(write, on_dropped=lambda: dropped.append(None))
    for number in range(10_000):
        journal.add(cold_start(number))
    first, second = (asyncio.create_task(journal.flush()) for _ in range(2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for number in range(10_000, 10_010):
        journal.add(cold_start(number))
    first.cancel()
    await asyncio.sleep(0)
    may_write.set()
    await asyncio.wait([first, second])
    assert first.cancelled()
    assert (second.exception() is not None) is fails
    fails = False
    await journal.flush()
    assert written == list(range(len(dropped), 10_010))
    assert len(dropped) == (10 if second.exception() else 0)


async def test_history_is_kept_for_its_days(records: Records, clock: FakeClock) -> None:
    await records.write([cold_start()])
    clock.advance(10 * DAY_S)
    await records.prune(history_days=11)
    assert await records.cold_starts(function=None, limit=10)
    await records.prune(history_days=9)
    assert not await records.cold_starts(function=None, limit=10)


async def test_a_key_is_found_by_its_hash_until_it_is_revoked(
    records: Records, clock: FakeClock
) -> None:
    created = await records.create_key("ci", expires_in_s=60.0)
    key = await records.find(hash_key(created["key"]))
    assert key is not None
    assert (key.name, key.is_revoked) == ("ci", False)
    assert key.expires_at is not None
    assert (key.expires_at - clock.now()).total_seconds() == 60.0
    assert all("key" not in listed for listed in await records.keys()), "secrets are shown once"
    assert await records.may_call(key.id)
    await records.revoke_key(key.id)
    assert not await records.may_call(key.id)
    assert not await records.may_call("nobody")
    revoked = await records.find(hash_key(created["key"]))
    assert revoked is not None
    assert revoked.is_revoked
    with pytest.raises(NotFound):
        await records.revoke_key("nobody")


async def test_the_first_key_is_written_once_and_only_for_its_owner(
    records: Records, tmp_path: Path
) -> None:
    path = tmp_path / "bootstrap.key"
    assert await records.bootstrap_key(path)
    secret = await asyncio.to_thread(path.read_text)
    assert await records.find(hash_key(secret.strip())) is not None
    mode = (await asyncio.to_thread(path.stat)).st_mode
    assert stat.S_IMODE(mode) == 0o600
    assert not await records.bootstrap_key(path)


async def test_a_key_that_was_used_lately_opens_while_the_database_is_away(
    records: Records, database: Database, clock: FakeClock
) -> None:
    used = hash_key((await records.create_key("used", expires_in_s=None))["key"])
    unused = hash_key((await records.create_key("unused", expires_in_s=None))["key"])
    assert await records.find(used) is not None
    database.close()
    clock.advance(3600.0)
    assert await records.find(used) is not None
    with pytest.raises(StoreUnavailable) as told:
        await records.find(unused)
    assert told.value.retry_after_s is not None


async def test_what_clients_ask_for_is_503_while_the_database_is_away(
    records: Records, database: Database, clock: FakeClock
) -> None:
    database.close()
    stored = StoredFunction(spec=spec_of(), backend="process", created_us=START_US)
    for call in (
        records.keys(),
        records.create_key("ci", expires_in_s=None),
        records.revoke_key("id"),
        records.may_call("id"),
        records.cold_starts(function=None, limit=1),
        records.put(stored),
        records.delete("tiny"),
    ):
        with pytest.raises(StoreUnavailable):
            await call


async def test_a_life_that_ends_after_the_calendar_leaves_no_key_behind(records: Records) -> None:
    with pytest.raises((ValueError, OverflowError)):
        await records.create_key("eternal", expires_in_s=1e12)
    assert await records.keys() == []


async def test_a_first_key_is_made_again_when_none_can_be_used(
    records: Records, tmp_path: Path, clock: FakeClock
) -> None:
    path = tmp_path / "bootstrap.key"
    short = await records.create_key("short", expires_in_s=60.0)
    long = await records.create_key("long", expires_in_s=3600.0)
    assert not await records.bootstrap_key(path)
    await records.revoke_key(long["id"])
    clock.advance(61.0)
    assert await records.bootstrap_key(path)
    assert {key["id"] for key in await records.keys()} > {short["id"], long["id"]}


async def test_a_first_key_that_cannot_be_written_is_not_stored(
    records: Records, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="nowhere"):
        await records.bootstrap_key(tmp_path / "nowhere" / "bootstrap.key")
    assert await records.keys() == []
