"""Cold starts with their phases."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, insert, select

from controller.store.tables import cold_starts


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPhase:
    """A part of a cold start; `gb_per_s` is 0 if it moved no bytes."""

    name: str
    seconds: float
    gb_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredColdStart:
    """One cold start.

    Attributes:
        id: None before it is stored.
        phases: In order; they add up to `total_s`.
    """

    id: int | None = None
    function: str
    replica_id: str
    started_us: int
    from_tier: str
    reason: str
    outcome: str
    total_s: float
    phases: tuple[StoredPhase, ...]


class ColdStarts:
    """The cold starts table, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, starts: Iterable[StoredColdStart]) -> None:
        """Add cold starts."""
        rows = [asdict(start) for start in starts]
        for row in rows:
            del row["id"]
            row["phases"] = list(row["phases"])
        if rows:
            self._connection.execute(insert(cold_starts), rows)

    def latest(self, *, function: str | None = None, limit: int) -> Sequence[StoredColdStart]:
        """Return the latest cold starts, newest first."""
        newest = (cold_starts.c.started_us.desc(), cold_starts.c.id.desc())
        query = select(cold_starts).order_by(*newest).limit(limit)
        if function is not None:
            query = query.where(cold_starts.c.function == function)
        rows = self._connection.execute(query).mappings()
        return [
            StoredColdStart(
                **{**row, "phases": tuple(StoredPhase(**phase) for phase in row["phases"])}
            )
            for row in rows
        ]

    def prune(self, before_us: int) -> int:
        """Forget what is older; returns how many cold starts that were."""
        return self._connection.execute(
            delete(cold_starts).where(cold_starts.c.started_us < before_us)
        ).rowcount
