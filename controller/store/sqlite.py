"""The one place that knows SQLite: how a connection is set up and what its failures mean."""

import sqlite3
from typing import Any

from sqlalchemy import Connection, Engine, event

BUSY_TIMEOUT_S = 5.0
_CORRUPT = ("malformed", "not a database", "disk image", "encrypted")


def prepare(engine: Engine) -> None:
    """Set up every connection of an SQLite engine: WAL, foreign keys, real transactions."""
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)


def is_corruption(error: BaseException) -> bool:
    """Say whether an SQLite failure means that the file is damaged."""
    return isinstance(error, sqlite3.DatabaseError) and any(
        words in str(error).lower() for words in _CORRUPT
    )


def _on_connect(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver begins no transaction; `_on_begin` does
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _on_begin(connection: Connection) -> None:
    # Immediate: a transaction that will write must not find out in its middle that it cannot.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
