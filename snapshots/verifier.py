"""Reading a whole snapshot back and naming what is wrong, down to the tensor."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from snapshots.checksums import (
    EndedEarly,
    chunk_of,
    chunk_ranges,
    crc32_of,
    in_parallel,
    overlapping,
    read_exactly,
)
from snapshots.errors import SnapshotCorrupted
from snapshots.manifest import CHUNK_BYTES, Manifest, PlainFile, RankFile
from snapshots.profiles import PROFILES_DIR
from snapshots.safetensors_header import LENGTH_BYTES, HeaderError, TensorSlot, parse_header
from snapshots.store import MANIFEST_FILE, Snapshot

OnBytes = Callable[[int], None]


def find_corruption(snapshot: Snapshot, on_bytes: OnBytes) -> Iterator[SnapshotCorrupted]:
    """Yield everything that differs from what was built, file by file.

    Args:
        snapshot: What to read; its manifest is taken as right, the directory name vouches for it.
        on_bytes: Told how many bytes have been read since the last call.
    """
    for file in snapshot.manifest.files:
        yield from _check_plain(snapshot.path, file)
        on_bytes(file.size_bytes)
    for rank in snapshot.manifest.ranks:
        yield from _check_rank(snapshot, rank, on_bytes)
    for path in _unlisted(snapshot):
        yield SnapshotCorrupted(path, "does not belong to the snapshot")


def _unlisted(snapshot: Snapshot) -> Iterator[Path]:
    manifest = snapshot.manifest
    names = [MANIFEST_FILE, *(rank.path for rank in manifest.ranks)]
    names += [file.path for file in manifest.files]
    listed = {snapshot.path / name for name in names}
    profiles = snapshot.path / PROFILES_DIR  # they vouch for themselves, and save only time
    for path in sorted(snapshot.path.rglob("*")):
        if path.is_relative_to(profiles) and not profiles.is_symlink():
            continue
        if path not in listed and (path.is_symlink() or not path.is_dir()):
            yield path


def _check_plain(root: Path, file: PlainFile) -> Iterator[SnapshotCorrupted]:
    path = root / file.path
    try:
        with ExitStack() as stack:
            descriptor = _open(path, file.size_bytes, stack)
            sha256 = hashlib.sha256()
            for piece in read_exactly(descriptor, 0, file.size_bytes):
                sha256.update(piece)
    except SnapshotCorrupted as problem:
        yield problem
        return
    if sha256.hexdigest() != file.sha256:
        yield SnapshotCorrupted(path, "has been changed")


def _check_rank(
    snapshot: Snapshot, rank: RankFile, on_bytes: OnBytes
) -> Iterator[SnapshotCorrupted]:
    path = snapshot.path / rank.path
    with ExitStack() as stack:
        try:
            descriptor = _open(path, rank.size_bytes, stack)
            tensors = _header(snapshot.manifest, rank, path, descriptor)
        except SnapshotCorrupted as problem:
            on_bytes(rank.size_bytes)
            yield problem
            return
        on_bytes(rank.data_offset)
        yield from _check_chunks(path, rank, descriptor, tensors, on_bytes)


def _check_chunks(
    path: Path,
    rank: RankFile,
    descriptor: int,
    tensors: Mapping[str, TensorSlot],
    on_bytes: OnBytes,
) -> Iterator[SnapshotCorrupted]:
    ranges = chunk_ranges(rank.data_bytes)
    try:
        found = in_parallel(lambda r: chunk_of(descriptor, rank.data_offset + r[0], r[1]), ranges)
        for index, (chunk, expected) in enumerate(zip(found, rank.chunks, strict=True)):
            if chunk != expected:
                names = _wrong_tensors(rank, descriptor, tensors, index)
                yield SnapshotCorrupted(path, "has wrong bytes", chunk=index, tensors=names)
            on_bytes(ranges[index][1])
    except EndedEarly as error:  # cut while being read
        yield SnapshotCorrupted(path, str(error))


def _wrong_tensors(
    rank: RankFile, descriptor: int, tensors: Mapping[str, TensorSlot], chunk: int
) -> list[str]:
    crc32s = dict(zip(tensors, rank.crc32s, strict=True))
    return [
        name
        for name in overlapping(tensors, chunk * CHUNK_BYTES, CHUNK_BYTES)
        if crc32_of(descriptor, rank.data_offset + tensors[name].offset, tensors[name].num_bytes)
        != crc32s[name]
    ]


def _open(path: Path, size_bytes: int, stack: ExitStack) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise SnapshotCorrupted(path, f"cannot be opened: {error.strerror}") from error
    stack.callback(os.close, descriptor)
    size = os.fstat(descriptor).st_size
    if size != size_bytes:
        raise SnapshotCorrupted(path, f"has {size} bytes, should have {size_bytes}")
    return descriptor


def _header(
    manifest: Manifest, rank: RankFile, path: Path, descriptor: int
) -> Mapping[str, TensorSlot]:
    header = os.pread(descriptor, rank.data_offset, 0)
    digest = hashlib.sha256(header).hexdigest()
    if digest != rank.header_sha256:
        for other in manifest.ranks:
            if other.header_sha256 == digest:
                raise SnapshotCorrupted(path, f"is {other.path}: files have been swapped")
        raise SnapshotCorrupted(path, "has another header than the one that was built")
    try:
        return parse_header(header[LENGTH_BYTES:], rank.data_bytes).tensors
    except HeaderError as error:
        raise SnapshotCorrupted(path, str(error)) from error
