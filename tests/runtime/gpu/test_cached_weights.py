"""Weights from the host cache: the CUDA driver's memory on a GPU, a memfd where there is none."""

import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runtime.gpu.cached_stream import CachedStream
from runtime.gpu.weights import GpuWeights
from runtime.host_cache import pinned as pinned_module
from runtime.host_cache.holder import Holder
from runtime.host_cache.memory import DriverMemory
from runtime.host_cache.protocol import PAGE_BYTES
from runtime.memory.weights import SnapshotWeights
from tests.fakes.host_memory import MemfdMemory
from tests.runtime.host_cache.serving import num_parts_open, serving, wait_for
from tests.runtime.kernels.device import DEVICE

pytestmark = pytest.mark.model


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    """One that serves this process."""
    holder = Holder(tmp_path, DriverMemory.open if DEVICE == "cuda" else MemfdMemory)
    with serving(holder, tmp_path, os.getuid()):
        yield holder


@pytest.fixture
def snapshot(
    holder: Holder, smollm2_snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A snapshot whose weights the host holds in many parts."""
    monkeypatch.setattr(pinned_module, "PART_BYTES", 8 * PAGE_BYTES)
    snapshot = Path(shutil.copytree(smollm2_snapshot, tmp_path / smollm2_snapshot.name))
    (path,) = snapshot.glob("tp1/*")
    assert holder.hold(str(path), is_pinned=True)["is_pinned"]
    yield snapshot
    holder.drop(str(path))


def test_held_weights_are_those_of_the_file_though_it_is_not_read(
    snapshot: Path, smollm2_snapshot: Path
) -> None:
    on_host, _ = SnapshotWeights(smollm2_snapshot).load(None)
    before = num_parts_open()
    weights = GpuWeights(snapshot, DEVICE)
    (path,) = snapshot.glob("tp1/*")
    path.write_bytes(b"")
    progress: list[tuple[int, int]] = []
    with torch.inference_mode():  # as the runner does
        found, report = weights.load(lambda done, total: progress.append((done, total)))
    assert all(torch.equal(found[name].cpu(), on_host[name]) for name in on_host)
    assert len(progress) > 2
    assert progress[-1] == (report.num_bytes, report.num_bytes)
    weights.tidy()
    assert found["norm.weight"].cpu().equal(on_host["norm.weight"])
    weights.release()
    assert num_parts_open() == before


def test_a_second_load_puts_every_tensor_where_it_was(snapshot: Path) -> None:
    weights = GpuWeights(snapshot, DEVICE)
    first, _ = weights.load(None)
    weights.release()
    second, _ = weights.load(None)
    assert {n: t.data_ptr() for n, t in second.items()} == {
        n: t.data_ptr() for n, t in first.items()
    }
    weights.release()


def test_wrong_bytes_in_memory_are_read_from_the_file_and_renewed(snapshot: Path) -> None:
    def first_part() -> bytes:
        held = wait_for(snapshot.parent, file)
        with mmap.mmap(held.descriptors[1], held.part_bytes) as pages:
            content = pages[:64]
        held.close()
        return content

    if DEVICE == "cuda":
        pytest.skip("the driver's memory cannot be mapped as a file, to damage it")
    (path,) = snapshot.glob("tp1/*")
    file = path.relative_to(snapshot.parent)
    right = first_part()
    held = wait_for(snapshot.parent, file)
    with mmap.mmap(held.descriptors[1], held.part_bytes) as pages:
        pages[:64] = bytes(byte ^ 1 for byte in right)
    held.close()
    weights = GpuWeights(snapshot, DEVICE)
    weights.load(None)  # verifies what it copied
    weights.release()
    assert first_part() == right


def test_memory_that_cannot_be_mapped_leaves_the_file(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA driver: refused")

    monkeypatch.setattr("runtime.gpu.host_parts.MappedParts.copy", refuse)
    monkeypatch.setattr("runtime.gpu.host_parts.DriverParts.copy", refuse)
    weights = GpuWeights(snapshot, DEVICE)
    _, report = weights.load(None)
    assert report.num_bytes == weights.total_bytes
    weights.release()


def test_a_file_that_was_held_before_it_was_whole_is_not_used(
    snapshot: Path, holder: Holder
) -> None:
    (path,) = snapshot.glob("tp1/*")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    holder.drop(str(path))
    assert holder.hold(str(path), is_pinned=True)["is_pinned"]
    path.write_bytes(whole)
    weights = GpuWeights(snapshot, DEVICE)
    _, report = weights.load(None)
    assert report.num_bytes == weights.total_bytes
    weights.release()


@pytest.mark.parametrize("is_started", [True, False])
def test_a_load_given_up_on_its_way_holds_nothing(snapshot: Path, *, is_started: bool) -> None:
    weights = GpuWeights(snapshot, DEVICE)
    weights.prefetch()
    assert isinstance(weights._stream, CachedStream)
    assert not weights.is_read
    if is_started:
        weights.start()
    weights.release()
    assert weights.held_bytes == 0
    assert not any(thread.name == "weights" for thread in threading.enumerate())
