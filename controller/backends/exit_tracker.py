"""Finds out which containers have exited from lists of those there are. Pure."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

from controller.backends.base import RuntimePhase
from controller.backends.container import Container


class ExitTracker:
    """Compares each list with the one before, so that no event need be relied on.

    Args:
        since: Containers that had ended by then are old news.
    """

    def __init__(self, *, since: datetime) -> None:
        self._since = since
        self.has_begun = False
        self._known: dict[str, Container] = {}

    def update(self, containers: Iterable[Container]) -> list[Container]:
        """Take the containers there are; return those that have exited since the last call.

        One that was running and is gone has exited with a code nobody knows.
        """
        now = {container.id: container for container in containers}
        exited = [container for container in now.values() if self._is_news(container)]
        exited += [
            replace(gone, info=replace(gone.info, phase=RuntimePhase.EXITED))
            for gone in self._known.values()
            if gone.id not in now and gone.info.phase is RuntimePhase.RUNNING
        ]
        self._known = now
        self.has_begun = True
        return exited

    def _is_news(self, container: Container) -> bool:
        if container.info.phase is RuntimePhase.RUNNING:
            return False
        known = self._known.get(container.id)
        if known is not None:
            return known.info.phase is RuntimePhase.RUNNING
        return container.finished_at is None or container.finished_at >= self._since
