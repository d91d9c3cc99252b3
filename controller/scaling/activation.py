"""One cold start as a sequence of named phases that add up to the client's wait."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from runtime.rpc import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class PhaseTiming:
    """A finished part of a cold start.

    Attributes:
        name: Which.
        seconds: How much of the wait it was.
        gb_per_s: How fast bytes moved, over all the time they did, which may have begun in earlier
            parts; 0 if none moved.
    """

    name: str
    seconds: float
    gb_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """From a request's admission, or the decision to start, to the first token or readiness.

    Attributes:
        function: The function's name.
        replica_id: The replica that was brought up.
        started_us: Wall time of the beginning, microseconds since the Unix epoch.
        from_tier: The tier it was brought up from: parked, standby or stopped.
        reason: "request", or "kept ready" when no request waited.
        outcome: "ready" or "failed".
        total_s: Seconds from beginning to end.
        phases: In order; they add up to `total_s`.
    """

    function: str
    replica_id: str
    started_us: int
    from_tier: str
    reason: str
    outcome: str
    total_s: float
    phases: tuple[PhaseTiming, ...]


@dataclass(slots=True, kw_only=True)
class Activation:
    """A cold start under way: every lap takes the time since the one before.

    Args:
        from_tier: The tier the replica comes from.
        monotonic: The clock.
        started_us: Wall time of the beginning, microseconds since the Unix epoch.
    """

    from_tier: str
    monotonic: Callable[[], float]
    started_us: int
    phases: list[PhaseTiming] = field(default_factory=list)
    began_at: float = 0.0
    placed_at: float = 0.0
    lap_at: float = 0.0

    def __post_init__(self) -> None:
        self.began_at = self.placed_at = self.lap_at = self.monotonic()

    def waited(self, room_s: float) -> None:
        """Count seconds that were spent, before now, on waiting for room on a device."""
        if room_s > 0:
            self.phases.append(PhaseTiming("room", room_s))
            self.began_at -= room_s
            self.started_us -= int(room_s * 1e6)

    def lap(self, name: str) -> None:
        """End a phase now."""
        now = self.monotonic()
        self.phases.append(PhaseTiming(name, now - self.lap_at))
        self.lap_at = now

    def lap_call(self, parts: Iterable[pb.Phase], *, rest: str) -> None:
        """End a remote call now: its own phases, then what they leave of its duration."""
        now = self.monotonic()
        measured = [PhaseTiming(part.name, part.seconds, part.gb_per_s) for part in parts]
        remainder = now - self.lap_at - sum(part.seconds for part in measured)
        self.phases += [*measured, PhaseTiming(rest, max(remainder, 0.0))]
        self.lap_at = now

    def seen(self, since: float, until: float) -> Sequence[PhaseTiming]:
        """Return the phases as somebody saw them who waited for a first token.

        There are none if only that token was to come.

        Args:
            since: Monotonic second of the admission; what was over by then is left out.
            until: Monotonic second of the first token.
        """
        if self.lap_at <= since:
            return ()
        at = self.began_at
        spans = [("queue", since, at)]
        for phase in self.phases:
            spans.append((phase.name, at, at := at + phase.seconds))
        spans.append(("first_token", at, until))
        seen: dict[str, float] = {}
        for name, start, end in spans:
            if (seconds := min(end, until) - max(start, since)) > 0:
                seen[name] = seen.get(name, 0.0) + seconds
        if seen.keys() <= {"first_token"}:
            return ()
        return tuple(PhaseTiming(name, seconds) for name, seconds in seen.items())

    def finish(
        self, *, function: str, replica_id: str, outcome: str, waiting_since: float | None
    ) -> ColdStart:
        """Close the books.

        Args:
            function: The function's name.
            replica_id: The replica that came up.
            outcome: "ready" or "failed".
            waiting_since: Monotonic second the first waiting request was admitted; None when
                nobody waited.
        """
        queued_s = 0.0 if waiting_since is None else max(self.began_at - waiting_since, 0.0)
        return ColdStart(
            function=function,
            replica_id=replica_id,
            started_us=self.started_us - int(queued_s * 1e6),
            from_tier=self.from_tier,
            reason="kept ready" if waiting_since is None else "request",
            outcome=outcome,
            total_s=self.lap_at - self.began_at + queued_s,
            phases=(PhaseTiming("queue", queued_s), *self.phases),
        )
