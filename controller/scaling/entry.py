"""A deployed function as the control plane keeps it, from its acceptance on."""

import asyncio
from dataclasses import dataclass
from enum import StrEnum

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
    function: Function | None = None
    builder: asyncio.Task[None] | None = None
    owner: asyncio.Task[None] | None = None
