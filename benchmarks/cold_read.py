"""A file that is not in the page cache: read through it, or past it with O_DIRECT.

    python -m benchmarks.cold_read FILE [--runs 3] [--readers 10]

FILE is on the disk in question, a rank file of a snapshot for one, and as large as one. It is
dropped from the page cache before each run; the two ways take turns. Prints GB/s, and the share of
the file that the next read finds in memory.
"""

import argparse
import contextlib
import itertools
import mmap
import os
import statistics
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

PIECE_BYTES = 8 << 20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
GB = 1e9
WAYS = {"page cache": 0, "O_DIRECT": os.O_DIRECT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--readers", type=int, default=10)
    arguments = parser.parse_args()
    num_bytes = arguments.file.stat().st_size
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    cached: dict[str, float] = {}
    for _, (way, flags) in itertools.product(range(arguments.runs), WAYS.items()):
        _drop(arguments.file)
        began = time.perf_counter()
        _read(arguments.file, flags, arguments.readers)
        rates[way].append(num_bytes / GB / (time.perf_counter() - began))
        cached[way] = _cached_share(arguments.file)
    table = Table("way", "p50 GB/s", "least", "most", "then cached")
    for way, found in rates.items():
        figures = (statistics.median(found), min(found), max(found))
        table.add_row(way, *(f"{rate:.2f}" for rate in figures), f"{cached[way]:.0%}")
    Console().print(table)
    print(f"{num_bytes / GB:.2f} GB, {arguments.readers} readers, {os.cpu_count()} cores")


def _read(path: Path, flags: int, num_readers: int) -> None:
    """Read all of a file, each reader the next piece, into memory of its own."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    size = path.stat().st_size
    starts = iter(range(0, size, PIECE_BYTES))

    def read() -> None:
        with mmap.mmap(-1, PIECE_BYTES) as buffer:  # whole pages, as O_DIRECT wants them
            while (start := next(starts, None)) is not None:
                while start < size and (count := os.preadv(descriptor, [buffer], start)):
                    start += count
                    if start % PIECE_BYTES == 0:
                        break

    readers = [threading.Thread(target=read) for _ in range(num_readers)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    os.close(descriptor)


def _drop(path: Path) -> None:
    """Have the kernel forget the file's pages; those it has not written yet are written first."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _cached_share(path: Path) -> float:
    """Return the share of sampled pages that can be read without waiting for the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    buffer = bytearray(PAGE_BYTES)
    offsets = range(0, path.stat().st_size - PAGE_BYTES, 1 << 20)
    found = 0
    for offset in offsets:
        with contextlib.suppress(BlockingIOError):
            found += os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT) == PAGE_BYTES
    os.close(descriptor)
    return found / max(1, len(offsets))


if __name__ == "__main__":
    main()
