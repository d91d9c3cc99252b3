"""One replica, one waiting request, and the four things that can be done to a replica."""

from dataclasses import dataclass, field

from controller.errors import ApiError
from controller.scaling.lifecycle import Lifecycle, ReplicaState
from controller.scaling.policy import MAX_BACKOFF_S, backoff_s


@dataclass(slots=True, eq=False, kw_only=True)
class Replica:
    """One replica as the decisions see it.

    Attributes:
        id: The runtime's id.
        runtime_hash: Hash of the spec's parts that a running runtime cannot change.
        lifecycle: Its state and history.
        in_flight: Leases out.
        idle_since: Monotonic second of the last byte of the last response.
        up_since: Monotonic second it first became ready; None before, and when it was adopted.
        is_retry: Whether it is the second try of a start that was killed.
        is_cordoned: Takes no new lease and is put away once the last one is back.
        is_yielding: The same, for the sake of another function: load does not bring it back, but
            the floor does.
        parking: When it may be asked to park again after its runtime has refused.
    """

    id: str
    runtime_hash: str
    lifecycle: Lifecycle
    in_flight: int = 0
    idle_since: float = 0.0
    up_since: float | None = None
    is_retry: bool = False
    is_cordoned: bool = False
    is_yielding: bool = False
    parking: "Backoff" = field(default_factory=lambda: Backoff())

    @property
    def state(self) -> ReplicaState:
        """The lifecycle's state."""
        return self.lifecycle.state

    @property
    def is_waking(self) -> bool:
        """Whether it is on its way back from being parked."""
        return self.lifecycle.is_waking


@dataclass(slots=True, eq=False, kw_only=True)
class Waiter:
    """A request that wants a lease. `replica` is set when it has one."""

    num_bytes: int
    replica: Replica | None = None
    failure: ApiError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReplica:
    """Create a runtime and load the snapshot."""

    replica: Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class WakeReplica:
    """Bring a parked runtime back."""

    replica: Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkReplica:
    """Take a runtime's memory away and keep its process."""

    replica: Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReplica:
    """Remove a runtime, after its leases are back or the drain timeout has passed."""

    replica: Replica


Instruction = StartReplica | WakeReplica | ParkReplica | StopReplica


@dataclass(slots=True, kw_only=True)
class Backoff:
    """When something may be tried again after failures: the next start, or to park a replica."""

    num_failures: int = 0
    retry_at: float = 0.0
    reason: str = ""

    def holds(self, now: float) -> bool:
        """Return whether trying is still forbidden."""
        return self.num_failures > 0 and now < self.retry_at

    def after_failure(self, now: float, reason: str) -> "Backoff":
        """Return the back-off after one more attempt that failed."""
        failures = self.num_failures + 1
        return Backoff(num_failures=failures, retry_at=now + backoff_s(failures), reason=reason)

    def after_early_loss(self, now: float, reason: str) -> "Backoff":
        """Return the back-off after a start that was of no use; the first costs no wait."""
        is_old = now > self.retry_at + MAX_BACKOFF_S
        failures = 1 if is_old else self.num_failures + 1
        wait_s = backoff_s(failures - 1)
        return Backoff(num_failures=failures, retry_at=now + wait_s, reason=reason)
