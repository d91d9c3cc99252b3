"""Files kept in the page cache: mapped, and the mapping locked."""

import ctypes
import mmap
import os
import resource

SCRATCH_BYTES = 4 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
]
_libc.mlock.argtypes = _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


class LockedFile:
    """A file that is in the page cache and stays there until `close`.

    Args:
        path: What to bring there. It is, even if it cannot be locked there.

    Raises:
        OSError: It cannot be read, mapped or locked.
    """

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._size = os.fstat(descriptor).st_size
            self._address = _libc.mmap(
                None, self._size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0
            )
            if self._address == _MAP_FAILED:
                raise _error("mmap")
            if _libc.mlock(self._address, self._size) != 0:
                error = _error("mlock")
                self.close()
                _read(descriptor, self._size)
                raise error
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Hold the file no more; what is left of it goes when its memory is wanted."""
        _libc.munmap(self._address, self._size)


def lift_limit() -> None:
    """Allow this process to lock as much as it may allow itself."""
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))


def _read(descriptor: int, size: int) -> None:
    scratch = bytearray(SCRATCH_BYTES)
    for offset in range(0, size, SCRATCH_BYTES):
        os.preadv(descriptor, [scratch], offset)


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
