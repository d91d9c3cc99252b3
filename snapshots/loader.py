"""From a rank file to tensors in memory: read in parallel, verified, never copied.

Reads plain files with positioned reads, so all replicas of a machine share one page cache. Knows
nothing of models; what the tensors mean is the engine's.
"""

import hashlib
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from snapshots.errors import SnapshotCorrupted
from snapshots.layout import PAD_PREFIX
from snapshots.manifest import CHUNK_BYTES, RankFile
from snapshots.safetensors_header import LENGTH_BYTES, HeaderError, TensorSlot, parse_header
from snapshots.store import open_snapshot

WORD_BYTES = 8
CHUNK_WORDS = CHUNK_BYTES // WORD_BYTES
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRank:
    """A rank file whose header has been checked.

    Attributes:
        path: The file.
        file: Its checksums.
        tensors: Without padding, by engine name, in execution order; offsets count from the start
            of the data section, which is the start of the slab.
        all_tensors: With padding.
    """

    path: Path
    file: RankFile
    tensors: Mapping[str, TensorSlot]
    all_tensors: Mapping[str, TensorSlot]

    @property
    def data_bytes(self) -> int:
        """Size of the slab it wants."""
        return self.file.data_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load took."""

    num_bytes: int
    read_s: float
    verify_s: float


def open_rank(snapshot_dir: Path, *, tensor_parallel_size: int = 1, rank: int = 0) -> OpenRank:
    """Read and check the header of a rank file; reads no weights.

    Raises:
        SnapshotNotFound: There is no snapshot.
        ManifestError: Its manifest is wrong, or has no such rank.
        SnapshotCorrupted: The file is missing, too short, or not the one that was built.
    """
    manifest = open_snapshot(snapshot_dir).manifest
    file = manifest.rank_file(tensor_parallel_size, rank)
    path = snapshot_dir / file.path
    with _opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size != file.size_bytes:
            raise SnapshotCorrupted(path, f"has {size} bytes, should have {file.size_bytes}")
        header = os.pread(descriptor, file.data_offset, 0)
    if hashlib.sha256(header).hexdigest() != file.header_sha256:
        raise SnapshotCorrupted(path, "has another header than the one that was built")
    try:
        tensors = parse_header(header[LENGTH_BYTES:], file.data_bytes).tensors
    except HeaderError as error:
        raise SnapshotCorrupted(path, str(error)) from error
    return OpenRank(
        path=path,
        file=file,
        tensors={n: slot for n, slot in tensors.items() if not n.startswith(PAD_PREFIX)},
        all_tensors=tensors,
    )


def load_rank(
    rank: OpenRank,
    slab: torch.Tensor,
    *,
    num_threads: int = 0,
    on_progress: OnBytes | None = None,
) -> LoadReport:
    """Read a rank's weights into a slab and verify them.

    Args:
        rank: What to load.
        slab: Host memory, uint8 [data_bytes]; filled from the start, chunk by chunk.
        num_threads: Parallel reads; 0 for one per core, at most 16.
        on_progress: Told (bytes done, bytes in all), in order, from the calling thread.

    Raises:
        SnapshotCorrupted: The file ends early, or a chunk does not add up; the slab is unusable.
    """
    if slab.dtype != torch.uint8 or slab.shape != (rank.data_bytes,) or not slab.is_contiguous():
        raise ValueError(f"slab is {slab.dtype} {tuple(slab.shape)}, wants {rank.data_bytes} bytes")
    began = time.perf_counter()
    _read(rank, slab, num_threads or min(16, os.cpu_count() or 1), on_progress)
    read = time.perf_counter()
    verify(rank, slab)
    verified = time.perf_counter()
    return LoadReport(num_bytes=rank.data_bytes, read_s=read - began, verify_s=verified - read)


def views(rank: OpenRank, slab: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return every tensor as a view into the slab, by engine name."""
    return {
        name: slab[slot.offset : slot.offset + slot.num_bytes]
        .view(TORCH_DTYPES[slot.dtype])
        .view(slot.shape)
        for name, slot in rank.tensors.items()
    }


def _read(
    rank: OpenRank, slab: torch.Tensor, num_threads: int, on_progress: OnBytes | None
) -> None:
    memory = slab.numpy().data
    with _opened(rank.path) as descriptor, ThreadPoolExecutor(num_threads, "load") as pool:

        def read(start: int) -> int:
            return read_piece(rank, descriptor, memory[start : start + CHUNK_BYTES], start)

        try:
            for end in pool.map(read, range(0, rank.data_bytes, CHUNK_BYTES)):
                if on_progress is not None:
                    on_progress(end, rank.data_bytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_piece(rank: OpenRank, descriptor: int, target: memoryview, start: int) -> int:
    """Fill `target` with the data section's bytes from `start` on; return where they end.

    Raises:
        SnapshotCorrupted: The file ends before.
    """
    done = 0
    while done < len(target):
        offset = rank.file.data_offset + start + done
        count = os.preadv(descriptor, [target[done:]], offset)
        if not count:
            raise SnapshotCorrupted(rank.path, f"ends at byte {offset}", chunk=start // CHUNK_BYTES)
        done += count
    return start + done


def verify(rank: OpenRank, slab: torch.Tensor) -> None:
    """Compare a slab, wherever it is, with the sums that the builder took.

    Args:
        rank: What was read.
        slab: uint8 [data_bytes], 8-byte aligned.

    Raises:
        SnapshotCorrupted: With the first wrong chunk and the tensors in it.
    """
    found = chunk_sums(slab)
    for chunk, (expected, actual) in enumerate(zip(rank.file.chunks, found, strict=True)):
        if expected.i64sum != actual:
            names = _wrong_tensors(rank, slab.cpu(), chunk)
            raise SnapshotCorrupted(
                rank.path, "was read with wrong bytes", chunk=chunk, tensors=names
            )


def chunk_sums(slab: torch.Tensor) -> list[int]:
    """Return the wrapping sum of each chunk's int64 words; the slab is as for `verify`."""
    words = slab.view(torch.int64)
    whole = len(words) // CHUNK_WORDS * CHUNK_WORDS
    sums = words[:whole].view(-1, CHUNK_WORDS).sum(dim=1).tolist()
    return sums if whole == len(words) else [*sums, int(words[whole:].sum())]


def _wrong_tensors(rank: OpenRank, slab: torch.Tensor, chunk: int) -> list[str]:
    memory = slab.numpy().data
    start, end = chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES
    return [
        name
        for (name, slot), crc32 in zip(rank.all_tensors.items(), rank.file.crc32s, strict=True)
        if slot.offset < end
        and start < slot.offset + slot.num_bytes
        and zlib.crc32(memory[slot.offset : slot.offset + slot.num_bytes]) != crc32
    ]


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise SnapshotCorrupted(path, f"cannot be opened: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
