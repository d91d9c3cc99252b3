"""The checksums of rank files: per chunk for loading, per tensor to name what is wrong.

numpy is imported by the first sum, torch never.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from snapshots.layout import RankLayout
from snapshots.manifest import CHUNK_BYTES, Chunk, PlainFile, RankFile
from snapshots.safetensors_header import TensorSlot

READ_BYTES = 4 << 20

T = TypeVar("T")
R = TypeVar("R")


class EndedEarly(Exception):
    """A file is shorter than it should be."""


def read_exactly(descriptor: int, offset: int, num_bytes: int) -> Iterator[bytes]:
    """Yield a range of a file in pieces.

    Raises:
        EndedEarly: The file ends within the range.
    """
    end = offset + num_bytes
    while offset < end:
        piece = os.pread(descriptor, min(READ_BYTES, end - offset), offset)
        if not piece:
            raise EndedEarly(f"ends at {offset}, expected {end}")
        yield piece
        offset += len(piece)


def chunk_ranges(data_bytes: int) -> list[tuple[int, int]]:
    """Return offset and length of each chunk of a data section."""
    offsets = range(0, data_bytes, CHUNK_BYTES)
    return [(offset, min(CHUNK_BYTES, data_bytes - offset)) for offset in offsets]


def chunk_of(descriptor: int, offset: int, num_bytes: int) -> Chunk:
    """Checksum one chunk; `offset` counts from the start of the file."""
    sha256 = hashlib.sha256()
    total = 0
    rest = b""
    for piece in read_exactly(descriptor, offset, num_bytes):
        sha256.update(piece)
        words = rest + piece if rest else piece
        whole = len(words) - len(words) % 8
        total += _sum_words(words[:whole])
        rest = words[whole:]
    total += _sum_words(rest.ljust(8, b"\0"))
    return Chunk(sha256=sha256.hexdigest(), i64sum=_wrap(total))


def crc32_of(descriptor: int, offset: int, num_bytes: int) -> int:
    """Return the CRC-32 of a range of a file."""
    crc = 0
    for piece in read_exactly(descriptor, offset, num_bytes):
        crc = zlib.crc32(piece, crc)
    return crc


def sha256_of(descriptor: int, offset: int, num_bytes: int) -> str:
    """Return the SHA-256 of a range of a file."""
    sha256 = hashlib.sha256()
    for piece in read_exactly(descriptor, offset, num_bytes):
        sha256.update(piece)
    return sha256.hexdigest()


def describe_rank(layout: RankLayout, descriptor: int, on_bytes: Callable[[int], None]) -> RankFile:
    """Read a finished rank file back and checksum all of it."""
    data_offset = len(layout.header)
    chunks = []
    ranges = chunk_ranges(layout.data_bytes)
    checked = in_parallel(lambda r: chunk_of(descriptor, data_offset + r[0], r[1]), ranges)
    for chunk, (_, num_bytes) in zip(checked, ranges, strict=True):
        chunks.append(chunk)
        on_bytes(num_bytes)
    crc32s = in_parallel(
        lambda slot: crc32_of(descriptor, data_offset + slot.offset, slot.num_bytes),
        list(layout.slots.values()),
    )
    return RankFile(
        path=layout.path,
        size_bytes=layout.size_bytes,
        data_offset=data_offset,
        header_sha256=sha256_of(descriptor, 0, data_offset),
        chunks=tuple(chunks),
        crc32s=tuple(crc32s),
    )


def plain_file(root: Path, path: str) -> PlainFile:
    """Describe a small file."""
    content = (root / path).read_bytes()
    return PlainFile(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def overlapping(slots: Mapping[str, TensorSlot], offset: int, num_bytes: int) -> list[str]:
    """Return the tensors with bytes in a range of the data section."""
    return [
        name
        for name, slot in slots.items()
        if slot.offset < offset + num_bytes and offset < slot.offset + slot.num_bytes
    ]


def in_parallel(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """Yield results in order, computed on as many threads as there are cores."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(function, items)


def _sum_words(content: bytes) -> int:
    import numpy as np  # finding a snapshot built must not wait for it

    return int(np.frombuffer(content, dtype="<i8").sum(dtype=np.int64))


def _wrap(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
