"""All batches of one controller: made, looked at, cancelled, taken up again after a restart."""

import asyncio
import secrets
from collections.abc import Mapping, Sequence

import structlog

from controller.batches.access import transact
from controller.batches.batch import ENDED, LIVE
from controller.batches.run import BatchNode, BatchRun
from controller.clock import unix_us
from controller.errors import Conflict, InvalidRequest, NotFound, QueueFull
from controller.store.batches import Batches, StoredBatch
from controller.store.errors import NotStored

log = structlog.get_logger(__name__)

PREFIX = "batch_"
INPUT_PURPOSE = "batch"
MAX_LIVE = 1000
RETRY_S = 60.0
DAY_US = 86_400 * 1_000_000
_LIVE_STATUSES = frozenset(map(str, LIVE))
_ENDED_STATUSES = frozenset(map(str, ENDED))


class BatchService:
    """Every batch that has not ended has a task.

    Args:
        node: What they share.
    """

    def __init__(self, node: BatchNode) -> None:
        self._node = node
        self._runs: dict[str, BatchRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Take up what an earlier controller has left."""
        live = await self._node.database.run(lambda c: Batches(c).in_status(_LIVE_STATUSES))
        for batch in reversed(live):  # the oldest first
            self._begin(batch)

    async def stop(self) -> None:
        """Stop all work; the next start goes on with it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def look(self) -> None:
        """Have every batch look again at what it may do; called on a tick."""
        for run in self._runs.values():
            run.look()

    async def create(
        self,
        *,
        key_id: str | None,
        endpoint: str,
        input_file_id: str,
        completion_window: str,
        window_s: float,
        metadata: Mapping[str, str] | None,
    ) -> StoredBatch:
        """Accept a batch; its input is checked afterwards.

        Raises:
            NotFound: There is no such file.
            InvalidRequest: The file is for something else.
            QueueFull: Too many batches are under way.
        """
        file = await self._node.files.get(input_file_id, key_id=key_id)
        if file.purpose != INPUT_PURPOSE:
            raise InvalidRequest(
                f"input_file_id: the purpose of {file.id!r} is {file.purpose!r}; upload it with "
                f"{INPUT_PURPOSE!r}",
                param="input_file_id",
            )
        if len(self._runs) >= MAX_LIVE:
            raise QueueFull(f"{MAX_LIVE} batches are under way; retry later", retry_after_s=60.0)
        now_us = unix_us(self._node.clock.now())
        batch = StoredBatch(
            id=PREFIX + secrets.token_hex(12),
            key_id=key_id,
            endpoint=endpoint,
            input_file_id=file.id,
            completion_window=completion_window,
            metadata_=metadata,
            status="validating",
            created_us=now_us,
            expires_us=now_us + int(window_s * 1e6),
        )
        await transact(self._node.database, lambda c: Batches(c).add(batch))
        self._begin(batch)
        return batch

    async def get(self, batch_id: str, *, key_id: str | None) -> StoredBatch:
        """Return a batch of a key as it is now.

        Raises:
            NotFound: There is none, or it is another key's.
        """
        run = self._runs.get(batch_id)
        if run is not None:
            batch = run.batch
        else:
            try:
                batch = await transact(self._node.database, lambda c: Batches(c).get(batch_id))
            except NotStored as error:
                raise _no_such_batch(batch_id) from error
        if batch.key_id != key_id:
            raise _no_such_batch(batch_id)
        return batch

    async def list(
        self, *, key_id: str | None, after: str | None, limit: int
    ) -> Sequence[StoredBatch]:
        """Return a key's batches, newest first.

        Raises:
            NotFound: There is no batch `after`.
        """
        if after is not None:
            await self.get(after, key_id=key_id)
        found = await transact(
            self._node.database,
            lambda c: Batches(c).list(key_id=key_id, after=after, limit=limit),
        )
        return [self._runs[one.id].batch if one.id in self._runs else one for one in found]

    async def cancel(self, batch_id: str, *, key_id: str | None) -> StoredBatch:
        """Ask for a batch's end.

        Raises:
            NotFound: There is none, or it is another key's.
            Conflict: It has ended.
        """
        batch = await self.get(batch_id, key_id=key_id)
        run = self._runs.get(batch_id)
        if run is None or batch.status not in LIVE:  # one that has ended is let go a moment later
            raise Conflict(f"the batch {batch_id!r} is {batch.status}; nothing is left to cancel")
        await run.cancel()
        return run.batch

    def check_unused(self, file_id: str) -> None:
        """Raise Conflict if a batch under way reads a file."""
        reader = self._reader_of(file_id)
        if reader is not None:
            raise Conflict(
                f"the batch {reader!r} reads {file_id!r}; cancel it, or wait for its end"
            )

    def is_used(self, file_id: str) -> bool:
        """Return whether a batch under way reads a file."""
        return self._reader_of(file_id) is not None

    def _reader_of(self, file_id: str) -> str | None:
        batches = (run.batch for run in self._runs.values() if run.batch.status in LIVE)
        return next((one.id for one in batches if one.input_file_id == file_id), None)

    async def prune(self, history_days: int) -> None:
        """Forget old batches that have ended; their files stay."""
        before_us = unix_us(self._node.clock.now()) - history_days * DAY_US
        await self._node.database.run(lambda c: Batches(c).prune(before_us, _ENDED_STATUSES))

    def _begin(self, batch: StoredBatch) -> None:
        run = BatchRun(batch, self._node)
        self._runs[batch.id] = run
        task = asyncio.create_task(self._run(run), name=f"run {batch.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, run: BatchRun) -> None:
        try:
            while True:
                try:
                    await run.run()
                    return
                except Exception:  # a full disk, say: what is done is kept, the rest waits
                    log.exception("batch interrupted", batch_id=run.batch.id)
                    await asyncio.sleep(RETRY_S)
        finally:
            del self._runs[run.batch.id]


def _no_such_batch(batch_id: str) -> NotFound:
    return NotFound(
        f"there is no batch {batch_id[:64]!r}; GET /v1/batches lists yours", param="batch_id"
    )
