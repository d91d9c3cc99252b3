"""One row a request: what it used. Never what it said."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select

from controller.ledger.report import Served
from controller.store.tables import day_of, usage


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUsage:
    """One finished request; durations in seconds."""

    request_id: str
    function: str
    replica_id: str | None
    key_id: str | None
    started_us: int
    tier: str
    queue_s: float | None
    first_token_s: float | None
    duration_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    outcome: str


class Usage:
    """The usage table, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, requests: Iterable[StoredUsage]) -> None:
        """Add finished requests."""
        rows = [asdict(request) for request in requests]
        if rows:
            self._connection.execute(insert(usage), rows)

    def served(self, since_us: int, until_us: int) -> Sequence[Served]:
        """Sum the requests that started in [since_us, until_us) by function, replica and day."""
        day = day_of(usage.c.started_us)
        groups = (usage.c.function, usage.c.replica_id, day)
        query = (
            select(
                *groups,
                func.count().label("num_requests"),
                func.sum(usage.c.num_prompt_tokens).label("num_prompt_tokens"),
                func.sum(usage.c.num_output_tokens).label("num_output_tokens"),
            )
            .where(_started(since_us, until_us))
            .group_by(*groups)
        )
        return [
            Served(
                function=row.function,
                replica_id=row.replica_id,
                day=int(row.day),
                num_requests=row.num_requests,
                num_prompt_tokens=int(row.num_prompt_tokens),
                num_output_tokens=int(row.num_output_tokens),
            )
            for row in self._connection.execute(query)
        ]

    def prune(self, before_us: int) -> int:
        """Forget what is older; returns how many requests that were."""
        return self._connection.execute(
            delete(usage).where(usage.c.started_us < before_us)
        ).rowcount


def _started(since_us: int, until_us: int) -> ColumnElement[bool]:
    return (usage.c.started_us >= since_us) & (usage.c.started_us < until_us)
