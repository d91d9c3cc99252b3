"""Responses that are kept, as the Responses API uses them."""

from dataclasses import dataclass

import structlog

from controller.batches.access import transact
from controller.clock import Clock, unix_us
from controller.errors import NotFound
from controller.store.database import Database
from controller.store.errors import NotStored
from controller.store.responses import Responses, StoredResponse

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseStore:
    """Keeps responses for the keys they were made with.

    Attributes:
        database: Where they are.
        clock: Dates them.
    """

    database: Database
    clock: Clock

    async def keep(
        self, response_id: str, *, key_id: str | None, body: bytes, conversation: bytes
    ) -> None:
        """Keep a response, or keep it anew.

        Raises:
            StoreUnavailable: The database is away.
        """
        response = StoredResponse(
            id=response_id,
            key_id=key_id,
            created_us=unix_us(self.clock.now()),
            body=body,
            conversation=conversation,
        )
        await transact(self.database, lambda c: Responses(c).put(response))

    async def get(self, response_id: str, *, key_id: str | None) -> StoredResponse:
        """Return a response of a key.

        Raises:
            NotFound: There is none, or it is another key's.
            StoreUnavailable: The database is away.
        """
        try:
            return await transact(
                self.database, lambda c: Responses(c).get(response_id, key_id=key_id)
            )
        except NotStored as error:
            raise _no_such_response(response_id) from error

    async def delete(self, response_id: str, *, key_id: str | None) -> None:
        """Forget a response of a key.

        Raises:
            NotFound: There is none, or it is another key's.
            StoreUnavailable: The database is away.
        """
        try:
            await transact(self.database, lambda c: Responses(c).delete(response_id, key_id=key_id))
        except NotStored as error:
            raise _no_such_response(response_id) from error

    async def sweep(self, *, retention_s: float, max_bytes: int) -> None:
        """Forget what was kept long enough, and the oldest of what is too much."""
        before_us = unix_us(self.clock.now()) - int(retention_s * 1e6)
        await self.database.run(lambda c: Responses(c).prune(before_us))
        num_evicted = await self.database.run(lambda c: Responses(c).evict(max_bytes))
        if num_evicted:
            log.warning("responses evicted", num_responses=num_evicted, max_bytes=max_bytes)


def _no_such_response(response_id: str) -> NotFound:
    return NotFound(
        f"there is no response {response_id[:64]!r}: it was never made or not kept, or it was "
        "deleted or has been kept long enough",
        param="response_id",
    )
