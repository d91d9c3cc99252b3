"""Work that nobody's connection waits for: files, batches, and what they are made of."""

from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter

from controller.batches.files import FileStore
from controller.batches.run import BatchNode
from controller.batches.service import BatchService
from controller.clock import Clock
from controller.gateway.calls import Gateway
from controller.gateway.inner import InnerCalls
from controller.gateway.routes.batches import batches_router
from controller.gateway.routes.files import files_router
from controller.scaling.reaper import Reaper
from controller.settings import Settings
from controller.store.database import Database

SWEEP_S = 60.0
PRUNE_S = 3600.0


class Jobs:
    """All such work of one controller.

    Args:
        settings: Limits and directories.
        database: Keeps what was accepted.
        clock: For deadlines.
        gateway: What the requests of batches are answered with.
    """

    def __init__(
        self, settings: Settings, database: Database, clock: Clock, gateway: Gateway
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._files = FileStore(
            settings.files_dir,
            database,
            clock,
            max_file_bytes=settings.max_file_bytes,
            max_total_bytes=settings.max_files_bytes,
        )
        self._batches = BatchService(
            BatchNode(
                database=database,
                files=self._files,
                registry=gateway.registry,
                clock=clock,
                call=InnerCalls(gateway),
                max_line_bytes=settings.max_body_bytes,
            )
        )

    def routers(self) -> Sequence[APIRouter]:
        """Return the endpoints."""
        files = files_router(self._files, self._batches, self._settings, self._clock)
        return (files, batches_router(self._batches))

    async def start(self, reaper: Reaper) -> None:
        """Take up what an earlier controller has left, and register what is done on a tick."""
        await self._files.clear_up()
        await self._batches.start()
        history_days = self._settings.history_days
        reaper.every(self._settings.tick_s, "look at batches", self._batches.look)
        reaper.every(SWEEP_S, "sweep files", self._files.sweep)
        reaper.every(PRUNE_S, "prune batches", partial(self._batches.prune, history_days))

    async def stop(self) -> None:
        """Stop all work; the next start goes on with it."""
        await self._batches.stop()
