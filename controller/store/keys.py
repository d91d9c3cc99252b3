"""API keys, as hashes only."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import ColumnElement, Connection, insert, select, update

from controller.store.errors import NotStored
from controller.store.tables import api_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKey:
    """One key; `expires_us` and `revoked_us` are None for never."""

    id: str
    name: str
    key_hash: str
    created_us: int
    expires_us: int | None = None
    revoked_us: int | None = None


class Keys:
    """The keys table, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, key: StoredKey) -> None:
        """Add a key."""
        self._connection.execute(insert(api_keys).values(asdict(key)))

    def find(self, key_hash: str) -> StoredKey | None:
        """Return the key with this hash, also an expired or revoked one."""
        found = self._select(api_keys.c.key_hash == key_hash)
        return found[0] if found else None

    def get(self, key_id: str) -> StoredKey:
        """Return a key, also an expired or revoked one.

        Raises:
            NotStored: There is no such key.
        """
        found = self._select(api_keys.c.id == key_id)
        if not found:
            raise NotStored(f"no API key {key_id!r}")
        return found[0]

    def list(self) -> Sequence[StoredKey]:
        """Return every key, oldest first."""
        return self._select()

    def revoke(self, key_id: str, *, at_us: int) -> None:
        """Make a key useless from now on; a revoked key keeps its first date.

        Raises:
            NotStored: There is no such key.
        """
        self.get(key_id)
        is_this = (api_keys.c.id == key_id) & api_keys.c.revoked_us.is_(None)
        self._connection.execute(update(api_keys).where(is_this).values(revoked_us=at_us))

    def _select(self, *conditions: ColumnElement[bool]) -> Sequence[StoredKey]:
        query = select(api_keys).where(*conditions).order_by(api_keys.c.created_us, api_keys.c.id)
        return [StoredKey(**row) for row in self._connection.execute(query).mappings()]
