"""Uploaded and produced files: what they are, never what is in them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select

from controller.store.errors import NotStored
from controller.store.tables import files


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """One file; `key_id` is whose it is, None where keys are not in use."""

    id: str
    key_id: str | None
    filename: str
    purpose: str
    num_bytes: int
    created_us: int
    expires_us: int | None = None


class Files:
    """The files table, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, file: StoredFile) -> None:
        """Add a file; one of the same id is left as it is."""
        if not self._select(files.c.id == file.id):
            self._connection.execute(insert(files).values(asdict(file)))

    def get(self, file_id: str) -> StoredFile:
        """Return a file.

        Raises:
            NotStored: There is none.
        """
        found = self._select(files.c.id == file_id)
        if not found:
            raise NotStored(f"no file {file_id!r}")
        return found[0]

    def list(
        self,
        *,
        key_id: str | None,
        purpose: str | None,
        after: str | None,
        limit: int,
        is_ascending: bool,
    ) -> Sequence[StoredFile]:
        """Return a key's files by time, those after a given one only."""
        conditions: list[ColumnElement[bool]] = [files.c.key_id.is_not_distinct_from(key_id)]
        if purpose is not None:
            conditions.append(files.c.purpose == purpose)
        if after is not None:
            last = self.get(after)
            place = (files.c.created_us, files.c.id)
            mark = (last.created_us, last.id)
            conditions.append(_after(place, mark, is_ascending=is_ascending))
        order = (files.c.created_us, files.c.id)
        query = select(files).where(*conditions).limit(limit)
        query = query.order_by(*(one.asc() if is_ascending else one.desc() for one in order))
        return [StoredFile(**row) for row in self._connection.execute(query).mappings()]

    def delete(self, file_id: str) -> None:
        """Forget a file; one that is not there is no error."""
        self._connection.execute(delete(files).where(files.c.id == file_id))

    def expired(self, at_us: int) -> Sequence[StoredFile]:
        """Return files whose time is over."""
        return self._select(files.c.expires_us <= at_us)

    def ids(self) -> set[str]:
        """Return the ids of all files."""
        return set(self._connection.scalars(select(files.c.id)))

    def total_bytes(self) -> int:
        """Return the size of all files together."""
        return int(self._connection.scalar(select(func.sum(files.c.num_bytes))) or 0)

    def _select(self, *conditions: ColumnElement[bool]) -> Sequence[StoredFile]:
        query = select(files).where(*conditions)
        return [StoredFile(**row) for row in self._connection.execute(query).mappings()]


def _after(
    place: tuple[ColumnElement[int], ColumnElement[str]],
    mark: tuple[int, str],
    *,
    is_ascending: bool,
) -> ColumnElement[bool]:
    (moment, name), (at, last) = place, mark
    if is_ascending:
        return (moment > at) | ((moment == at) & (name > last))
    return (moment < at) | ((moment == at) & (name < last))
