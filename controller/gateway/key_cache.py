"""API keys that were looked up lately, so that warm traffic does not wait for the database."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from controller.clock import Clock
from controller.errors import StoreUnavailable
from controller.gateway.auth import ApiKey

FRESH_S = 5.0

Find = Callable[[str], Awaitable[ApiKey | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    key: ApiKey
    at: float


class KeyCache:
    """Keys by hash, each as it was some seconds ago, or when the store was last there.

    Only keys that exist are kept, so it holds no more than the store does.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[str, _Known] = {}

    async def find(self, key_hash: str, find: Find) -> ApiKey | None:
        """Return a known key, or ask.

        Raises:
            StoreUnavailable: It is not known and the store cannot be asked.
        """
        now = self._clock.monotonic()
        known = self._known.get(key_hash)
        if known is not None and now - known.at < FRESH_S:
            return known.key
        try:
            key = await find(key_hash)
        except StoreUnavailable:
            if known is None:
                raise
            return known.key
        if key is None:
            self._known.pop(key_hash, None)
        else:
            self._known[key_hash] = _Known(key=key, at=now)
        return key

    def clear(self) -> None:
        """Forget all: some key has changed."""
        self._known.clear()
