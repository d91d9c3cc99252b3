"""The ledger's repository in memory, by the plainest arithmetic, with failures on demand."""

import asyncio
from collections import defaultdict
from enum import StrEnum
from operator import attrgetter

from controller.ledger.intervals import DAY_US, HOUR_US, Interval
from controller.ledger.ledger import Batch, LastKnown
from controller.ledger.merging import merge
from controller.ledger.report import Deployed, DeviceTime, Figures, Served
from controller.store.errors import DatabaseUnavailable


class Failure(StrEnum):
    """What becomes of a write."""

    BEFORE = "before"  # fails and nothing is written
    AFTER = "after"  # fails and everything is written
    HANGS = "hangs"  # never returns and everything is written


class FakeBooks:
    """Keeps intervals in a list; `failure` makes every save fail until it is taken away."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []
        self.heartbeat_us: int | None = None
        self.failure: Failure | None = None
        self.served: list[Served] = []
        self.deployed: list[Deployed] = []

    async def last_known(self) -> LastKnown:
        ends: dict[str, int] = {}
        for one in self.intervals:
            if one.end_us is not None:
                ends[one.device] = max(one.end_us, ends.get(one.device, 0))
        return LastKnown(
            heartbeat_us=self.heartbeat_us,
            open_intervals=[one for one in self.intervals if one.end_us is None],
            device_ends_us=ends,
        )

    async def save(self, batch: Batch) -> None:
        if self.failure is Failure.BEFORE:
            raise DatabaseUnavailable("nothing was written")
        kept = [
            one for one in self.intervals if one.end_us is not None and one.end_us < batch.from_us
        ]
        self.intervals = [*kept, *batch.closed, *batch.open_intervals]
        self.heartbeat_us = batch.heartbeat_us
        if self.failure is Failure.AFTER:
            raise DatabaseUnavailable("everything was written, but nobody knows")
        if self.failure is Failure.HANGS:
            await asyncio.Event().wait()

    async def figures(self, since_us: int, until_us: int) -> Figures:
        sums: dict[DeviceTime, int] = defaultdict(int)
        for one in self.told():
            assert one.end_us is not None
            duration_us = min(one.end_us, until_us) - max(one.start_us, since_us)
            if duration_us > 0:
                key = DeviceTime(
                    device=one.device,
                    function=one.function,
                    replica_id=one.replica_id,
                    state=one.state,
                    rate_usd_per_hour=one.rate_usd_per_hour,
                    day=one.start_us // DAY_US,
                    device_time=0,
                )
                sums[key] += duration_us * one.share_ppm
        return Figures(
            since_us=since_us,
            until_us=until_us,
            device_times=[_with_time(key, time) for key, time in sums.items()],
            served=self.served,
            deployed=self.deployed,
        )

    async def compact(self, before_us: int) -> int:
        due = [
            one
            for one in self.intervals
            if one.end_us is not None and one.start_us < before_us - before_us % HOUR_US
        ]
        rest = [one for one in self.intervals if one not in due]
        merged = merge(due)
        self.intervals = [*merged, *rest]
        return len(due) - len(merged)

    def told(self) -> list[Interval]:
        """Return all intervals, the open ones up to the heartbeat, by start."""
        until_us = self.heartbeat_us or 0
        closed = [
            one.during(one.start_us, until_us if one.end_us is None else one.end_us)
            for one in self.intervals
        ]
        return sorted(closed, key=attrgetter("device", "start_us"))


def _with_time(key: DeviceTime, device_time: int) -> DeviceTime:
    return DeviceTime(
        device=key.device,
        function=key.function,
        replica_id=key.replica_id,
        state=key.state,
        rate_usd_per_hour=key.rate_usd_per_hour,
        day=key.day,
        device_time=device_time,
    )
