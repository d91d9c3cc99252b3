"""Responses that are kept: what was answered, and all it was answered from."""

from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, func, insert, select

from controller.store.errors import NotStored
from controller.store.tables import responses

EVICTED_AT_ONCE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """One response.

    Attributes:
        key_id: Whose it is; None where keys are not in use.
        body: The response, as JSON.
        conversation: What it answers, earlier responses included, as a JSON list of items. So no
            response needs another one, which may be gone.
    """

    id: str
    key_id: str | None
    created_us: int
    body: bytes
    conversation: bytes


class Responses:
    """The table of kept responses, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def put(self, response: StoredResponse) -> None:
        """Add a response, or replace it."""
        self._connection.execute(delete(responses).where(responses.c.id == response.id))
        num_bytes = len(response.body) + len(response.conversation)
        values = {**asdict(response), "num_bytes": num_bytes}
        self._connection.execute(insert(responses).values(values))

    def get(self, response_id: str, *, key_id: str | None) -> StoredResponse:
        """Return a response of a key.

        Raises:
            NotStored: There is none, or it is another key's.
        """
        table = responses.c
        query = select(
            table.id, table.key_id, table.created_us, table.body, table.conversation
        ).where((table.id == response_id) & table.key_id.is_not_distinct_from(key_id))
        row = self._connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotStored(f"no response {response_id!r}")
        return StoredResponse(**row)

    def delete(self, response_id: str, *, key_id: str | None) -> None:
        """Forget a response of a key.

        Raises:
            NotStored: There is none, or it is another key's.
        """
        table = responses.c
        gone = self._connection.execute(
            delete(responses).where(
                (table.id == response_id) & table.key_id.is_not_distinct_from(key_id)
            )
        )
        if not gone.rowcount:
            raise NotStored(f"no response {response_id!r}")

    def prune(self, created_before_us: int) -> None:
        """Forget what is older."""
        self._connection.execute(
            delete(responses).where(responses.c.created_us < created_before_us)
        )

    def evict(self, max_bytes: int) -> int:
        """Forget the oldest until the others have no more bytes together.

        Returns:
            How many are forgotten.
        """
        table, num_evicted = responses.c, 0
        num_bytes = int(self._connection.scalar(select(func.sum(table.num_bytes))) or 0)
        while num_bytes > max_bytes:
            oldest = self._connection.execute(
                select(table.id, table.num_bytes)
                .order_by(table.created_us, table.id)
                .limit(EVICTED_AT_ONCE)
            ).all()
            gone = []
            for response_id, size in oldest:
                if num_bytes <= max_bytes:
                    break
                gone.append(response_id)
                num_bytes -= size
            self._connection.execute(delete(responses).where(table.id.in_(gone)))
            num_evicted += len(gone)
        return num_evicted
