"""A batch's statuses and the moves between them. Pure.

validating → in_progress → finalizing → completed
│             ├→ cancelling → finalizing → cancelled
└→ failed     └→ finalizing → expired
"""

from dataclasses import replace
from enum import StrEnum

from controller.store.batches import StoredBatch


class BatchStatus(StrEnum):
    """Where a batch is, in OpenAI's words."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED = frozenset(
    {BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)
EXPIRING = "expiring"
"""The moment, among those of the statuses, at which a batch ran out of time."""
LIVE = frozenset(BatchStatus) - ENDED


def moved(batch: StoredBatch, status: BatchStatus, at_us: int) -> StoredBatch:
    """Return a batch in another status; the first moment of each status is kept."""
    return replace(batch, status=str(status), moments={str(status): at_us} | dict(batch.moments))


def last_status(batch: StoredBatch) -> BatchStatus:
    """Return how a batch ends whose answers are being put together."""
    if BatchStatus.CANCELLING in batch.moments:
        return BatchStatus.CANCELLED
    return BatchStatus.EXPIRED if EXPIRING in batch.moments else BatchStatus.COMPLETED
