"""The contract every backend keeps: it starts, finds, watches and removes runtimes.

A backend knows processes or containers. It knows nothing of models, tiers or requests. The suite
in tests/contracts/test_backend_contract.py runs unchanged over every implementation.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol


class BackendError(Exception):
    """A backend could not do what was asked.

    Args:
        message: What failed and what to do.
        temporary: Whether trying again later can help.
    """

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        super().__init__(message)
        self.temporary = temporary


class RuntimeNotFound(BackendError):
    """No runtime of this id exists."""


class BackendUnavailable(BackendError):
    """The machinery behind the backend cannot be reached."""


class RuntimePhase(StrEnum):
    """What the backend, not the model, says about a runtime."""

    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSpec:
    """What to start.

    `runtime_id` matches ^[a-z0-9][-a-z0-9]{0,62}$ and is unique; creating it twice returns the
    first. Labels let a restarted controller find what it owns.
    """

    runtime_id: str
    function: str
    revision: str
    epoch: int
    snapshot_store: Path
    device_uuids: tuple[str, ...] = ()
    cpu: float | None = None  # cores; None for no limit
    memory_bytes: int | None = None  # None for no limit
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeInfo:
    """What exists."""

    runtime_id: str
    function: str
    revision: str
    epoch: int
    phase: RuntimePhase
    endpoint: str  # gRPC target, e.g. unix:///…/runtime.sock
    device_uuids: tuple[str, ...] = ()
    exit_code: int | None = None  # of an exited runtime, where known

    @property
    def was_killed(self) -> bool:
        """Whether an exited runtime was ended by a signal, or by nobody knows what.

        A container reports 128 and the signal's number; a process the number below zero.
        """
        return self.exit_code is None or not 0 <= self.exit_code <= 128


class RuntimeBackend(Protocol):
    """Starts and stops runtimes of one cluster.

    Every operation is idempotent by runtime id and safe to retry. All raise BackendUnavailable
    when the machinery cannot be reached.
    """

    name: str

    async def create(self, spec: RuntimeSpec) -> RuntimeInfo:
        """Start a runtime, or return the one that already has this id.

        Returns as soon as the process or container exists; its socket may not answer yet.

        Raises:
            BackendError: It cannot be started; the message says why and what to do.
        """

    async def resize(self, runtime_id: str, *, cpu: float | None, memory_bytes: int | None) -> None:
        """Change the limits of a running runtime; None for no limit.

        Raises:
            RuntimeNotFound: It was never created, or was deleted.
            BackendError: Limits once set cannot be changed like this.
        """

    async def delete(self, runtime_id: str, *, grace_s: float = 5.0) -> None:
        """Stop a runtime and everything under it, and forget it.

        SIGTERM, then SIGKILL after `grace_s` seconds. Returns when nothing is left. Deleting what
        does not exist is no error.
        """

    async def inspect(self, runtime_id: str) -> RuntimeInfo:
        """Return one runtime, running or exited.

        Raises:
            RuntimeNotFound: It was never created, or was deleted.
        """

    async def list(self) -> list[RuntimeInfo]:
        """Return every runtime of this cluster, exited ones included, ordered by id."""

    def watch(self) -> AsyncIterator[RuntimeInfo]:
        """Yield a runtime each time one exits, within a second, from now on, without end.

        Only exits that were not asked for by `delete` are certain to appear.
        """

    def logs(self, runtime_id: str, *, tail: int = 100, follow: bool = False) -> AsyncIterator[str]:
        """Yield the last `tail` lines, without line ends, then new ones while `follow`.

        Ends when the runtime is gone. Long lines are cut at 8 KiB.

        Raises:
            RuntimeNotFound: It was never created, or was deleted.
        """

    async def close(self) -> None:
        """Release connections. Runtimes keep running."""
