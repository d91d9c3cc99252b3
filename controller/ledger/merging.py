"""Fewer intervals with the same sums. Pure.

Inside one stretch of time the order of a replica's states is given up, nothing else: per device and
state, duration times share stays exact to the microsecond, there is still no gap, and shares still
add up to one at every moment.

    r1  active idle active idle          r1  active  idle
    r2  idle        active        ->     r2  idle    active
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import NamedTuple

from controller.ledger.intervals import HOUR_US, WHOLE_PPM, Interval, LedgerState


class _Slot(NamedTuple):
    """What stays the same while a replica's state changes."""

    replica_id: str | None
    function: str | None
    share_ppm: int
    rate_usd_per_hour: Decimal


_Holders = frozenset[_Slot]
_Piece = tuple[int, Sequence[Interval]]  # duration, and who held the device during it


def merge(intervals: Iterable[Interval], *, stretch_us: int = HOUR_US) -> list[Interval]:
    """Merge closed intervals inside each stretch of time.

    A stretch of a device that is not covered wholly and without gaps between its first and last
    moment is returned as it is.

    Args:
        intervals: Of any devices, in any order; each is inside one stretch.
        stretch_us: Inside how long a piece of time the order may change; a multiple of an hour.
    """
    stretches: dict[tuple[str, int], list[Interval]] = defaultdict(list)
    for interval in intervals:
        stretches[interval.device, interval.start_us // stretch_us].append(interval)
    return [merged for stretch in stretches.values() for merged in _merge_stretch(stretch)]


def _merge_stretch(intervals: Sequence[Interval]) -> Sequence[Interval]:
    pieces = list(_pieces(intervals))
    if any(sum(one.share_ppm for one in held) != WHOLE_PPM for _, held in pieces):
        return intervals
    durations: dict[_Holders, dict[tuple[_Slot, LedgerState], int]] = {}
    examples: dict[tuple[_Slot, LedgerState], Interval] = {}
    for duration_us, held in pieces:
        by_state = durations.setdefault(frozenset(map(_slot, held)), defaultdict(int))
        for interval in held:
            key = _slot(interval), interval.state
            by_state[key] += duration_us
            examples[key] = interval
    start_us = min(interval.start_us for interval in intervals)
    merged: list[Interval] = []
    for by_state in durations.values():
        ends: dict[_Slot, int] = {}
        for (slot, state), duration_us in by_state.items():
            begin_us = ends.get(slot, start_us)
            ends[slot] = begin_us + duration_us
            merged.append(examples[slot, state].during(begin_us, ends[slot]))
        start_us = max(ends.values())
    return merged if len(merged) < len(intervals) else intervals


def _pieces(intervals: Sequence[Interval]) -> Iterator[_Piece]:
    """Cut wherever any interval begins or ends."""
    begins: dict[int, list[Interval]] = defaultdict(list)
    moments: set[int] = set()
    for interval in intervals:
        assert interval.end_us is not None, "only closed intervals can be merged"
        begins[interval.start_us].append(interval)
        moments |= {interval.start_us, interval.end_us}
    held: list[Interval] = []
    for start_us, end_us in pairwise(sorted(moments)):
        held = [one for one in held if one.end_us != start_us] + begins[start_us]
        yield end_us - start_us, held


def _slot(interval: Interval) -> _Slot:
    return _Slot(
        interval.replica_id, interval.function, interval.share_ppm, interval.rate_usd_per_hour
    )


def split(intervals: Iterable[Interval], at_us: int) -> tuple[list[Interval], list[Interval]]:
    """Divide closed intervals at a moment into those before it and those after."""
    before: list[Interval] = []
    after: list[Interval] = []
    for interval in intervals:
        assert interval.end_us is not None, "only closed intervals can be split"
        if interval.start_us < at_us:
            before.append(interval.during(interval.start_us, min(interval.end_us, at_us)))
        if interval.end_us > at_us:
            after.append(interval.during(max(interval.start_us, at_us), interval.end_us))
    return before, after
