"""Pure scaling decisions: how many replicas a function needs, and whether a schedule holds."""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.combining import OrTrigger
from apscheduler.triggers.cron import CronTrigger

from functions.spec import ScalingSpec, ScheduleSpec

FIRST_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


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
    held = (schedule.min_replicas for schedule in schedules if is_in_window(schedule, now))
    return max(scaling.min_replicas, *held, 0)


def is_in_window(schedule: ScheduleSpec, now: datetime) -> bool:
    """Return whether a schedule fired within its duration before now.

    Level-triggered: a controller that was down when the schedule fired still keeps the promise.
    """
    opened = cron_trigger(schedule).get_next_fire_time(
        None, now - timedelta(seconds=schedule.duration)
    )
    return opened is not None and opened <= now


def cron_trigger(schedule: ScheduleSpec) -> BaseTrigger:
    """Return the moments a schedule's window opens, in its own time zone.

    Standard cron, which APScheduler's own parser is not: it counts weekdays from Monday = 0, and
    wants day of month and weekday both to match where cron is content with either.
    """
    minute, hour, day, month, weekday = schedule.cron.split()
    zone = schedule.timezone
    weekdays = "*" if weekday == "*" else _weekday_names(weekday)
    if day == "*" or weekday == "*":
        return CronTrigger(
            minute=minute, hour=hour, day=day, month=month, day_of_week=weekdays, timezone=zone
        )
    by_day = CronTrigger(minute=minute, hour=hour, day=day, month=month, timezone=zone)
    by_weekday = CronTrigger(
        minute=minute, hour=hour, month=month, day_of_week=weekdays, timezone=zone
    )
    return OrTrigger([by_day, by_weekday])


def _weekday_names(field: str) -> str:
    """Translate cron's weekdays, where 0 and 7 are Sunday, to APScheduler's names."""
    chosen: set[int] = set()
    for part in field.lower().split(","):
        span, _, step = part.partition("/")
        if span == "*":
            first, last = 0, 6
        else:
            start, _, end = span.partition("-")
            first = _weekday_number(start)
            last = _weekday_number(end) if end else (6 if step else first)
        chosen.update(day % 7 for day in range(first, last + 1, int(step or 1)))
    if not chosen:
        raise ValueError(f"the weekday field {field!r} matches no day")
    return ",".join(WEEKDAYS[day] for day in sorted(chosen))


def _weekday_number(text: str) -> int:
    return WEEKDAYS.index(text) if text in WEEKDAYS else int(text)


def backoff_s(num_failures: int) -> float:
    """Return how long to wait before another start after consecutive failures."""
    return min(FIRST_BACKOFF_S * 2.0 ** max(num_failures - 1, 0), MAX_BACKOFF_S)
