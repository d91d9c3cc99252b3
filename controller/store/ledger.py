"""The ledger's books in the database."""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, or_, select

from controller.ledger.ledger import Batch, LastKnown
from controller.ledger.report import Deployed, Figures
from controller.store.database import Database
from controller.store.intervals import Intervals
from controller.store.tables import deployments, revisions
from controller.store.usage import Usage


class LedgerStore:
    """A `LedgerRepository` over the database; every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def last_known(self) -> LastKnown:
        """Return where the books end."""
        return await self._database.run(_last_known)

    async def save(self, batch: Batch) -> None:
        """Write a batch and the heartbeat."""
        await self._database.run(_save, batch)

    async def figures(self, since_us: int, until_us: int) -> Figures:
        """Sum what is written."""
        return await self._database.run(_figures, since_us, until_us)

    async def compact(self, before_us: int) -> int:
        """Merge what ended before a full hour; returns how many intervals that saved."""
        return await self._database.run(_compact, before_us)


def _last_known(connection: Connection) -> LastKnown:
    books = Intervals(connection)
    return LastKnown(
        heartbeat_us=books.heartbeat_us(),
        open_intervals=books.open_intervals(),
        device_ends_us=books.device_ends_us(),
    )


def _save(connection: Connection, batch: Batch) -> None:
    books = Intervals(connection)
    books.replace_from(batch.from_us, [*batch.closed, *batch.open_intervals])
    books.beat(batch.heartbeat_us)


def _figures(connection: Connection, since_us: int, until_us: int) -> Figures:
    return Figures(
        since_us=since_us,
        until_us=until_us,
        device_times=Intervals(connection).device_times(since_us, until_us),
        served=Usage(connection).served(since_us, until_us),
        deployed=tuple(_deployed(connection, since_us, until_us)),
    )


def _compact(connection: Connection, before_us: int) -> int:
    return Intervals(connection).compact(before_us)


def _deployed(connection: Connection, since_us: int, until_us: int) -> Iterator[Deployed]:
    overlaps = (
        deployments.c.from_us < until_us,
        or_(deployments.c.until_us.is_(None), deployments.c.until_us > since_us),
    )
    is_revision = (revisions.c.function == deployments.c.function) & (
        revisions.c.revision == deployments.c.revision
    )
    query = select(deployments, revisions.c.spec).join(revisions, is_revision).where(*overlaps)
    for row in connection.execute(query):
        yield Deployed(
            function=row.function,
            from_us=row.from_us,
            until_us=row.until_us,
            num_devices=max(_part(row.spec, "resources").get("gpus", 1), 1),
            rate_usd_per_hour=_price(_part(row.spec, "cost").get("gpu_hour_usd")),
        )


def _part(spec: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of a spec, which an older version may have written."""
    return spec.get(name) or {}


def _price(value: object) -> Decimal | None:
    return None if value is None else Decimal(str(value))
