"""Snapshots that a runtime found missing or damaged: out of use, and built anew once."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

import structlog

from controller.clock import Clock
from controller.scaling.background import Background
from controller.scaling.entry import Entry, SnapshotState
from snapshots.errors import SnapshotNotFound
from snapshots.store import SnapshotStore

log = structlog.get_logger(__name__)

REBUILD_WINDOW_S = 3600.0
"""A snapshot unusable again within this time after it was built anew is not built a third time."""


class Rebuilds:
    """Falls back to the source of snapshots that cannot be loaded.

    Args:
        snapshots: Where they are.
        clock: Tells how long ago the last time was.
        entries: Returns all deployed functions.
        prepare: Starts to build an entry's snapshot, unless the entry is not deployed any more.
        background: Runs what takes long.
    """

    def __init__(
        self,
        snapshots: SnapshotStore,
        clock: Clock,
        *,
        entries: Callable[[], Iterable[Entry]],
        prepare: Callable[[Entry], None],
        background: Background,
    ) -> None:
        self._snapshots = snapshots
        self._clock = clock
        self._entries = entries
        self._prepare = prepare
        self._background = background

    def unusable(self, snapshot: str, reason: str) -> None:
        """Take a snapshot out of use; no function starts a replica from it any more.

        Replicas that have loaded it serve on: what they hold was verified.
        """
        users = [
            entry
            for entry in self._entries()
            if entry.snapshot == snapshot and entry.snapshot_state is SnapshotState.READY
        ]
        if not users:
            return  # it is being built already, or nobody wants it any more
        log.error("snapshot unusable", snapshot=snapshot, reason=reason)
        for entry in users:
            self._hold(entry, reason)
        _ = self._background.start(self._replace(snapshot, reason, users), f"rebuild {snapshot}")

    def _hold(self, entry: Entry, reason: str) -> None:
        assert entry.function is not None, "its snapshot was ready"
        now = self._clock.monotonic()
        before, entry.unusable_at = entry.unusable_at, now
        if before is not None and now - before < REBUILD_WINDOW_S:
            entry.snapshot_state = SnapshotState.FAILED
            entry.error = (
                f"its snapshot was built anew and is unusable again: {reason}; check the disk and "
                "memory of the machine, then deploy again"
            )
        else:
            entry.snapshot_state = SnapshotState.BUILDING
            entry.error = f"its snapshot was unusable and is being built anew: {reason}"
        entry.function.hold(entry.error)

    async def _replace(self, snapshot: str, reason: str, users: Sequence[Entry]) -> None:
        try:
            place = await asyncio.to_thread(self._snapshots.quarantine, snapshot, reason)
            log.warning("snapshot quarantined", snapshot=snapshot, path=str(place))
        except SnapshotNotFound:
            log.warning("snapshot missing", snapshot=snapshot)
        except OSError as error:
            log.warning("snapshot not quarantined", snapshot=snapshot, error=str(error))
        for entry in users:
            if entry.snapshot_state is SnapshotState.BUILDING:
                self._prepare(entry)
