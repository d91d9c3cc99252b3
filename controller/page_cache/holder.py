"""A process that keeps files in the page cache: it maps them and locks the mapping.

In a process of its own, because locking a file that has to be read takes as long as reading it,
and what is locked counts as this process's memory. It is told by lines of JSON what to hold, and
answers each with a line; it ends, and with it all locks, when nobody can tell it anything more.
"""

import ctypes
import json
import mmap
import os
import resource
import sys
from collections.abc import Mapping
from typing import Any

SCRATCH_BYTES = 4 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
]
_libc.mlock.argtypes = _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


class Holder:
    """The files that are held: by path, where each is mapped and how long it is."""

    def __init__(self) -> None:
        self._mapped: dict[str, tuple[int, int]] = {}

    def hold(self, path: str) -> str:
        """Bring a file into the page cache and lock it there.

        Returns:
            Why it is not locked; empty if it is. It is in the page cache all the same.

        Raises:
            OSError: It cannot be read or mapped.
        """
        if path in self._mapped:
            return ""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            if address == _MAP_FAILED:
                raise _error("mmap")
            if _libc.mlock(address, size) == 0:
                self._mapped[path] = address, size
                return ""
            reason = str(_error("mlock"))
            _libc.munmap(address, size)
            _read(descriptor, size)
            return reason
        finally:
            os.close(descriptor)

    def drop(self, path: str) -> None:
        """Hold a file no more; what is left of it goes when its memory is wanted."""
        if path in self._mapped:
            _libc.munmap(*self._mapped.pop(path))


def _read(descriptor: int, size: int) -> None:
    scratch = bytearray(SCRATCH_BYTES)
    for offset in range(0, size, SCRATCH_BYTES):
        os.preadv(descriptor, [scratch], offset)


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def answer(holder: Holder, request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what one line asks for; say what became of it."""
    path = request["path"]
    try:
        if request["op"] == "drop":
            holder.drop(path)
            return {"path": path, "is_held": False, "reason": ""}
        reason = holder.hold(path)
    except OSError as error:
        return {"path": path, "is_held": False, "reason": f"{path}: {error.strerror}"}
    return {"path": path, "is_held": not reason, "reason": reason}


def main() -> None:
    """Serve standard input until it ends."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    holder = Holder()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(holder, json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
