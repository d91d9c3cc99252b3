"""The books of one controller's devices: claims in, intervals out to the store.

Setters are synchronous and only touch memory; `flush` writes. The ledger's time is the wall clock
at `recover` plus monotonic seconds, so no jump of the wall clock can make intervals overlap.

Memory stays bounded while the store is away: what cannot be written is merged inside each hour,
then inside each day, with the sums unchanged, so that it grows with the replicas that came and went
and not with the requests.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Protocol

from controller.clock import Clock, unix_us
from controller.ledger.intervals import (
    DAY_US,
    HOUR_US,
    AdoptedClaim,
    Claim,
    DeviceTimeline,
    Interval,
    LedgerState,
    close_all,
    fill,
)
from controller.ledger.merging import merge, split
from controller.ledger.report import CostReport, Figures, GroupBy, build_report

MAX_PENDING = 10_000
MAX_WRITTEN = 100
"""Closed intervals one flush writes as they are; more are merged before they are written."""


class UnknownDevice(Exception):
    """A claim on a device that this ledger does not keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one flush writes. Writing it twice changes nothing.

    Attributes:
        from_us: Everything stored that is open, or ends at this moment or later, is replaced by
            this batch.
        heartbeat_us: The moment up to which the batch tells everything.
    """

    from_us: int
    closed: Sequence[Interval]
    open_intervals: Sequence[Interval]
    heartbeat_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LastKnown:
    """Where the last controller's books end.

    Attributes:
        heartbeat_us: None when there are no books yet.
        device_ends_us: End of the last closed interval of each device.
    """

    heartbeat_us: int | None
    open_intervals: Sequence[Interval]
    device_ends_us: Mapping[str, int]


class LedgerRepository(Protocol):
    """Where the books are kept."""

    async def last_known(self) -> LastKnown:
        """Return where the books end."""

    async def save(self, batch: Batch) -> None:
        """Write all of a batch or nothing."""

    async def figures(self, since_us: int, until_us: int) -> Figures:
        """Sum what is written; open intervals count up to the heartbeat."""

    async def compact(self, before_us: int) -> int:
        """Merge what ended before a full hour; returns how many intervals that saved."""


class Ledger:
    """Who holds which device, from `recover` on.

    Args:
        devices: Every device of the node with the price of an hour nobody holds it.
        clock: The controller's clock.
        repository: Where the books are kept.
        on_spent: Told of all time that passes, in intervals up to each flush; must be quick and
            not raise.
        max_pending: How many closed intervals wait unmerged while the store is away.
    """

    def __init__(
        self,
        *,
        devices: Mapping[str, Decimal],
        clock: Clock,
        repository: LedgerRepository,
        on_spent: Callable[[Interval], None] | None = None,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._rates = dict(devices)
        self._clock = clock
        self._repository = repository
        self._on_spent = on_spent
        self._max_pending = max_pending
        self._merge_at = max_pending
        self._homes: dict[str, tuple[str, ...]] = {}
        self._closed: list[Interval] = []
        self._saved_us: int | None = None  # None before recover()
        self._writing = asyncio.Lock()
        self._begin(unix_us(clock.now()))

    def _begin(self, start_us: int) -> None:
        """Let time begin; nothing is claimed."""
        self._start_us = start_us
        self._started_at = self._clock.monotonic()
        self._told_us = start_us  # up to here `_on_spent` knows everything
        self._complete_from_us = start_us  # from here on `_closed` tells everything not open
        self._replaces_from_us = start_us + 1
        self._timelines = {
            device: DeviceTimeline(device, rate_usd_per_hour=rate, start_us=start_us)
            for device, rate in self._rates.items()
        }

    @property
    def num_pending(self) -> int:
        """Closed intervals in memory; nearly all of them wait to be written."""
        return len(self._closed)

    def now_us(self) -> int:
        """Return the ledger's time in microseconds since the Unix epoch; it never goes back."""
        return self._start_us + round((self._clock.monotonic() - self._started_at) * 1e6)

    def set_claim(
        self,
        replica_id: str,
        *,
        function: str,
        devices: Sequence[str],
        state: LedgerState,
        rate_usd_per_hour: Decimal,
    ) -> None:
        """Say what a replica is doing from now on, and on which devices.

        Raises:
            UnknownDevice: The node has no such device; nothing has changed.
        """
        assert state is not LedgerState.UNALLOCATED, "a claim allocates"
        unknown = [device for device in devices if device not in self._timelines]
        if unknown:
            raise UnknownDevice(f"no device {unknown[0]!r}; this node has {sorted(self._rates)}")
        at_us = self.now_us()
        claim = Claim(
            replica_id=replica_id,
            function=function,
            state=state,
            rate_usd_per_hour=rate_usd_per_hour,
        )
        for device in self._homes.get(replica_id, ()):
            if device not in devices:
                self._keep(self._timelines[device].drop_claim(replica_id, at_us))
        self._homes[replica_id] = tuple(devices)
        for device in devices:
            self._keep(self._timelines[device].set_claim(claim, at_us))

    def drop_claim(self, replica_id: str) -> None:
        """Say that a replica is gone; harmless when it has no claim."""
        at_us = self.now_us()
        for device in self._homes.pop(replica_id, ()):
            self._keep(self._timelines[device].drop_claim(replica_id, at_us))

    async def flush(self) -> None:
        """Write everything up to now.

        Safe to cancel and to repeat. When the store fails, its error is raised and everything is
        kept for the next time. Does nothing before `recover`.
        """
        async with self._writing:
            if self._saved_us is not None:
                await self._write()

    async def recover(self, adopted: Mapping[str, AdoptedClaim]) -> None:
        """Close the books of the last controller and go on; comes before any claim.

        What it left open ended at its last heartbeat. From there to now the adopted replicas held
        their devices, the rest was unallocated. Should the wall clock have gone back behind the
        heartbeat, time begins there.

        Args:
            adopted: Replicas that still run, by id; they have their claims afterwards.
        """
        assert not self._homes, "recover() comes before any claim"
        async with self._writing:
            known = await self._repository.last_known()
            heartbeat_us = -1 if known.heartbeat_us is None else known.heartbeat_us
            self._begin(max(unix_us(self._clock.now()), heartbeat_us))
            self._closed = self._missed(known, heartbeat_us, adopted)
            for replica_id, claim in adopted.items():
                self.set_claim(
                    replica_id,
                    function=claim.function,
                    devices=claim.devices,
                    state=claim.state,
                    rate_usd_per_hour=claim.rate_usd_per_hour,
                )
            self._replaces_from_us = heartbeat_us + 1
            await self._write()

    async def cost(
        self, *, since: datetime, until: datetime | None = None, by: GroupBy = GroupBy.FUNCTION
    ) -> CostReport:
        """Return what a stretch of time cost, up to this moment at most.

        Inside hours that `compact` has merged, a boundary divides a replica's states by the merged
        order; hours and days are exact.
        """
        await self.flush()
        end_us = self.now_us() if self._saved_us is None else self._saved_us
        until_us = end_us if until is None else min(unix_us(until), end_us)
        since_us = min(unix_us(since), until_us)
        figures = await self._repository.figures(since_us, until_us)
        return build_report(
            figures, by=by, default_rate=max(self._rates.values(), default=Decimal(0))
        )

    async def compact(self) -> None:
        """Merge the stored intervals of every hour that ended an hour ago or earlier."""
        await self.flush()
        now_us = self.now_us()
        await self._repository.compact(now_us - now_us % HOUR_US - HOUR_US)

    def _missed(
        self, known: LastKnown, heartbeat_us: int, adopted: Mapping[str, AdoptedClaim]
    ) -> list[Interval]:
        """Return what no controller was there to write down."""
        missed = close_all(known.open_intervals, heartbeat_us)
        ends_us = {
            **known.device_ends_us,
            **{one.device: heartbeat_us for one in known.open_intervals},
        }
        for device, rate in self._rates.items():
            if device in ends_us:
                missed += fill(
                    device,
                    rate_usd_per_hour=rate,
                    start_us=ends_us[device],
                    end_us=self._start_us,
                    adopted=adopted,
                )
        return missed

    def _keep(self, closed: Sequence[Interval]) -> None:
        """Take closed intervals; merge when too many wait."""
        self._take(closed)
        if len(self._closed) >= self._merge_at:
            self._shrink()

    def _take(self, closed: Sequence[Interval]) -> None:
        self._closed.extend(closed)
        for interval in closed:
            assert interval.end_us is not None, "only what has ended is closed"
            self._tell(interval, interval.end_us)

    def _tell(self, interval: Interval, until_us: int) -> None:
        """Tell of an interval's time since the last flush."""
        since_us = max(interval.start_us, self._told_us)
        if self._on_spent is not None and since_us < until_us:
            self._on_spent(interval.during(since_us, until_us))

    def _shrink(self) -> None:
        """Merge closed intervals, from where they tell everything about every device."""
        at_us = self.now_us()
        for timeline in self._timelines.values():
            self._take(timeline.cut(at_us))
        before, after = split(self._closed, self._complete_from_us)
        merged = merge(after)
        if len(merged) > self._max_pending // 2:
            merged = merge(merged, stretch_us=DAY_US)
        self._closed = before + merged
        self._merge_at = max(self._max_pending, 2 * len(self._closed))

    async def _write(self) -> None:
        at_us = self.now_us()
        for timeline in self._timelines.values():
            self._keep(timeline.roll(at_us))
        if len(self._closed) > MAX_WRITTEN:
            self._shrink()
        sending, self._closed = self._closed, []
        complete_from_us, self._complete_from_us = self._complete_from_us, at_us
        current = [one for line in self._timelines.values() for one in line.open_intervals]
        for interval in current:
            self._tell(interval, at_us)
        self._told_us = at_us
        batch = Batch(
            from_us=self._replaces_from_us,
            closed=sending,
            open_intervals=current,
            heartbeat_us=at_us,
        )
        try:
            await self._repository.save(batch)
        except BaseException:
            # It may have been written all the same. The next batch replaces all of this one.
            self._closed = sending + self._closed
            self._complete_from_us = complete_from_us
            raise
        self._saved_us = at_us
        # What ends at this very moment is replaced by the next batch, so it must be in it again.
        # Nothing of ours ends where our time began, but something of the last controller's does.
        self._replaces_from_us = max(at_us, self._start_us + 1)
        again = [one for one in sending if one.end_us == at_us > self._start_us]
        self._closed = again + self._closed
