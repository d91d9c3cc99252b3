"""Batches: what was asked and how far it is. What was answered is in files."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from controller.store.errors import NotStored
from controller.store.tables import batches


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBatch:
    """One batch.

    Attributes:
        key_id: Whose it is; None where keys are not in use.
        completion_window: As it was asked for.
        model: What all its requests name; None until the input has been read.
        errors: Why the input was refused, as the API shows it.
        moments: Microsecond at which a status began, by its name.
    """

    id: str
    key_id: str | None
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata_: Mapping[str, str] | None
    status: str
    created_us: int
    expires_us: int
    model: str | None = None
    errors: Sequence[Mapping[str, object]] = ()
    num_total: int = 0
    num_completed: int = 0
    num_failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    moments: Mapping[str, int] = field(default_factory=dict)


class Batches:
    """The batches table, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, batch: StoredBatch) -> None:
        """Add a batch."""
        self._connection.execute(insert(batches).values(_row(batch)))

    def put(self, batch: StoredBatch) -> None:
        """Replace a batch; one that has been forgotten stays so."""
        self._connection.execute(
            update(batches).where(batches.c.id == batch.id).values(_row(batch))
        )

    def get(self, batch_id: str) -> StoredBatch:
        """Return a batch.

        Raises:
            NotStored: There is none.
        """
        found = self._select(batches.c.id == batch_id)
        if not found:
            raise NotStored(f"no batch {batch_id!r}")
        return found[0]

    def list(self, *, key_id: str | None, after: str | None, limit: int) -> Sequence[StoredBatch]:
        """Return a key's batches, newest first, those before a given one only."""
        conditions: list[ColumnElement[bool]] = [batches.c.key_id.is_not_distinct_from(key_id)]
        if after is not None:
            last = self.get(after)
            conditions.append(
                (batches.c.created_us < last.created_us)
                | ((batches.c.created_us == last.created_us) & (batches.c.id < last.id))
            )
        return self._select(*conditions, limit=limit)

    def in_status(self, statuses: AbstractSet[str]) -> Sequence[StoredBatch]:
        """Return all batches in some statuses, newest first."""
        return self._select(batches.c.status.in_(statuses))

    def prune(self, before_us: int, statuses: AbstractSet[str]) -> None:
        """Forget older ones in some statuses; their files stay."""
        is_old = (batches.c.created_us < before_us) & batches.c.status.in_(statuses)
        self._connection.execute(delete(batches).where(is_old))

    def _select(
        self, *conditions: ColumnElement[bool], limit: int | None = None
    ) -> Sequence[StoredBatch]:
        query = select(batches).where(*conditions).limit(limit)
        query = query.order_by(batches.c.created_us.desc(), batches.c.id.desc())
        return [StoredBatch(**row) for row in self._connection.execute(query).mappings()]


def _row(batch: StoredBatch) -> dict[str, object]:
    return {**asdict(batch), "errors": list(batch.errors)}
