"""Pure scaling decisions: how many replicas a function needs, and whether a schedule holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from apscheduler.triggers.cron import CronTrigger

from functions.spec import ScalingSpec, ScheduleSpec

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0
NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Replicas to keep ready, and the stretch of time for which that is known.

    Finding out means a search of the calendar, far too slow for every decision.
    """

    num_replicas: int
    since: datetime
    until: datetime

    def holds(self, now: datetime) -> bool:
        """Return whether it is still so; not when the wall clock has gone back behind it."""
        return self.since <= now < self.until


def needed_replicas(scaling: ScalingSpec, *, load: int, floor: int) -> int:
    """Return how many ready replicas the load asks for.

    Args:
        scaling: The function's limits.
        load: Requests in flight and queued.
        floor: Replicas that must be up whatever the load, from min_replicas and schedules.
    """
    by_load = math.ceil(load / scaling.target_concurrency)
    return min(max(by_load, floor), scaling.max_replicas)


def replica_floor(scaling: ScalingSpec, schedules: Sequence[ScheduleSpec], now: datetime) -> Floor:
    """Return the replicas to keep ready at an aware moment: the spec's, raised by schedules."""
    num_replicas, until = scaling.min_replicas, NEVER
    for schedule in schedules:
        is_open, edge = window(schedule, now)
        num_replicas = max(num_replicas, schedule.min_replicas if is_open else 0)
        until = min(until, edge)
    return Floor(num_replicas=num_replicas, since=now, until=until)


def window(schedule: ScheduleSpec, now: datetime) -> tuple[bool, datetime]:
    """Return whether a schedule fired less than its duration ago, and when to look again.

    Level-triggered: a controller that was down when the schedule fired still keeps the promise.
    """
    duration = timedelta(seconds=schedule.duration)
    fires = cron_trigger(schedule).get_next_fire_time(
        None, now - duration + timedelta(microseconds=1)
    )
    if fires is None:
        return False, NEVER
    opens = fires.astimezone(UTC)  # a sum of local times would miss a change to summer time
    return (True, opens + duration) if opens <= now else (False, opens)


def cron_trigger(schedule: ScheduleSpec) -> CronTrigger:
    """Return the moments a schedule's window opens, in its own time zone."""
    fields = schedule.fields
    return CronTrigger(
        minute=fields.minute,
        hour=fields.hour,
        day=fields.day,
        month=fields.month,
        day_of_week=fields.day_of_week,
        timezone=schedule.timezone,
    )


def backoff_s(num_failures: int) -> float:
    """Return how long to wait before another start after consecutive failures."""
    if num_failures == 0:
        return 0.0
    doublings = min(max(num_failures - 1, 0), 16)
    return min(FIRST_BACKOFF_S * 2.0**doublings, MAX_BACKOFF_S)
