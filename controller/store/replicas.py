"""Replicas as the controller means them to be; the backends know what really runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, insert, select, update

from controller.store.tables import replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredReplica:
    """One replica.

    Attributes:
        epoch: Of the controller that wrote it.
        devices: Ids of the devices it was given.
    """

    id: str
    function: str
    revision: str
    backend: str
    state: str
    epoch: int
    devices: tuple[str, ...]
    created_us: int
    updated_us: int


class Replicas:
    """The replicas table, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def upsert(self, replica: StoredReplica) -> None:
        """Write a replica, replacing what was known; the time of its creation stays."""
        values = {**asdict(replica), "devices": list(replica.devices)}
        changes = {name: values[name] for name in values if name not in ("id", "created_us")}
        is_this = replicas.c.id == replica.id
        if not self._connection.execute(update(replicas).where(is_this).values(changes)).rowcount:
            self._connection.execute(insert(replicas).values(values))

    def delete(self, replica_id: str) -> None:
        """Forget a replica; harmless when it is not known."""
        self._connection.execute(delete(replicas).where(replicas.c.id == replica_id))

    def list(self, function: str | None = None) -> Sequence[StoredReplica]:
        """Return all replicas, or those of one function, by id."""
        query = select(replicas).order_by(replicas.c.id)
        if function is not None:
            query = query.where(replicas.c.function == function)
        rows = self._connection.execute(query).mappings()
        return [StoredReplica(**{**row, "devices": tuple(row["devices"])}) for row in rows]
