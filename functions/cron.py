"""Five-field cron expressions, checked, with the day of week as cron counts it.

Only syntax and ranges; when a schedule fires is the controller's business. Schedulers disagree
on weekday numbers (cron's Sunday is 0 or 7, APScheduler's Monday is 0), so `CronFields` spells
weekdays as names, which all of them read alike.
"""

import re
from dataclasses import dataclass

WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")

LAST_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_PART = re.compile(r"(\*|[a-z]{3}|\d{1,2})(?:-([a-z]{3}|\d{1,2}))?(?:/(\d{1,2}))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class CronFields:
    """The five fields; numbers as cron counts them, weekdays as comma-separated names."""

    minute: str
    hour: str
    day: str
    month: str
    day_of_week: str


def parse_cron(expression: str) -> CronFields:
    """Return the fields of `minute hour day month weekday`.

    Lists, ranges, steps and three-letter English names are understood. A day of month and a day
    of week together are refused: cron runs on either, most schedulers on both. So are days that
    none of the months has: a scheduler would search the calendar for them, again and again.

    Raises:
        ValueError: The expression cannot be used; the message says which field and why.
    """
    fields = expression.lower().split()
    if len(fields) != 5:
        raise ValueError(
            f"must have five fields: minute hour day month weekday, such as '0 8 * * 1-5', not {len(fields)}"
        )
    minute = _expand("minute", fields[0], 0, 59)
    hour = _expand("hour", fields[1], 0, 23)
    day = _expand("day of month", fields[2], 1, 31)
    month = _expand("month", fields[3], 1, 12, names=dict(zip(MONTHS, range(1, 13), strict=True)))
    weekday = _expand("weekday", fields[4], 0, 7, names={n: i for i, n in enumerate(WEEKDAYS)})
    weekdays = sorted({number % 7 for number in weekday})
    if len(day) < 31 and len(weekdays) < 7:
        raise ValueError(
            "must restrict the day of month or the day of week, not both; write two schedules"
        )
    if day[0] > max(LAST_DAYS[number - 1] for number in month):
        raise ValueError(f"must name a day that one of its months has, not {day[0]} of {fields[3]}")
    return CronFields(
        minute=_joined(minute, 60),
        hour=_joined(hour, 24),
        day=_joined(day, 31),
        month=_joined(month, 12),
        day_of_week="*" if len(weekdays) == 7 else ",".join(WEEKDAYS[day] for day in weekdays),
    )


def _joined(numbers: list[int], num_possible: int) -> str:
    return "*" if len(numbers) == num_possible else ",".join(map(str, numbers))


def _expand(
    field: str, text: str, low: int, high: int, *, names: dict[str, int] | None = None
) -> list[int]:
    numbers: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"must have a {field} such as *, 5, 1-5, */10 or 1,2, not {part!r}")
        first, last, step = match.groups()
        start, end = low, high
        if first != "*":
            start = _number(field, first, low, high, names or {})
            end = high if step and last is None else start
        if last is not None:
            end = _number(field, last, low, high, names or {})
        if (first == "*" and last is not None) or start > end or step in ("0", "00"):
            raise ValueError(
                f"must have a {field} range that goes up, with a step over 0, not {part!r}"
            )
        numbers.update(range(start, end + 1, int(step or 1)))
    return sorted(numbers)


def _number(field: str, text: str, low: int, high: int, names: dict[str, int]) -> int:
    number = names.get(text, int(text) if text.isdigit() else -1)
    if not low <= number <= high:
        raise ValueError(f"must have a {field} from {low} to {high}, not {text!r}")
    return number
