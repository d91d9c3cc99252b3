"""The database as batches and files use it: failures become answers to a client."""

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection

from controller.errors import StoreUnavailable
from controller.store.database import Database
from controller.store.errors import DatabaseUnavailable

T = TypeVar("T")
RETRY_AFTER_S = 2.0


async def transact(database: Database, work: Callable[[Connection], T]) -> T:
    """Run one transaction.

    Raises:
        StoreUnavailable: The database cannot be used now; nothing was written.
    """
    try:
        return await database.run(work)
    except DatabaseUnavailable as error:
        raise StoreUnavailable(f"{error}; retry shortly", retry_after_s=RETRY_AFTER_S) from error
