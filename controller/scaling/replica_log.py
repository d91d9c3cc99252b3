"""The log of one replica: what its runtime has printed since it was given to it.

A runtime that goes back to standby keeps its log, and the next replica in it is another function's.
"""

from collections.abc import AsyncIterator

from controller.backends.base import RuntimeBackend

ASSIGNED = '"event": "assigned"'
"""In the line a runtime prints when it begins to load."""


async def replica_log(
    backend: RuntimeBackend, runtime_id: str, *, tail: int, follow: bool = False
) -> AsyncIterator[str]:
    """Yield the last `tail` lines of the runtime's present replica, then new ones while `follow`.

    Raises:
        BackendError: The log cannot be read.
    """
    lines = [line async for line in backend.logs(runtime_id, tail=tail)]
    begins = [number for number, line in enumerate(lines) if ASSIGNED in line]
    own = lines[begins[-1] :] if begins else lines
    if not follow:
        for line in own:
            yield line
        return
    async for line in backend.logs(runtime_id, tail=len(own), follow=True):
        yield line
