"""Files on disk, with their rows in the database: uploads in pieces, outputs, expiry.

A file is there when its row is. What lies on disk without a row is an upload that was cut off or
a deletion that was, and is swept away.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import structlog

from controller.batches.access import transact
from controller.batches.threads import open_in_thread
from controller.clock import Clock, unix_us
from controller.errors import BodyTooLarge, NotFound
from controller.store.database import Database
from controller.store.errors import NotStored
from controller.store.files import Files, StoredFile

log = structlog.get_logger(__name__)

PREFIX = "file-"
PART_SUFFIX = ".part"
OUTPUT_SUFFIXES = ("-output", "-errors")
WRITE_BYTES = 1 << 20  # gathered before a thread is asked to write them


class Upload:
    """A file that is being received; nothing of it is seen before it is complete.

    Args:
        output: Where it is written.
        max_bytes: Longest file.
    """

    def __init__(self, output: BinaryIO, max_bytes: int) -> None:
        self.num_bytes = 0
        self._output = output
        self._max_bytes = max_bytes
        self._pending = bytearray()

    async def write(self, piece: bytes) -> None:
        """Take the next bytes.

        Raises:
            BodyTooLarge: The file has become too long.
        """
        self.num_bytes += len(piece)
        if self.num_bytes > self._max_bytes:
            raise BodyTooLarge(
                f"the file is larger than {self._max_bytes} bytes; send a smaller one"
            )
        self._pending += piece
        if len(self._pending) >= WRITE_BYTES:
            await self._flush()

    async def finish(self) -> None:
        """Bring everything to the disk."""
        await self._flush()
        await asyncio.to_thread(_sync, self._output)

    async def _flush(self) -> None:
        pending, self._pending = self._pending, bytearray()
        await asyncio.to_thread(self._output.write, pending)


class FileStore:
    """All files of one controller.

    Args:
        directory: Where they lie; made when needed.
        database: Where their rows are.
        clock: Dates them.
        max_file_bytes: Longest single file.
        max_total_bytes: Longest sum of all files.
    """

    def __init__(
        self,
        directory: Path,
        database: Database,
        clock: Clock,
        *,
        max_file_bytes: int,
        max_total_bytes: int,
    ) -> None:
        self._directory = directory
        self._database = database
        self._clock = clock
        self._max_file_bytes = max_file_bytes
        self._max_total_bytes = max_total_bytes

    @property
    def max_file_bytes(self) -> int:
        """Longest single file."""
        return self._max_file_bytes

    @asynccontextmanager
    async def receive(self) -> AsyncIterator[tuple[str, Upload]]:
        """Yield the id of a new file and where to write it; not kept unless `keep` is called.

        Raises:
            BodyTooLarge: There is no room left for any file.
        """
        taken = await transact(self._database, lambda connection: Files(connection).total_bytes())
        room = self._max_total_bytes - taken
        if room <= 0:
            raise BodyTooLarge(
                f"the files here take {taken} bytes, all there is room for; delete some"
            )
        file_id = new_file_id()
        path = self.path(file_id).with_suffix(PART_SUFFIX)
        output = await open_in_thread(partial(_create, path), partial(_discard, path=path))
        try:
            yield file_id, Upload(output, min(self._max_file_bytes, room))
        finally:
            await asyncio.shield(asyncio.to_thread(_discard, output, path))

    async def keep(self, file: StoredFile, content: Path | None = None) -> StoredFile:
        """Publish a file under its row; the same one again changes nothing.

        Args:
            file: The row.
            content: What becomes the file, on the same disk; None for what was received.
        """
        path = self.path(file.id)
        await asyncio.to_thread(_publish, content or path.with_suffix(PART_SUFFIX), path)
        await transact(self._database, lambda connection: Files(connection).add(file))
        return file

    async def get(self, file_id: str, *, key_id: str | None) -> StoredFile:
        """Return a file of a key.

        Raises:
            NotFound: There is none, or it is another key's.
        """
        try:
            file = await transact(self._database, lambda connection: Files(connection).get(file_id))
        except NotStored as error:
            raise _no_such_file(file_id) from error
        if file.key_id != key_id or self._is_over(file):
            raise _no_such_file(file_id)
        return file

    async def list(
        self,
        *,
        key_id: str | None,
        purpose: str | None,
        after: str | None,
        limit: int,
        is_ascending: bool,
    ) -> Sequence[StoredFile]:
        """Return a key's files by time.

        Raises:
            NotFound: There is no file `after`.
        """
        if after is not None:
            await self.get(after, key_id=key_id)
        found = await transact(
            self._database,
            lambda connection: Files(connection).list(
                key_id=key_id, purpose=purpose, after=after, limit=limit, is_ascending=is_ascending
            ),
        )
        return [file for file in found if not self._is_over(file)]

    async def delete(self, file_id: str) -> None:
        """Forget a file and what is in it."""
        await transact(self._database, lambda connection: Files(connection).delete(file_id))
        await asyncio.to_thread(self.path(file_id).unlink, missing_ok=True)

    async def check_content(self, file: StoredFile) -> None:
        """Make sure that what is in a file is there.

        Raises:
            NotFound: It has just been deleted.
        """
        if not await asyncio.to_thread(self.path(file.id).exists):
            raise _no_such_file(file.id)

    async def sweep(self, is_used: Callable[[str], bool] = lambda _: False) -> None:
        """Delete what has expired, unless something still reads it."""
        now_us = unix_us(self._clock.now())
        for file in await self._database.run(lambda connection: Files(connection).expired(now_us)):
            if not is_used(file.id):
                log.info("file expired", file_id=file.id)
                await self.delete(file.id)

    async def clear_up(self) -> None:
        """Remove what an earlier controller left half done; nothing may be under way yet."""
        known = await self._database.run(lambda connection: Files(connection).ids())
        await asyncio.to_thread(self._remove_strays, known)

    def spool_path(self, name: str) -> Path:
        """Return where what is to become a file is gathered."""
        return self._directory / "spool" / name

    def path(self, file_id: str) -> Path:
        """Return where a file lies."""
        return self._directory / file_id

    def _is_over(self, file: StoredFile) -> bool:
        return file.expires_us is not None and file.expires_us <= unix_us(self._clock.now())

    def _remove_strays(self, known: set[str]) -> None:
        if not self._directory.is_dir():
            return
        for path in self._directory.iterdir():
            is_ours = path.name.startswith(PREFIX) and path.name not in known
            # A batch that was finalizing when its controller ended comes back for its outputs.
            if is_ours and not path.name.endswith(OUTPUT_SUFFIXES):
                path.unlink()


def new_file_id() -> str:
    """Return an id that no file has had before."""
    return PREFIX + secrets.token_hex(12)


def _no_such_file(file_id: str) -> NotFound:
    return NotFound(
        f"there is no file {file_id[:64]!r}; GET /v1/files lists yours", param="file_id"
    )


def _create(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _sync(output: BinaryIO) -> None:
    output.flush()
    os.fsync(output.fileno())


def _discard(output: BinaryIO, path: Path) -> None:
    output.close()
    path.unlink(missing_ok=True)


def _publish(content: Path, path: Path) -> None:
    if content.exists():  # else an earlier attempt has come this far
        content.rename(path)
