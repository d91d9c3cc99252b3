"""Building a function's snapshot: in a process of its own, so that torch never comes in here."""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from functions.spec import FunctionSpec

log = structlog.get_logger(__name__)

MAX_LINE_BYTES = 1 << 20


class PreparationFailed(Exception):
    """The snapshot could not be built; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildProgress:
    """How far a build is, within its current phase."""

    phase: str
    done_bytes: int
    total_bytes: int


class SnapshotBuilder(Protocol):
    """Builds the snapshot of a spec's model; see `build_snapshot`."""

    async def __call__(
        self, spec: FunctionSpec, store: Path, on_progress: Callable[[BuildProgress], None]
    ) -> str:
        """Return the directory name of the snapshot, or raise PreparationFailed."""


async def build_snapshot(
    spec: FunctionSpec, store: Path, on_progress: Callable[[BuildProgress], None]
) -> str:
    """Build the snapshot of a spec's model, or find it built, and return its directory name.

    Cancelling ends the build; a later one resumes it.

    Raises:
        PreparationFailed: The source is missing, refused or unusable.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *_command(spec, store),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
        )
    except OSError as error:
        raise PreparationFailed(f"cannot start the build: {error}; deploy again") from error
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.create_task(process.stderr.read(), name=f"build errors of {spec.name}")
    failure = ""
    try:
        async for line in process.stdout:
            match _event(line):
                case {
                    "event": "progress",
                    "phase": phase,
                    "done_bytes": done,
                    "total_bytes": total,
                }:
                    on_progress(BuildProgress(phase=phase, done_bytes=done, total_bytes=total))
                case {"event": "built", "snapshot": snapshot}:
                    await process.wait()
                    return str(snapshot)
                case {"event": "error", "message": message, **rest}:
                    failure = " ".join(str(part) for part in (message, rest.get("hint")) if part)
        await process.wait()
        tail = (await errors).decode(errors="replace").strip().splitlines()[-5:]
        log.warning("snapshot build failed", function=spec.name, status=process.returncode)
        raise PreparationFailed(failure or " | ".join(tail) or "the build ended without a word")
    finally:
        errors.cancel()
        if process.returncode is None:
            process.terminate()
            await process.wait()


def _event(line: bytes) -> Any:
    """Return what a line tells; None for what some library has printed."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _command(spec: FunctionSpec, store: Path) -> list[str]:
    model = spec.model
    command = [sys.executable, "-m", "snapshots", "build", model.location]
    command += ["--store", str(store), "--dtype", model.dtype, "--progress", "json"]
    command += ["--tp", str(spec.engine.tensor_parallel_size)]
    return command if model.revision is None else [*command, "--revision", model.revision]
