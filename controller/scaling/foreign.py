"""GPU memory that processes hold which are not ours: measured use less what we know of.

What our replicas hold is known within bounds. A ready or parked one has taken what it was
promised; one that is coming or going holds anything between nothing and that. So a measurement
bounds the foreign part from below and from above, and the estimate is moved only as far as all
measurements of the last seconds ask for: the driver's figures and our books may be apart while a
replica comes or goes.
"""

from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field

import structlog

from controller.scaling.placement import MemoryLedger

log = structlog.get_logger(__name__)

SETTLE_S = 2.0
IGNORED_BYTES = 1 << 30
"""Less than this may be the driver's own, or in what replicas say that they keep when parked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bounds:
    at: float
    least: int
    most: int


@dataclass(slots=True)
class _Estimate:
    num_bytes: int = 0
    seen: deque[_Bounds] = field(default_factory=deque)

    @property
    def counted_bytes(self) -> int:
        return self.num_bytes if self.num_bytes >= IGNORED_BYTES else 0

    def note(self, bounds: _Bounds) -> None:
        self.seen.append(bounds)
        settled_at = bounds.at - SETTLE_S
        while len(self.seen) > 1 and self.seen[1].at <= settled_at:
            self.seen.popleft()
        if self.seen[0].at <= settled_at:
            least, most = min(one.least for one in self.seen), max(one.most for one in self.seen)
            self.num_bytes = min(max(self.num_bytes, least), most)


class ForeignMemory:
    """Keeps the node's books informed of what others hold.

    Args:
        memory: The books.
    """

    def __init__(self, memory: MemoryLedger) -> None:
        self._memory = memory
        self._estimates = {device_id: _Estimate() for device_id in memory.devices}

    def begin(self, device_id: str, used_bytes: int | None) -> None:
        """Take what is in use before anything of ours begins; beyond all promises it is foreign."""
        if used_bytes is not None:
            promised_bytes = sum(self._memory.held(device_id).values())
            estimate = self._estimates[device_id]
            estimate.num_bytes = max(used_bytes - promised_bytes, 0)
            self._tell(device_id, estimate.counted_bytes)

    def note(
        self, device_id: str, used_bytes: int | None, *, resting: Container[str], now: float
    ) -> None:
        """Take a measurement.

        Args:
            device_id: Of which device.
            used_bytes: What is in use of it; None if that cannot be read, then nothing is foreign.
            resting: The replicas that have taken all that they were promised.
            now: Monotonic seconds.
        """
        if used_bytes is None:
            self._estimates[device_id] = _Estimate()
            self._tell(device_id, None)
            return
        held = self._memory.held(device_id)
        taken_bytes = sum(num_bytes for one, num_bytes in held.items() if one in resting)
        estimate = self._estimates[device_id]
        estimate.note(
            _Bounds(
                at=now,
                least=max(used_bytes - sum(held.values()), 0),
                most=max(used_bytes - taken_bytes, 0),
            )
        )
        self._tell(device_id, estimate.counted_bytes)

    def _tell(self, device_id: str, num_bytes: int | None) -> None:
        before = self._memory.foreign_bytes(device_id)
        if bool(num_bytes) is not bool(before):
            log.warning("foreign device memory", device=device_id, num_bytes=num_bytes)
        self._memory.set_foreign(device_id, num_bytes)
