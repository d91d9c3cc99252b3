"""Who held a device when: half-open intervals without gaps. Pure: it knows no clock and no store.

At every moment the shares of a device add up to one. Replicas that hold it share it equally; when
none does, parked replicas share it; when there are none either, it is unallocated. Intervals never
cross a full hour (UTC), so days and roll-ups need no further cutting.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from enum import StrEnum

WHOLE_PPM = 1_000_000
HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US


class LedgerState(StrEnum):
    """What a device is doing for whom."""

    STARTING = "starting"
    LOADING = "loading"
    ACTIVE = "active"  # at least one request in flight
    IDLE = "idle"
    DRAINING = "draining"
    FAILED = "failed"
    PARKED = "parked"
    UNALLOCATED = "unallocated"


GIVEN_BACK = frozenset({LedgerState.PARKED, LedgerState.UNALLOCATED})
"""States in which a device is free for others and costs no function anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one replica is doing on one device."""

    replica_id: str
    function: str
    state: LedgerState
    rate_usd_per_hour: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedClaim:
    """What a replica that outlived its controller was found doing.

    Attributes:
        last_active_us: Unix microseconds of the end of its last request; None when not known,
            which counts as idle.
    """

    function: str
    devices: Sequence[str]
    state: LedgerState
    rate_usd_per_hour: Decimal
    last_active_us: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A share of one device for a stretch of time, [start_us, end_us).

    Attributes:
        function: Who pays; None when the device is unallocated, like `replica_id`.
        end_us: None while it goes on.
        share_ppm: Part of the device, in millionths.
        rate_usd_per_hour: Price of the whole device at that time.
    """

    device: str
    function: str | None
    replica_id: str | None
    state: LedgerState
    start_us: int
    end_us: int | None = None
    share_ppm: int
    rate_usd_per_hour: Decimal

    def during(self, start_us: int, end_us: int) -> "Interval":
        """Return the same for another stretch of time."""
        return replace(self, start_us=start_us, end_us=end_us)


class DeviceTimeline:
    """One device from a moment on. Every change returns the intervals that it closed.

    Args:
        rate_usd_per_hour: Price while nobody claims the device.
        start_us: Where the timeline begins.
    """

    def __init__(self, device: str, *, rate_usd_per_hour: Decimal, start_us: int) -> None:
        self._device = device
        self._rate = rate_usd_per_hour
        self._claims: dict[str, Claim] = {}
        self._open: dict[str | None, Interval] = {}
        self._replan(start_us)

    @property
    def open_intervals(self) -> tuple[Interval, ...]:
        """What goes on now."""
        return tuple(self._open.values())

    def set_claim(self, claim: Claim, at_us: int) -> list[Interval]:
        """Add a replica's claim, or change it."""
        if self._claims.get(claim.replica_id) == claim:
            return []
        self._claims[claim.replica_id] = claim
        return self._replan(at_us)

    def drop_claim(self, replica_id: str, at_us: int) -> list[Interval]:
        """Remove a replica's claim, if it has one."""
        if self._claims.pop(replica_id, None) is None:
            return []
        return self._replan(at_us)

    def cut(self, at_us: int) -> list[Interval]:
        """Close everything and go on with the same claims."""
        closed = [piece for old in self._open.values() for piece in _close(old, at_us)]
        self._open = {slot: replace(old, start_us=at_us) for slot, old in self._open.items()}
        return closed

    def roll(self, at_us: int) -> list[Interval]:
        """Close what began before the current hour, at the hour."""
        hour_us = at_us - at_us % HOUR_US
        stale = [slot for slot, old in self._open.items() if old.start_us < hour_us]
        closed = [piece for slot in stale for piece in _close(self._open[slot], hour_us)]
        self._open.update({slot: replace(self._open[slot], start_us=hour_us) for slot in stale})
        return closed

    def _replan(self, at_us: int) -> list[Interval]:
        """Close the slots whose content changes and open their successors."""
        planned = {share.replica_id: share for share in self._shares(at_us)}
        closed: list[Interval] = []
        for slot, old in self._open.items():
            new = planned.get(slot)
            if new is not None and _goes_on(old, new):
                planned[slot] = old
            else:
                closed.extend(_close(old, at_us))
        self._open = planned
        return closed

    def _shares(self, at_us: int) -> Iterator[Interval]:
        claims = self._claims.values()
        sharing = [claim for claim in claims if claim.state not in GIVEN_BACK] or list(claims)
        if not sharing:
            yield Interval(
                device=self._device,
                function=None,
                replica_id=None,
                state=LedgerState.UNALLOCATED,
                start_us=at_us,
                share_ppm=WHOLE_PPM,
                rate_usd_per_hour=self._rate,
            )
        equal, remainder = divmod(WHOLE_PPM, max(len(sharing), 1))
        for index, claim in enumerate(sharing):
            yield Interval(
                device=self._device,
                function=claim.function,
                replica_id=claim.replica_id,
                state=claim.state,
                start_us=at_us,
                share_ppm=equal + (remainder if index == 0 else 0),
                rate_usd_per_hour=claim.rate_usd_per_hour,
            )


def _goes_on(old: Interval, new: Interval) -> bool:
    """Say whether the new plan for a slot is what goes on there anyway."""
    return (
        old.state is new.state
        and old.share_ppm == new.share_ppm
        and old.function == new.function
        and old.rate_usd_per_hour == new.rate_usd_per_hour
    )


def _close(interval: Interval, end_us: int) -> Iterator[Interval]:
    """End an interval, in pieces that do not cross a full hour; none when it has no length."""
    start_us = interval.start_us
    while start_us < end_us:
        stop_us = min(end_us, start_us - start_us % HOUR_US + HOUR_US)
        yield interval.during(start_us, stop_us)
        start_us = stop_us


def close_all(intervals: Iterable[Interval], end_us: int) -> list[Interval]:
    """End open intervals; those that would have no length vanish."""
    return [piece for interval in intervals for piece in _close(interval, end_us)]


def fill(
    device: str,
    *,
    rate_usd_per_hour: Decimal,
    start_us: int,
    end_us: int,
    adopted: Mapping[str, AdoptedClaim],
) -> list[Interval]:
    """Return what a device did while no controller ran, [start_us, end_us).

    An adopted replica was parked all the time if it is parked now. Any other was active until its
    last request ended and idle from then on. The rest was unallocated.
    """
    timeline = DeviceTimeline(device, rate_usd_per_hour=rate_usd_per_hour, start_us=start_us)
    moves: list[tuple[int, Claim]] = []
    for replica_id, found in adopted.items():
        if device not in found.devices:
            continue
        is_parked = found.state is LedgerState.PARKED
        active_until_us = start_us if found.last_active_us is None else found.last_active_us
        if not is_parked and active_until_us > start_us:
            moves.append((start_us, _claim(replica_id, found, LedgerState.ACTIVE)))
        resting = LedgerState.PARKED if is_parked else LedgerState.IDLE
        rests_from_us = start_us if is_parked else max(start_us, active_until_us)
        moves.append((min(rests_from_us, end_us), _claim(replica_id, found, resting)))
    filled: list[Interval] = []
    for at_us, claim in sorted(moves, key=lambda move: move[0]):
        filled += timeline.set_claim(claim, at_us)
    return filled + timeline.cut(end_us)


def _claim(replica_id: str, found: AdoptedClaim, state: LedgerState) -> Claim:
    return Claim(
        replica_id=replica_id,
        function=found.function,
        state=state,
        rate_usd_per_hour=found.rate_usd_per_hour,
    )
