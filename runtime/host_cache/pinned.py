"""Files in pinned memory: read once, then shared with every engine that asks."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from runtime.host_cache.memory import HostMemory, HostMemoryError
from runtime.host_cache.protocol import MAX_PARTS, HeldFile

PART_BYTES = 512 << 20
"""A GPU is given access part by part, and copies the first while it gets it to the next."""
PIECE_BYTES = 16 << 20
NUM_READERS = 4
"""Fills memory at a few GB/s and leaves most of the bus to engines that load meanwhile."""
SPARE_SHARE = 0.05
"""Of the machine's memory, which is left to others whatever the budget."""


def pin(path: str, memory: HostMemory) -> HeldFile:
    """Read a file into pinned memory.

    Raises:
        OSError: It cannot be read, or ends early.
        HostMemoryError: There is not enough memory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    parts: list[int] = []
    try:
        num_bytes = os.fstat(descriptor).st_size
        _check_room(num_bytes)
        part_bytes = PART_BYTES * -(-num_bytes // (PART_BYTES * MAX_PARTS))
        for start in range(0, num_bytes, part_bytes):
            size = min(part_bytes, num_bytes - start)
            parts.append(memory.filled(size, partial(_read, descriptor, start)))
    except BaseException:
        for part in parts:
            os.close(part)
        raise
    finally:
        os.close(descriptor)
    return HeldFile(num_bytes=num_bytes, part_bytes=part_bytes, descriptors=tuple(parts))


def _read(descriptor: int, start: int, target: memoryview) -> None:
    def read(offset: int) -> None:
        piece = target[offset : offset + PIECE_BYTES]
        while piece:
            count = os.preadv(descriptor, [piece], start + offset)
            if not count:
                raise OSError(f"the file ends at byte {start + offset}")
            piece, offset = piece[count:], offset + count

    with ThreadPoolExecutor(NUM_READERS, "pin") as pool:
        for _ in pool.map(read, range(0, len(target), PIECE_BYTES)):
            pass


def _check_room(num_bytes: int) -> None:
    """Refuse what would take the last memory: pinned memory cannot be swapped or reclaimed."""
    figures = dict(_meminfo())
    spare_bytes = int(SPARE_SHARE * figures["MemTotal"])
    if num_bytes > figures["MemAvailable"] - spare_bytes:
        raise HostMemoryError(
            f"pinning {num_bytes} bytes would leave less than {spare_bytes} bytes of memory: "
            "lower COLDSPARK_HOST_CACHE_BYTES"
        )


def _meminfo() -> Iterator[tuple[str, int]]:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value, *_ = line.split()
        yield name.removesuffix(":"), int(value) * 1024
