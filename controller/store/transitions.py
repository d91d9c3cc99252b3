"""What happened to replicas and why."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, insert

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

    def prune(self, before_us: int) -> int:
        """Forget what is older; returns how many moves that were."""
        return self._connection.execute(
            delete(transitions).where(transitions.c.at_us < before_us)
        ).rowcount
