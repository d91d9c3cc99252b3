"""What happened to replicas and why."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, insert, select

from controller.store.tables import transitions


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTransition:
    """One move of a replica's life."""

    replica_id: str
    function: str
    at_us: int
    from_state: str | None
    to_state: str
    reason: str
    epoch: int


class Transitions:
    """The transitions table, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, moves: Iterable[StoredTransition]) -> None:
        """Add moves in their order."""
        rows = [asdict(move) for move in moves]
        if rows:
            self._connection.execute(insert(transitions), rows)

    def latest(
        self, *, function: str | None = None, replica_id: str | None = None, limit: int
    ) -> Sequence[StoredTransition]:
        """Return the latest moves, newest first."""
        query = select(transitions).order_by(transitions.c.id.desc()).limit(limit)
        if function is not None:
            query = query.where(transitions.c.function == function)
        if replica_id is not None:
            query = query.where(transitions.c.replica_id == replica_id)
        rows = self._connection.execute(query)
        return [
            StoredTransition(
                replica_id=row.replica_id,
                function=row.function,
                at_us=row.at_us,
                from_state=row.from_state,
                to_state=row.to_state,
                reason=row.reason,
                epoch=row.epoch,
            )
            for row in rows
        ]

    def prune(self, before_us: int) -> int:
        """Forget what is older; returns how many moves that were."""
        return self._connection.execute(
            delete(transitions).where(transitions.c.at_us < before_us)
        ).rowcount
