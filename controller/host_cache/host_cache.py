"""Snapshots of deployed functions held in the host's memory, within a budget.

A start that finds its weights in memory is as fast as memory; one that does not waits for the disk,
which takes ten times as long. Weights for a GPU are held in pinned memory, from which it copies on
its own, all others in the page cache, locked, since other programs push files out of it.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from controller.host_cache.choice import Candidate, Holding, choose

log = structlog.get_logger(__name__)

HOLDER = (sys.executable, "-m", "runtime.host_cache.holder")
RESTART_DELAY_S = 10.0
RETRY_S = 60.0
MAX_RETRY_S = 900.0


@dataclass(slots=True, kw_only=True)
class _Shortfall:
    """Since when a file is not held as it should be, and when that is tried again; loop time."""

    since: float
    retry_at: float


class HostCache:
    """Holds files through a process of its own; see `runtime.host_cache.holder`.

    Args:
        budget_bytes: How much to hold; 0 holds nothing and starts no process.
        store: The directory of snapshots.
        engine_user_id: Whom engines run as, beside our own user.
        command: Starts the process; arguments are appended.
    """

    def __init__(
        self,
        budget_bytes: int,
        store: Path,
        *,
        engine_user_id: int,
        command: Sequence[str] = HOLDER,
    ) -> None:
        self._budget_bytes = budget_bytes
        self._command = [*command, "--store", str(store), "--user-id", str(engine_user_id)]
        self._wanted: dict[str, Holding] = {}
        self._told: dict[str, Holding] = {}  # what the process was told to hold
        self._held: set[str] = set()
        self._pinned: set[str] = set()
        self._shortfalls: dict[str, _Shortfall] = {}
        self._reason = ""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to hold what is wanted."""
        if self._budget_bytes:
            self._task = asyncio.create_task(self._run(), name="host cache")

    async def close(self) -> None:
        """Let go of everything."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def want(self, candidates: Sequence[Candidate]) -> None:
        """Take the files that could be held, and hold the best of them."""
        self._wanted = choose(candidates, self._wanted, self._budget_bytes)
        if self._wanted != self._told:
            self._changed.set()

    def view(self) -> dict[str, Any]:
        """Return budget and holdings as JSON values."""
        return {
            "budget_bytes": self._budget_bytes,
            "held_bytes": self._told_bytes(self._held),
            "pinned_bytes": self._told_bytes(self._pinned),
            "wanted_bytes": sum(holding.num_bytes for holding in self._wanted.values()),
            "files": len(self._held),
            "reason": self._reason or None,
        }

    def _told_bytes(self, paths: Collection[str]) -> int:
        return sum(holding.num_bytes for path, holding in self._told.items() if path in paths)

    async def _run(self) -> None:
        while True:
            try:
                await self._serve()
            except OSError as error:
                self._reason = f"the holder cannot be started: {error}"
                log.warning("host cache not held", reason=self._reason)
            await asyncio.sleep(RESTART_DELAY_S)

    async def _serve(self) -> None:
        """Tell one process what to hold for as long as it lives."""
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        ended = asyncio.create_task(process.wait(), name="host cache holder")
        ended.add_done_callback(lambda _: self._changed.set())
        try:
            while not ended.done():
                for path, holding in self._differences():
                    process.stdin.write(_request(path, holding))
                    await process.stdin.drain()
                    self._note(path, holding, json.loads(await process.stdout.readuntil()))
                self._changed.clear()
                if not self._differences() and not ended.done():
                    await self._wait_for_change()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # it has ended
        finally:
            self._told.clear()
            self._held.clear()
            self._pinned.clear()
            self._shortfalls.clear()
            process.stdin.close()
            if process.returncode is None:
                process.kill()
            await ended
        self._reason = f"the holder ended (status {ended.result()}); it is started again"
        log.warning("host cache not held", reason=self._reason)

    async def _wait_for_change(self) -> None:
        retry_at = min((one.retry_at for one in self._shortfalls.values()), default=None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(retry_at):
                await self._changed.wait()

    def _differences(self) -> list[tuple[str, Holding | None]]:
        """Return what the process has to be told, drops first."""
        drops = [(path, None) for path in self._told.keys() - self._wanted.keys()]
        now = asyncio.get_running_loop().time()
        due = {path for path, one in self._shortfalls.items() if one.retry_at <= now}
        holds = [
            (path, holding)
            for path, holding in self._wanted.items()
            if self._told.get(path) != holding or path in due
        ]
        return [*drops, *holds]

    def _note(self, path: str, holding: Holding | None, answer: Mapping[str, Any]) -> None:
        if holding is None:
            self._told.pop(path, None)
        else:
            self._told[path] = holding
        if answer["reason"]:
            now = asyncio.get_running_loop().time()
            shortfall = self._shortfalls.setdefault(path, _Shortfall(since=now, retry_at=now))
            shortfall.retry_at = now + min(max(now - shortfall.since, RETRY_S), MAX_RETRY_S)
        else:
            self._shortfalls.pop(path, None)
        for paths, is_in in ((self._held, answer["is_held"]), (self._pinned, answer["is_pinned"])):
            (paths.add if is_in else paths.discard)(path)
        if answer["reason"] and answer["reason"] != self._reason:
            log.warning("file not held as it should be", path=path, reason=answer["reason"])
        self._reason = answer["reason"]


def _request(path: str, holding: Holding | None) -> bytes:
    message: dict[str, Any] = {"op": "drop", "path": path}
    if holding is not None:
        message |= {"op": "hold", "is_pinned": holding.is_pinned}
    return json.dumps(message).encode() + b"\n"
