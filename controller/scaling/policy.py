"""Pure scaling decisions: how many replicas a function needs, and whether a schedule holds."""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta

from apscheduler.triggers.cron import CronTrigger

from functions.spec import ScalingSpec, ScheduleSpec

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0


def needed_replicas(scaling: ScalingSpec, *, load: int, floor: int) -> int:
    """Return how many ready replicas the load asks for.

    Args:
        scaling: The function's limits.
        load: Requests in flight and queued.
        floor: Replicas that must be up whatever the load, from min_replicas and schedules.
    """
    by_load = math.ceil(load / scaling.target_concurrency)
    return min(max(by_load, floor), scaling.max_replicas)


def replica_floor(scaling: ScalingSpec, schedules: Sequence[ScheduleSpec], now: datetime) -> int:
    """Return the replicas to keep ready at an aware moment: the spec's, raised by schedules."""
    held = [schedule.min_replicas for schedule in schedules if is_in_window(schedule, now)]
    return max([scaling.min_replicas, *held])


def is_in_window(schedule: ScheduleSpec, now: datetime) -> bool:
    """Return whether a schedule fired within its duration before now.

    Level-triggered: a controller that was down when the schedule fired still keeps the promise.
    """
    opened = cron_trigger(schedule).get_next_fire_time(
        None, now - timedelta(seconds=schedule.duration)
    )
    return opened is not None and opened <= now


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
    doublings = min(max(num_failures - 1, 0), 16)
    return min(FIRST_BACKOFF_S * 2.0**doublings, MAX_BACKOFF_S)
