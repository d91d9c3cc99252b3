import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.exc import IntegrityError

from controller.store import database as database_module
from controller.store import schema, sqlite
from controller.store.database import Database
from controller.store.errors import DatabaseCorrupt, DatabaseTooNew, DatabaseUnavailable
from controller.store.tables import functions, metadata, revisions


def put(connection: Connection, name: str) -> None:
    connection.execute(insert(functions).values(name=name, created_us=0))


def names(connection: Connection) -> list[str]:
    return list(connection.scalars(select(functions.c.name)))


@contextlib.contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


async def test_what_was_written_is_there_after_reopening(url: str) -> None:
    first = Database.open(url)
    await first.run(put, "smol")
    first.close()
    second = Database.open(url)
    assert await second.run(names) == ["smol"]
    second.close()


async def test_failed_transaction_leaves_nothing(database: Database) -> None:
    def half(connection: Connection) -> None:
        put(connection, "smol")
        raise LookupError("in the middle")

    with pytest.raises(LookupError):
        await database.run(half)
    assert await database.run(names) == []


async def test_transactions_run_one_after_the_other_on_one_thread(database: Database) -> None:
    threads = await asyncio.gather(
        *(database.run(lambda _: threading.get_ident()) for _ in range(20))
    )
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_cancelled_caller_does_not_stop_work_that_has_begun(database: Database) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        begun.set()
        go_on.wait(10)
        put(connection, "smol")

    writing = asyncio.create_task(database.run(slow))
    await asyncio.to_thread(begun.wait, 10)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    go_on.set()
    assert await database.run(names) == ["smol"]


async def test_sqlite_is_set_up_for_safety(database: Database) -> None:
    def pragma(connection: Connection, name: str) -> object:
        return connection.execute(text(f"PRAGMA {name}")).scalar_one()

    assert await database.run(pragma, "journal_mode") == "wal"
    assert await database.run(pragma, "foreign_keys") == 1
    assert await database.run(pragma, "synchronous") == 1  # NORMAL
    assert await database.run(pragma, "busy_timeout") == 5000


async def test_foreign_keys_are_kept(database: Database) -> None:
    def orphan(connection: Connection) -> None:
        connection.execute(
            insert(revisions).values(function="nobody", revision="a", spec={}, created_us=0)
        )

    with pytest.raises(IntegrityError):
        await database.run(orphan)


def test_migrations_lead_to_the_tables(connection: Connection) -> None:
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    assert compare_metadata(context, metadata) == []


def test_migrating_again_changes_nothing(connection: Connection) -> None:
    schema.migrate(connection)


def test_newer_database_is_refused_and_left_alone(url: str, path: Path) -> None:
    Database.open(url).close()
    with raw(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseTooNew, match=r"schema '9999'.*run the version that wrote it"):
        Database.open(url)
    with raw(path) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)


def test_failed_migration_leaves_the_database_as_it_was(
    url: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(connection: Connection) -> None:
        schema.migrate(connection)
        raise LookupError("halfway")

    monkeypatch.setattr(database_module, "migrate", breaks)
    with pytest.raises(LookupError):
        Database.open(url)
    with raw(path) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []


def test_file_that_is_no_database_is_refused(url: str, path: Path) -> None:
    path.write_bytes(b"#!/bin/sh\n" + bytes(4096))
    with pytest.raises(DatabaseCorrupt, match="move the file away"):
        Database.open(url)
    assert path.read_bytes().startswith(b"#!/bin/sh")


def test_damaged_file_is_told_apart_from_a_busy_one(url: str, path: Path) -> None:
    Database.open(url).close()
    content = bytearray(path.read_bytes())
    for page in range(4096, len(content), 4096):
        content[page : page + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(DatabaseCorrupt):
        Database.open(url)


def test_directory_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUnavailable, match="unable to open"):
        Database.open(f"sqlite:///{tmp_path / 'nowhere' / 'coldspark.db'}")


async def test_locked_database_is_unavailable_and_works_again_afterwards(
    url: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.01)
    database = Database.open(url)
    with raw(path) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseUnavailable, match="locked"):
            await database.run(put, "smol")
        other.execute("ROLLBACK")
    await database.run(put, "smol")
    assert await database.run(names) == ["smol"]
    database.close()


async def test_closed_database_refuses_work(url: str) -> None:
    database = Database.open(url)
    database.close()
    database.close()
    with pytest.raises(DatabaseUnavailable, match="closed"):
        await database.run(names)


async def test_too_many_waiting_transactions_are_refused(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "MAX_WAITING", 2)
    database = Database.open(url)
    go_on = threading.Event()
    stuck = [asyncio.create_task(database.run(lambda _: go_on.wait(10))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(DatabaseUnavailable, match="2 transactions wait"):
        await database.run(names)
    go_on.set()
    assert await asyncio.gather(*stuck) == [True, True]
    assert await database.run(names) == []
    database.close()
