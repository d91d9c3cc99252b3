"""Calls of the OpenAI API that the controller makes to itself, for requests it has accepted."""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerCall:
    """One call.

    Attributes:
        path: Of the endpoint.
        body: JSON.
        request_id: For the log and the usage record.
        key_id: The API key that pays, if keys are in use.
        may_wake: Whether a replica is brought up for it.
        priority: Added to the body's; inside a replica, lower ones start first.
    """

    path: str
    body: bytes
    request_id: str
    key_id: str | None
    may_wake: bool
    priority: int = 0


@dataclass(slots=True)
class InnerAnswer:
    """What was answered; the body is JSON."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)


class Caller(Protocol):
    """Makes calls; cancelling one ends it as a client that leaves would."""

    async def __call__(self, call: InnerCall) -> InnerAnswer:
        """Make a call and return its whole answer, whatever its status."""
