"""Cold starts, phase by phase. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from controller.dashboard.format import human_age, human_seconds

Json = Mapping[str, Any]

_PHASE_KINDS = {
    "queue": "wait",
    "room": "wait",
    "place": "wait",
    "container_start": "start",
    "runtime_import": "import",
    "first_token": "first",
    "prefill": "first",
}
_SHOWN_PHASE_SHARE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBar:
    """One phase of a waterfall; positions in thousandths of the longest cold start shown."""

    name: str
    seconds: float
    duration: str
    kind: str
    x: float
    width: float
    is_listed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStartLine:
    """One row of the cold starts."""

    id: str
    function: str
    started_at: str
    clock: str
    age: str
    from_tier: str
    reason: str
    outcome: str
    is_failed: bool
    total: str
    phases: Sequence[PhaseBar]
    rest: str


def cold_start_lines(starts: Sequence[Json], now: datetime) -> Sequence[ColdStartLine]:
    """Return the rows of the cold starts, all to one scale."""
    longest_s = max((float(start["total_s"]) for start in starts), default=0.0)
    return [_cold_start_line(start, longest_s, now) for start in starts]


def _cold_start_line(start: Json, longest_s: float, now: datetime) -> ColdStartLine:
    at = datetime.fromisoformat(start["started_at"])
    phases = _phase_bars(start["phases"], float(start["total_s"]), longest_s)
    unlisted_s = [phase.seconds for phase in phases if not phase.is_listed]
    return ColdStartLine(
        id=str(start["id"]),
        function=start["function"],
        started_at=at.isoformat(),
        clock=f"{at:%Y-%m-%d %H:%M:%S} UTC",
        age=human_age(at, now),
        from_tier=start["from_tier"],
        reason=start.get("reason") or "",
        outcome=start["outcome"],
        is_failed=start["outcome"] == "failed",
        total=human_seconds(float(start["total_s"])),
        phases=phases,
        rest=human_seconds(sum(unlisted_s)) if unlisted_s else "",
    )


def _phase_bars(phases: Sequence[Json], total_s: float, longest_s: float) -> Sequence[PhaseBar]:
    bars: list[PhaseBar] = []
    x = 0.0
    for phase in phases:
        seconds = max(float(phase["seconds"]), 0.0)
        width = 1000 * seconds / longest_s if longest_s > 0 else 0.0
        bars.append(
            PhaseBar(
                name=str(phase["name"]).replace("_", " "),
                seconds=seconds,
                duration=_duration(seconds, float(phase["gb_per_s"])),
                kind=phase_kind(str(phase["name"])),
                x=round(x, 2),
                width=round(width, 2),
                is_listed=seconds >= _SHOWN_PHASE_SHARE * total_s,
            )
        )
        x += width
    return bars


def _duration(seconds: float, gb_per_s: float) -> str:
    text = human_seconds(seconds)
    return f"{text} at {gb_per_s:.1f} GB/s" if gb_per_s else text


def phase_kind(name: str) -> str:
    """Return the stylesheet's name for a phase's colour."""
    if name.startswith("weights_"):
        return "weights"
    return _PHASE_KINDS.get(name, "prepare")
