"""Ledger intervals and the heartbeat up to which they tell everything."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from controller.ledger.intervals import HOUR_US, Interval, LedgerState
from controller.ledger.merging import merge
from controller.ledger.report import DeviceTime
from controller.store.tables import day_of, hour_of, intervals, ledger_heartbeat

HEARTBEAT_ID = 1


class Intervals:
    """The intervals and heartbeat tables, inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def heartbeat_us(self) -> int | None:
        """Return the moment up to which the books are written; None when there are none."""
        return self._connection.scalar(select(ledger_heartbeat.c.at_us))

    def beat(self, at_us: int) -> None:
        """Move the heartbeat."""
        if not self._connection.execute(update(ledger_heartbeat).values(at_us=at_us)).rowcount:
            self._connection.execute(
                insert(ledger_heartbeat).values(id=HEARTBEAT_ID, at_us=at_us, compacted_us=0)
            )

    def open_intervals(self) -> Sequence[Interval]:
        """Return what was going on at the heartbeat."""
        return self._select(intervals.c.end_us.is_(None))

    def device_ends_us(self) -> Mapping[str, int]:
        """Return the end of the last closed interval of each device."""
        query = (
            select(intervals.c.device, func.max(intervals.c.end_us).label("end_us"))
            .where(intervals.c.end_us.is_not(None))
            .group_by(intervals.c.device)
        )
        return {row.device: row.end_us for row in self._connection.execute(query)}

    def replace_from(self, from_us: int, successors: Iterable[Interval]) -> None:
        """Drop what is open, or ends at a moment or later, and put these in its place."""
        later = or_(intervals.c.end_us.is_(None), intervals.c.end_us >= from_us)
        self._connection.execute(delete(intervals).where(later))
        self._insert(successors)

    def device_times(self, since_us: int, until_us: int) -> Sequence[DeviceTime]:
        """Sum [since_us, until_us); what is open counts up to the heartbeat.

        No sum leaves 64 bits: microseconds are added up by share and weighed afterwards.
        """
        heartbeat_us = self.heartbeat_us() or 0
        end_us = func.coalesce(intervals.c.end_us, heartbeat_us)
        start_us = intervals.c.start_us
        clipped_us = _at_most(end_us, until_us) - _at_least(start_us, since_us)
        day = day_of(start_us)
        groups = (
            intervals.c.device,
            intervals.c.function,
            intervals.c.replica_id,
            intervals.c.state,
            intervals.c.rate_usd_per_hour,
            intervals.c.share_ppm,
            day,
        )
        query = (
            select(*groups, func.sum(clipped_us).label("duration_us"))
            .where(_overlaps(since_us, until_us), end_us > since_us)
            .group_by(*groups)
        )
        return [_device_time(row) for row in self._connection.execute(query)]

    def compact(self, before_us: int) -> int:
        """Merge each full hour that ended before a moment and has not been merged yet.

        Returns:
            How many intervals that saved.
        """
        done_us = self._connection.scalar(select(ledger_heartbeat.c.compacted_us)) or 0
        hour = hour_of(intervals.c.start_us)
        is_due = (
            intervals.c.end_us.is_not(None),
            intervals.c.start_us >= done_us,
            intervals.c.start_us < before_us - before_us % HOUR_US,
        )
        hours = self._connection.scalars(select(hour).where(*is_due).distinct().order_by(hour))
        num_saved = sum(self._compact_hour(number * HOUR_US) for number in hours.all())
        self._connection.execute(update(ledger_heartbeat).values(compacted_us=before_us))
        return num_saved

    def _compact_hour(self, hour_us: int) -> int:
        inside = and_(
            intervals.c.start_us >= hour_us,
            intervals.c.start_us < hour_us + HOUR_US,
            intervals.c.end_us.is_not(None),
        )
        fine = self._select(inside)
        merged = merge(fine)
        if len(merged) < len(fine):
            self._connection.execute(delete(intervals).where(inside))
            self._insert(merged)
        return len(fine) - len(merged)

    def _insert(self, new: Iterable[Interval]) -> None:
        rows = [asdict(interval) for interval in new]
        if rows:
            self._connection.execute(insert(intervals), rows)

    def _select(self, condition: ColumnElement[bool]) -> Sequence[Interval]:
        columns = [column for column in intervals.c if column.name != "id"]
        in_order = (intervals.c.device, intervals.c.start_us, intervals.c.id)
        rows = self._connection.execute(select(*columns).where(condition).order_by(*in_order))
        return [Interval(**{**row, "state": LedgerState(row["state"])}) for row in rows.mappings()]


def _overlaps(since_us: int, until_us: int) -> ColumnElement[bool]:
    ends_later = or_(intervals.c.end_us.is_(None), intervals.c.end_us > since_us)
    return ends_later & (intervals.c.start_us < until_us)


def _at_most(value: ColumnElement[Any], limit: int) -> ColumnElement[Any]:
    return case((value < limit, value), else_=limit)


def _at_least(value: ColumnElement[Any], limit: int) -> ColumnElement[Any]:
    return case((value > limit, value), else_=limit)


def _device_time(row: Any) -> DeviceTime:
    return DeviceTime(
        device=row.device,
        function=row.function,
        replica_id=row.replica_id,
        state=LedgerState(row.state),
        rate_usd_per_hour=row.rate_usd_per_hour,
        day=int(row.day),
        device_time=int(row.duration_us) * row.share_ppm,
    )
