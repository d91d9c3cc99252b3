"""Asynchronous requests: what was asked, what was answered, and whether somebody was told."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from controller.store.errors import NotStored
from controller.store.tables import async_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRequest:
    """One request.

    Attributes:
        key_id: Whose it is; None where keys are not in use.
        body: JSON, as it was sent; forgotten with the answer.
        answer_status: Of the answer; None before there is one.
        answer: Its body.
        webhook_status: pending, delivered or failed; None without a webhook, or before the answer.
        webhook_next_us: When to try next, while it is pending.
    """

    id: str
    key_id: str | None
    endpoint: str
    model: str
    body: bytes
    metadata_: Mapping[str, str] | None
    status: str
    created_us: int
    expires_us: int
    ended_us: int | None = None
    answer_status: int | None = None
    answer: bytes | None = None
    webhook_url: str | None = None
    webhook_status: str | None = None
    webhook_attempts: int = 0
    webhook_next_us: int | None = None
    webhook_error: str | None = None


class Requests:
    """The table of asynchronous requests, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, request: StoredRequest) -> None:
        """Add a request."""
        self._connection.execute(insert(async_requests).values(asdict(request)))

    def put(self, request: StoredRequest) -> None:
        """Replace a request; one that has been forgotten stays so."""
        self._connection.execute(
            update(async_requests).where(async_requests.c.id == request.id).values(asdict(request))
        )

    def get(self, request_id: str) -> StoredRequest:
        """Return a request.

        Raises:
            NotStored: There is none.
        """
        found = self._select(async_requests.c.id == request_id)
        if not found:
            raise NotStored(f"no request {request_id!r}")
        return found[0]

    def list(self, *, key_id: str | None, after: str | None, limit: int) -> Sequence[StoredRequest]:
        """Return a key's requests, newest first, those before a given one only.

        What was asked and answered is left out: a page of it could be gigabytes.
        """
        table = async_requests.c
        conditions: list[ColumnElement[bool]] = [table.key_id.is_not_distinct_from(key_id)]
        if after is not None:
            last = self.get(after)
            conditions.append(
                (table.created_us < last.created_us)
                | ((table.created_us == last.created_us) & (table.id < last.id))
            )
        return self._without_content(*conditions, limit=limit)

    def in_status(self, statuses: AbstractSet[str]) -> Sequence[StoredRequest]:
        """Return all requests in some statuses, newest first, without content."""
        return self._without_content(async_requests.c.status.in_(statuses))

    def undelivered(self) -> Sequence[StoredRequest]:
        """Return all requests whose webhook is still to be delivered, without content."""
        return self._without_content(async_requests.c.webhook_status == "pending")

    def total_bytes(self) -> int:
        """Return the size of all bodies and answers together."""
        table = async_requests.c
        size = func.length(table.body) + func.coalesce(func.length(table.answer), 0)
        return int(self._connection.scalar(select(func.sum(size))) or 0)

    def delete(self, request_id: str) -> None:
        """Forget a request; one that is not there is no error."""
        self._connection.execute(delete(async_requests).where(async_requests.c.id == request_id))

    def prune(self, ended_before_us: int) -> None:
        """Forget what ended earlier and has nobody left to tell."""
        table = async_requests.c
        self._connection.execute(
            delete(async_requests).where(
                (table.ended_us < ended_before_us)
                & table.webhook_status.is_distinct_from("pending")
            )
        )

    def _select(self, *conditions: ColumnElement[bool]) -> Sequence[StoredRequest]:
        query = select(async_requests).where(*conditions)
        return [StoredRequest(**row) for row in self._connection.execute(query).mappings()]

    def _without_content(
        self, *conditions: ColumnElement[bool], limit: int | None = None
    ) -> Sequence[StoredRequest]:
        columns = [one for one in async_requests.c if one.name not in ("body", "answer")]
        query = select(*columns).where(*conditions).limit(limit)
        query = query.order_by(async_requests.c.created_us.desc(), async_requests.c.id.desc())
        rows = self._connection.execute(query).mappings()
        return [StoredRequest(**row, body=b"") for row in rows]
