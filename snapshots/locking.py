"""Advisory locks between processes, released by the kernel when the holder dies.

Standard library only. A lock file may be removed by its holder: whoever waited for the removed
file notices and takes the new one.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Locked(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold a lock for the length of a block.

    Args:
        path: The lock file, created with its directory when missing.
        shared: Let other shared holders in.
        wait: Wait for the holder instead of raising.

    Raises:
        Locked: `wait` is off and another process holds it.
    """
    descriptor = _acquire(path, shared=shared, wait=wait)
    try:
        yield
    finally:
        os.close(descriptor)


def _acquire(path: Path, *, shared: bool, wait: bool) -> int:
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, operation)
            if _is_current(descriptor, path):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise Locked(str(path)) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed while we waited


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
