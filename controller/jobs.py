"""What outlives a connection: files, batches, asynchronous requests, responses."""

import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastapi import APIRouter

from controller.batches.files import FileStore
from controller.batches.run import BatchNode
from controller.batches.service import BatchService
from controller.clock import Clock
from controller.gateway.calls import Gateway
from controller.gateway.inner import InnerCalls, KeyCheck
from controller.gateway.response_api.background import BackgroundResponses
from controller.gateway.response_api.store import ResponseStore
from controller.gateway.routes.batches import batches_router
from controller.gateway.routes.files import files_router
from controller.gateway.routes.requests import requests_router
from controller.gateway.routes.responses import kept_responses_router, response_making_router
from controller.requests.service import RequestNode, RequestService
from controller.scaling.reaper import Reaper
from controller.settings import Settings
from controller.store.database import Database

SWEEP_S = 60.0
PRUNE_S = 3600.0


class Jobs:
    """All of it in one controller.

    Args:
        settings: Limits and directories.
        database: Keeps what was accepted.
        clock: For deadlines.
        gateway: What their requests are answered with.
        keys: Says whether who asked still may.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        clock: Clock,
        gateway: Gateway,
        keys: KeyCheck,
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
        self._responses = ResponseStore(database=database, clock=clock)
        call = InnerCalls(gateway, keys, [response_making_router(self._responses)])
        self._requests = RequestService(
            RequestNode(
                database=database,
                registry=gateway.registry,
                clock=clock,
                call=call,
                secret=private_secret(settings.webhook_secret_path),
            )
        )
        self._batches = BatchService(
            BatchNode(
                database=database,
                files=self._files,
                registry=gateway.registry,
                clock=clock,
                call=call,
                max_line_bytes=settings.max_body_bytes,
            )
        )

    def routers(self) -> Sequence[APIRouter]:
        """Return the endpoints."""
        files = files_router(self._files, self._batches, self._settings, self._clock)
        background = BackgroundResponses(self._responses, self._requests)
        return (
            response_making_router(self._responses, background),
            kept_responses_router(self._responses, background),
            files,
            batches_router(self._batches),
            requests_router(self._requests),
        )

    async def start(self, reaper: Reaper) -> None:
        """Take up what an earlier controller has left, and register what is done on a tick."""
        await self._files.clear_up()
        await self._batches.start()
        await self._requests.start()
        history_days = self._settings.history_days
        reaper.every(self._settings.tick_s, "look at batches", self._batches.look)
        reaper.every(self._settings.tick_s, "look at webhooks", self._requests.look)
        reaper.every(SWEEP_S, "sweep files", partial(self._files.sweep, self._batches.is_used))
        retention_s = self._settings.async_retention_s
        reaper.every(SWEEP_S, "prune requests", partial(self._requests.prune, retention_s))
        sweep = partial(
            self._responses.sweep,
            retention_s=self._settings.response_retention_s,
            max_bytes=self._settings.max_responses_bytes,
        )
        reaper.every(SWEEP_S, "sweep responses", sweep)
        reaper.every(PRUNE_S, "prune batches", partial(self._batches.prune, history_days))

    async def stop(self) -> None:
        """Stop all work; the next start goes on with it."""
        await self._batches.stop()
        await self._requests.stop()


def private_secret(path: Path) -> bytes:
    """Return a secret of this node, made once and readable by its user alone."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = path.with_suffix(".part")
        made.touch(mode=0o600)
        made.write_text(secrets.token_hex(32))
        made.rename(path)
    return bytes.fromhex(path.read_text())
