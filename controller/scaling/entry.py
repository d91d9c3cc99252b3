"""A deployed function as the control plane keeps it, from its acceptance on."""

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from controller.scaling.function import Function
from controller.scaling.preparation import BuildProgress
from functions.spec import FunctionSpec


class SnapshotState(StrEnum):
    """Whether a function's snapshot can be loaded."""

    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"


@dataclass(slots=True, kw_only=True)
class Entry:
    """One deployed function, from its acceptance on."""

    spec: FunctionSpec
    backend: str
    created_us: int
    snapshot: str | None = None
    snapshot_state: SnapshotState = SnapshotState.BUILDING
    build: BuildProgress | None = None
    error: str = ""
    unusable_at: float | None = None  # monotonic seconds, the last time its snapshot was
    function: Function | None = None
    builder: asyncio.Task[None] | None = None
    owner: asyncio.Task[None] | None = None

    def snapshot_failed(self, reason: str) -> None:
        """Note that there is no snapshot, and none will come by itself."""
        self.snapshot_state, self.error = SnapshotState.FAILED, reason
        if self.function is not None and self.function.set.is_held:
            self.function.hold(reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFunction:
    """A function as the store keeps it.

    Attributes:
        earlier: Revisions that were current before, the newest first.
    """

    spec: FunctionSpec
    backend: str
    created_us: int
    earlier: "tuple[StoredFunction, ...]" = ()


class FunctionStore(Protocol):
    """The desired state on disk."""

    async def load(self) -> list[StoredFunction]:
        """Return every function that is not deleted, with its current revision."""

    async def put(self, function: StoredFunction) -> None:
        """Make a revision the current one."""

    async def delete(self, name: str) -> None:
        """Mark a function deleted; its history stays."""
