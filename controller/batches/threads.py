"""Opening things in threads, which go on when their caller is cancelled."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def open_in_thread(open_: Callable[[], T], close: Callable[[T], object]) -> T:
    """Return what a thread opens; it is closed again if the caller is cancelled meanwhile."""
    opening = asyncio.ensure_future(asyncio.to_thread(open_))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        close(await opening)
        raise
