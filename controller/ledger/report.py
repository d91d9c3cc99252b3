"""What a stretch of time cost, by function, day or device. Pure.

Parked and unallocated time costs no function: it is given back. `always_on_usd` is what one replica
that never goes away would have cost.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any

from controller.ledger.intervals import DAY_US, GIVEN_BACK, WHOLE_PPM, LedgerState
from controller.ledger.pricing import device_seconds, usd

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class GroupBy(StrEnum):
    """What a row stands for."""

    FUNCTION = "function"
    DAY = "day"
    DEVICE = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTime:
    """Summed intervals of one replica in one state on one day.

    Attributes:
        day: Whole days since the epoch, UTC.
        device_time: Microseconds times millionths of the device.
    """

    device: str
    function: str | None
    replica_id: str | None
    state: LedgerState
    rate_usd_per_hour: Decimal
    day: int
    device_time: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Summed requests of one replica on one day; no replica when a request never got one."""

    function: str
    replica_id: str | None
    day: int
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """A stretch of time a revision of a function was the current one.

    Attributes:
        until_us: None while it is.
        rate_usd_per_hour: None for the node's price.
    """

    function: str
    from_us: int
    until_us: int | None
    num_devices: int
    rate_usd_per_hour: Decimal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Everything a report is made of, for one stretch of time [since_us, until_us)."""

    since_us: int
    until_us: int
    device_times: Sequence[DeviceTime] = ()
    served: Sequence[Served] = ()
    deployed: Sequence[Deployed] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """One line of a report; every figure of the total is the sum of the column.

    Attributes:
        group: Function, ISO day or device; None for time no function held.
        seconds: Device-seconds in each state, exact.
        active_usd: Cost while at least one request was in flight.
        idle_usd: Cost while ready and idle.
        other_usd: Cost of starting, loading, draining and failing.
        given_back_usd: Worth of the time no function paid for.
        always_on_usd: Cost of one replica that never goes away; of a device, all its time.
    """

    group: str | None
    seconds: Mapping[LedgerState, Decimal]
    active_usd: Decimal = Decimal(0)
    idle_usd: Decimal = Decimal(0)
    other_usd: Decimal = Decimal(0)
    given_back_usd: Decimal = Decimal(0)
    always_on_usd: Decimal = Decimal(0)
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def cost_usd(self) -> Decimal:
        """What the functions pay."""
        return self.active_usd + self.idle_usd + self.other_usd

    def to_json(self) -> dict[str, Any]:
        """Return the row with decimals as strings."""
        return {
            "group": self.group,
            **{f"{state}_s": f"{self.seconds[state]:f}" for state in LedgerState},
            "cost_usd": f"{self.cost_usd:f}",
            "active_cost_usd": f"{self.active_usd:f}",
            "idle_cost_usd": f"{self.idle_usd:f}",
            "given_back_usd": f"{self.given_back_usd:f}",
            "always_on_cost_usd": f"{self.always_on_usd:f}",
            "requests": self.num_requests,
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": self.num_output_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport:
    """Rows by group, and their sum."""

    since: datetime
    until: datetime
    by: GroupBy
    rows: tuple[CostRow, ...]
    total: CostRow
    currency: str = "USD"

    def to_json(self) -> dict[str, Any]:
        """Return the report as the admin API gives it."""
        return {
            "since": self.since.isoformat(),
            "until": self.until.isoformat(),
            "by": self.by.value,
            "currency": self.currency,
            "rows": [row.to_json() for row in self.rows],
            "total": self.total.to_json(),
        }


@dataclass(slots=True)
class _Group:
    """What is being collected for one row."""

    device_times: list[DeviceTime] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    always_on: list[tuple[int, Decimal]] = field(default_factory=list)


def build_report(figures: Figures, *, by: GroupBy, default_rate: Decimal) -> CostReport:
    """Return the report of a stretch of time.

    Args:
        figures: What happened.
        by: What a row stands for.
        default_rate: Price of a device-hour for functions that set none.
    """
    groups: dict[str | None, _Group] = defaultdict(_Group)
    for held in figures.device_times:
        groups[_time_group(held, by)].device_times.append(held)
    for device, served in _served_groups(figures, by):
        groups[device].served.append(served)
    for group, priced in _always_on(figures, by, default_rate):
        groups[group].always_on.append(priced)
    named = sorted((name, group) for name, group in groups.items() if name is not None)
    rows = tuple(_row(name, group) for name, group in named)
    if None in groups:
        rows += (_row(None, groups[None]),)
    return CostReport(
        since=_moment(figures.since_us),
        until=_moment(figures.until_us),
        by=by,
        rows=rows,
        total=_total(rows, figures.served),
    )


def _time_group(held: DeviceTime, by: GroupBy) -> str | None:
    if by is GroupBy.FUNCTION:
        return held.function
    return _day(held.day) if by is GroupBy.DAY else held.device


def _served_groups(figures: Figures, by: GroupBy) -> Iterable[tuple[str | None, Served]]:
    """Pair requests with their rows; one on several devices is in the row of each."""
    devices: dict[str | None, set[str]] = defaultdict(set)
    for held in figures.device_times:
        devices[held.replica_id].add(held.device)
    for served in figures.served:
        match by:
            case GroupBy.FUNCTION:
                yield served.function, served
            case GroupBy.DAY:
                yield _day(served.day), served
            case GroupBy.DEVICE if served.replica_id is not None:
                for device in sorted(devices[served.replica_id]):
                    yield device, served


def _always_on(
    figures: Figures, by: GroupBy, default_rate: Decimal
) -> Iterable[tuple[str | None, tuple[int, Decimal]]]:
    if by is GroupBy.DEVICE:
        for held in figures.device_times:
            yield held.device, (held.device_time, held.rate_usd_per_hour)
        return
    for deployed in figures.deployed:
        price = deployed.rate_usd_per_hour
        rate = default_rate if price is None else price
        for day, duration_us in _days(deployed, figures):
            group = deployed.function if by is GroupBy.FUNCTION else _day(day)
            yield group, (duration_us * deployed.num_devices * WHOLE_PPM, rate)


def _days(deployed: Deployed, figures: Figures) -> Iterable[tuple[int, int]]:
    """Yield each day a deployment was there, inside the report, with its duration."""
    start_us = max(deployed.from_us, figures.since_us)
    until_us = figures.until_us
    end_us = until_us if deployed.until_us is None else min(deployed.until_us, until_us)
    while start_us < end_us:
        day = start_us // DAY_US
        stop_us = min(end_us, (day + 1) * DAY_US)
        yield day, stop_us - start_us
        start_us = stop_us


def _row(name: str | None, group: _Group) -> CostRow:
    times: dict[LedgerState, list[DeviceTime]] = {state: [] for state in LedgerState}
    for held in group.device_times:
        times[held.state].append(held)

    def cost(states: Iterable[LedgerState]) -> Decimal:
        held = (one for state in states for one in times[state])
        return usd((one.device_time, one.rate_usd_per_hour) for one in held)

    return CostRow(
        group=name,
        seconds={
            state: device_seconds(sum(one.device_time for one in held))
            for state, held in times.items()
        },
        active_usd=cost([LedgerState.ACTIVE]),
        idle_usd=cost([LedgerState.IDLE]),
        other_usd=cost(set(LedgerState) - GIVEN_BACK - {LedgerState.ACTIVE, LedgerState.IDLE}),
        given_back_usd=cost(GIVEN_BACK),
        always_on_usd=usd(group.always_on),
        **_requests(group.served),
    )


def _total(rows: Sequence[CostRow], served: Sequence[Served]) -> CostRow:
    def column(figure: Callable[[CostRow], Decimal]) -> Decimal:
        return sum(map(figure, rows), start=Decimal(0))

    return CostRow(
        group=None,
        seconds={
            state: sum((row.seconds[state] for row in rows), Decimal(0)) for state in LedgerState
        },
        active_usd=column(lambda row: row.active_usd),
        idle_usd=column(lambda row: row.idle_usd),
        other_usd=column(lambda row: row.other_usd),
        given_back_usd=column(lambda row: row.given_back_usd),
        always_on_usd=column(lambda row: row.always_on_usd),
        **_requests(served),
    )


def _requests(served: Iterable[Served]) -> dict[str, Any]:
    lines = list(served)
    return {
        "num_requests": sum(line.num_requests for line in lines),
        "num_prompt_tokens": sum(line.num_prompt_tokens for line in lines),
        "num_output_tokens": sum(line.num_output_tokens for line in lines),
    }


def _day(day: int) -> str:
    return (EPOCH + timedelta(days=day)).date().isoformat()


def _moment(at_us: int) -> datetime:
    return EPOCH + timedelta(microseconds=at_us)
