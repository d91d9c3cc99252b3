"""Weights on their way to the device; on a machine without one, host memory stands in."""

import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from runtime.errors import SnapshotDamaged
from runtime.gpu.file_stream import FileStream, _Buffer
from runtime.gpu.weight_stream import WeightStream
from runtime.gpu.weights import GpuWeights
from runtime.memory.weights import SnapshotWeights
from snapshots.loader import open_rank
from snapshots.manifest import CHUNK_BYTES
from tests.runtime.kernels.device import DEVICE

pytestmark = pytest.mark.model


@pytest.fixture
def own_snapshot(smollm2_snapshot: Path, tmp_path: Path) -> Path:
    """A snapshot that may be damaged."""
    return shutil.copytree(smollm2_snapshot, tmp_path / smollm2_snapshot.name)


def num_readers() -> int:
    return sum(thread.name.startswith("weights-") for thread in threading.enumerate())


def is_over(stream: WeightStream) -> bool:
    return stream.is_over


def test_tensors_are_those_of_the_file(smollm2_snapshot: Path) -> None:
    on_host, _ = SnapshotWeights(smollm2_snapshot).load(None)
    weights = GpuWeights(smollm2_snapshot, DEVICE)
    progress: list[tuple[int, int]] = []
    found, report = weights.load(lambda done, total: progress.append((done, total)))
    assert found.keys() == on_host.keys()
    assert all(torch.equal(found[name].cpu(), on_host[name]) for name in on_host)
    assert weights.held_bytes == weights.total_bytes == report.num_bytes
    assert progress == sorted(progress)
    assert progress[-1] == (report.num_bytes, report.num_bytes)
    assert num_readers() == 0
    weights.release()
    assert weights.held_bytes == 0


def test_a_slab_made_in_inference_mode_is_filled(smollm2_snapshot: Path) -> None:
    weights = GpuWeights(smollm2_snapshot, DEVICE)
    with torch.inference_mode():
        weights.load(None)  # as the runner does
    weights.release()


def test_reading_begins_before_there_is_a_device(smollm2_snapshot: Path) -> None:
    weights = GpuWeights(smollm2_snapshot, DEVICE)
    weights.prefetch()
    assert num_readers() > 0
    weights.load(None)
    assert num_readers() == 0
    weights.release()


def test_the_interpreter_switches_faster_only_while_readers_run(smollm2_snapshot: Path) -> None:
    before_s = sys.getswitchinterval()
    stream = FileStream(open_rank(smollm2_snapshot))
    assert sys.getswitchinterval() < before_s
    stream.close()
    assert sys.getswitchinterval() == before_s


def test_reading_is_over_with_the_last_piece_not_with_the_readers(
    smollm2_snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    release = _Buffer.release

    def release_late(buffer: _Buffer) -> None:
        may_end.wait(10.0)
        release(buffer)

    monkeypatch.setattr(_Buffer, "release", release_late)
    rank = open_rank(smollm2_snapshot)
    stream = FileStream(rank)
    assert is_over(stream) is False, "nothing can be copied yet"
    stream.start_copy(torch.zeros(rank.data_bytes, dtype=torch.uint8, device=DEVICE))
    deadline = time.monotonic() + 10.0
    while not is_over(stream) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_over(stream)
    assert num_readers() > 0
    may_end.set()
    stream.finish()


def test_places_are_known_before_the_bytes_are_there(smollm2_snapshot: Path) -> None:
    weights = GpuWeights(smollm2_snapshot, DEVICE)
    places = {name: tensor.data_ptr() for name, tensor in weights.start().items()}
    found, _ = weights.load(None)
    assert {name: tensor.data_ptr() for name, tensor in found.items()} == places


def test_a_load_given_up_on_its_way_holds_nothing(smollm2_snapshot: Path) -> None:
    weights = GpuWeights(smollm2_snapshot, DEVICE)
    weights.start()
    weights.release()
    assert weights.held_bytes == 0
    assert num_readers() == 0


def test_a_second_load_puts_every_tensor_where_it_was(smollm2_snapshot: Path) -> None:
    weights = GpuWeights(smollm2_snapshot, DEVICE)
    first, _ = weights.load(None)
    before = {name: tensor.cpu() for name, tensor in first.items()}
    weights.release()
    second, _ = weights.load(None)
    assert {n: t.data_ptr() for n, t in second.items()} == {
        n: t.data_ptr() for n, t in first.items()
    }
    assert all(torch.equal(first[name].cpu(), before[name]) for name in before)
    weights.release()


def test_readers_that_nobody_waits_for_end(smollm2_snapshot: Path) -> None:
    weights = GpuWeights(smollm2_snapshot, DEVICE)
    weights.prefetch()
    weights.release()
    assert num_readers() == 0


@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_number_of_readers_fills_the_slab(smollm2_snapshot: Path, num_threads: int) -> None:
    rank = open_rank(smollm2_snapshot)
    slab = torch.zeros(rank.data_bytes, dtype=torch.uint8, device=DEVICE)
    stream = FileStream(rank, num_readers=num_threads)
    stream.start_copy(slab)
    report = stream.finish()  # verifies what it copied
    assert report.num_bytes == rank.data_bytes


def test_wrong_bytes_are_found_on_the_device_and_named(own_snapshot: Path) -> None:
    rank = open_rank(own_snapshot)
    name, slot = next(item for item in rank.tensors.items() if item[1].offset > CHUNK_BYTES)
    with rank.path.open("r+b") as file:
        file.seek(rank.file.data_offset + slot.offset + 1)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    weights = GpuWeights(own_snapshot, DEVICE)
    with pytest.raises(SnapshotDamaged, match=name):
        weights.load(None)
    assert weights.held_bytes == 0


def test_a_file_that_shrinks_while_it_is_read_is_damaged(own_snapshot: Path) -> None:
    weights = GpuWeights(own_snapshot, DEVICE)
    rank = open_rank(own_snapshot)
    with rank.path.open("r+b") as file:
        file.truncate(rank.file.data_offset + rank.data_bytes // 2)
    with pytest.raises(SnapshotDamaged, match="ends at byte"):
        weights.load(None)
    assert weights.held_bytes == 0
    assert num_readers() == 0


def test_readers_without_memory_end_the_load(
    smollm2_snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("runtime.gpu.file_stream.mmap.mmap", refuse)
    stream = FileStream(open_rank(smollm2_snapshot))
    stream.start_copy(torch.empty(CHUNK_BYTES, dtype=torch.uint8))
    with pytest.raises(OSError, match="allocate"):
        stream.finish()
    assert num_readers() == 0
