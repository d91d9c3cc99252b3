"""One database, used by one thread: every call is a transaction, and they run in order.

Knows neither tables nor what the transactions are for. PostgreSQL needs its own `prepare` beside
the one for SQLite, nothing else here.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from controller.store import sqlite
from controller.store.errors import DatabaseCorrupt, DatabaseUnavailable
from controller.store.schema import migrate

P = ParamSpec("P")
T = TypeVar("T")

MAX_WAITING = 1_000
"""Transactions that may wait for the thread; more are refused, so that memory stays bounded."""


class Database:
    """An open database at the current schema. Thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._waiting = threading.Semaphore(MAX_WAITING)
        self._is_closed = False

    @classmethod
    def open(cls, url: str) -> "Database":
        """Open a database, create it if need be, and bring it to the current schema. Blocks.

        Args:
            url: As SQLAlchemy spells it: `sqlite:////var/lib/coldspark/coldspark.db`.

        Raises:
            DatabaseTooNew: A newer version has changed the tables.
            DatabaseCorrupt: The file is damaged or is not a database.
            DatabaseUnavailable: It cannot be opened or is locked by another process.
        """
        parsed = make_url(url)
        engine = create_engine(parsed)
        if parsed.get_backend_name() == "sqlite":
            sqlite.prepare(engine)
        database = cls(engine)
        try:
            database._thread.submit(database._transact, migrate).result()
        except BaseException:
            database.close()
            raise
        return database

    async def run(
        self,
        work: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Return `work(connection, …)`, run as one transaction on the database's thread.

        A failure rolls back. Cancelling the caller does not stop work that has begun.

        Raises:
            DatabaseUnavailable: Temporary; nothing was written.
            DatabaseCorrupt: Permanent.
        """
        if self._is_closed:
            raise DatabaseUnavailable("the database is closed")
        if not self._waiting.acquire(blocking=False):
            raise DatabaseUnavailable(
                f"{MAX_WAITING} transactions wait for the database; is its disk stuck or full?"
            )
        future = self._thread.submit(self._transact, work, *args, **kwargs)
        future.add_done_callback(lambda _: self._waiting.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finish what waits and close; blocks. Harmless the second time."""
        self._is_closed = True
        self._thread.shutdown(wait=True)
        self._engine.dispose()

    def _transact(
        self,
        work: Callable[Concatenate[Connection, P], T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        try:
            with self._engine.begin() as connection:
                return work(connection, *args, **kwargs)
        except IntegrityError:
            raise  # a defect of the caller's, not of the database
        except DBAPIError as error:
            raise self._translated(error) from error

    def _translated(self, error: DBAPIError) -> Exception:
        place, cause = self._engine.url.render_as_string(hide_password=True), error.orig
        if isinstance(cause, Exception) and sqlite.is_corruption(cause):
            return DatabaseCorrupt(
                f"{place} cannot be read: {cause}; move the file away to start with empty books, "
                "or put a copy of it back"
            )
        return DatabaseUnavailable(f"{place} cannot be used now: {cause}")
