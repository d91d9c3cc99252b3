"""The end of the last log of each function, kept when its runtime is removed.

A log lives with its runtime and goes with it, at the very moment somebody will ask why it went.
"""

import asyncio
from pathlib import Path

import structlog

from controller.backends.base import BackendError, RuntimeBackend
from controller.scaling.replica_log import replica_log

log = structlog.get_logger(__name__)

MAX_LINES = 1_000
MAX_BYTES = 256 << 10
READ_TIMEOUT_S = 2.0


class LastLogs:
    """One file a function, replaced each time one of its runtimes is removed.

    Args:
        directory: Made when it is first needed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def keep(self, function: str, backend: RuntimeBackend, runtime_id: str) -> None:
        """Copy the end of a log. A log that cannot be had keeps nobody from going on."""
        lines: list[str] = []
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                async for line in replica_log(backend, runtime_id, tail=MAX_LINES):
                    lines.append(line)
        except (BackendError, OSError) as error:  # running out of time is an OSError, too
            log.info("last log incomplete", runtime_id=runtime_id, error=str(error))
        if not lines:
            return
        try:
            await self._write(function, "\n".join(lines).encode(errors="replace")[-MAX_BYTES:])
        except OSError as error:
            log.warning("last log not kept", runtime_id=runtime_id, error=str(error))

    async def lines(self, function: str, *, tail: int) -> list[str]:
        """Return the last lines of a function's last log; none when there never was one."""
        text = (await self._read(function)).decode(errors="replace")
        return text.split("\n")[-tail:] if text and tail else []

    async def forget(self, function: str) -> None:
        """Remove the log of a function that is gone."""
        await asyncio.to_thread(self._path(function).unlink, missing_ok=True)

    async def _write(self, function: str, data: bytes) -> None:
        await asyncio.to_thread(self._replace, self._path(function), data)

    async def _read(self, function: str) -> bytes:
        try:
            return await asyncio.to_thread(self._path(function).read_bytes)
        except FileNotFoundError:
            return b""

    def _replace(self, path: Path, data: bytes) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        staged = path.with_suffix(".tmp")
        staged.write_bytes(data)
        staged.replace(path)

    def _path(self, function: str) -> Path:
        return self._directory / f"{function}.log"
