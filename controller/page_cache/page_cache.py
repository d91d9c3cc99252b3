"""Snapshots of deployed functions held in the host's memory, within a budget.

A start that finds its weights in the page cache reads them at memory speed; one that does not
waits for the disk, which takes ten times as long. Other programs push files out of the page cache
unless they are locked there.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

import structlog

from controller.page_cache.choice import Candidate, choose

log = structlog.get_logger(__name__)

HOLDER = (sys.executable, "-m", "controller.page_cache.holder")
RESTART_DELAY_S = 10.0


class PageCache:
    """Holds files through a process of its own; see `controller.page_cache.holder`.

    Args:
        budget_bytes: How much to hold; 0 holds nothing and starts no process.
        command: Starts the process.
    """

    def __init__(self, budget_bytes: int, command: Sequence[str] = HOLDER) -> None:
        self._budget_bytes = budget_bytes
        self._command = command
        self._wanted: dict[str, int] = {}
        self._told: dict[str, int] = {}  # what the process was told to hold
        self._held: set[str] = set()
        self._reason = ""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to hold what is wanted."""
        if self._budget_bytes:
            self._task = asyncio.create_task(self._run(), name="page cache")

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
            "held_bytes": sum(size for path, size in self._told.items() if path in self._held),
            "wanted_bytes": sum(self._wanted.values()),
            "files": len(self._held),
            "reason": self._reason or None,
        }

    async def _run(self) -> None:
        while True:
            try:
                await self._serve()
            except OSError as error:
                self._reason = f"the holder cannot be started: {error}"
                log.warning("page cache not held", reason=self._reason)
            await asyncio.sleep(RESTART_DELAY_S)

    async def _serve(self) -> None:
        """Tell one process what to hold for as long as it lives."""
        process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        ended = asyncio.create_task(process.wait(), name="page cache holder")
        ended.add_done_callback(lambda _: self._changed.set())
        try:
            while not ended.done():
                for op, path in self._differences():
                    process.stdin.write(json.dumps({"op": op, "path": path}).encode() + b"\n")
                    await process.stdin.drain()
                    self._note(json.loads(await process.stdout.readuntil()))
                self._changed.clear()
                if not self._differences() and not ended.done():
                    await self._changed.wait()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # it has ended
        finally:
            self._told.clear()
            self._held.clear()
            process.stdin.close()
            if process.returncode is None:
                process.kill()
            await ended
        self._reason = f"the holder ended (status {ended.result()}); it is started again"
        log.warning("page cache not held", reason=self._reason)

    def _differences(self) -> list[tuple[str, str]]:
        """Return what the process has to be told, drops first."""
        drops = [("drop", path) for path in self._told.keys() - self._wanted.keys()]
        return drops + [("hold", path) for path in self._wanted.keys() - self._told.keys()]

    def _note(self, answer: dict[str, Any]) -> None:
        path = answer["path"]
        if path in self._wanted:
            self._told[path] = self._wanted[path]
        else:
            self._told.pop(path, None)
        (self._held.add if answer["is_held"] else self._held.discard)(path)
        if answer["reason"] and answer["reason"] != self._reason:
            log.warning("file not held in memory", path=path, reason=answer["reason"])
        self._reason = answer["reason"]
