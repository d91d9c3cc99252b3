"""Damage on disk: the verifier and the loader name the file, the chunk and the tensor."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from snapshots.builder import BuildOptions, build
from snapshots.errors import ManifestError, SnapshotCorrupted, SnapshotNotFound
from snapshots.files import has_file, read_file
from snapshots.loader import OpenRank, load_rank, open_rank, views
from snapshots.manifest import CHUNK_BYTES
from snapshots.sources.directory import DirectorySource
from snapshots.store import Snapshot, SnapshotStore
from snapshots.verifier import find_corruption
from tests.checkpoints import TinyLlama, write_tiny_llama


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a snapshot of two chunks and two sizes that tests copy."""
    root = tmp_path_factory.mktemp("large")
    write_tiny_llama(root / "model", TinyLlama(num_layers=9))
    options = BuildOptions(tensor_parallel_sizes=(1, 2))
    return build(DirectorySource(root / "model"), SnapshotStore(root), options).snapshot.path


@pytest.fixture
def snapshot(built: Path, tmp_path: Path) -> Snapshot:
    shutil.copytree(built, tmp_path / built.name)
    return SnapshotStore(tmp_path).get("model")


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def problems(snapshot: Snapshot) -> list[SnapshotCorrupted]:
    counted: list[int] = []
    found = list(find_corruption(snapshot, counted.append))
    assert sum(counted) == snapshot.manifest.size_bytes
    return found


def load(rank: OpenRank, num_threads: int = 0) -> torch.Tensor:
    slab = torch.empty(rank.data_bytes, dtype=torch.uint8)
    load_rank(rank, slab, num_threads=num_threads)
    return slab


def test_sound_snapshot_has_no_problems(snapshot: Snapshot) -> None:
    assert len(snapshot.manifest.ranks[0].chunks) == 2
    assert problems(snapshot) == []


@pytest.mark.parametrize(
    ("tensor", "chunk"),
    [
        ("embed_tokens.weight", 0),
        ("layers.8.self_attn.qkv_proj.weight", 1),
        ("norm.weight", 1),
        ("__pad.3", None),
    ],
)
def test_flipped_byte_is_named_by_verifier_and_loader(
    tensor: str, chunk: int | None, snapshot: Snapshot
) -> None:
    rank = open_rank(snapshot.path)
    slot = rank.all_tensors[tensor]
    offset = slot.offset + slot.num_bytes - 1
    path = snapshot.path / "tp1/rank0.safetensors"
    flip(path, rank.file.data_offset + offset)
    (problem,) = problems(snapshot)
    with pytest.raises(SnapshotCorrupted) as caught:
        load(rank)
    for found in (problem, caught.value):
        assert found.path == path
        assert found.tensors == (tensor,)
        assert found.chunk == (offset // CHUNK_BYTES if chunk is None else chunk)
        assert f"chunk {found.chunk}" in found.message
        assert tensor in found.message


def test_every_damaged_chunk_is_reported(snapshot: Snapshot) -> None:
    rank = open_rank(snapshot.path)
    for chunk in (0, 1):
        flip(rank.path, rank.file.data_offset + chunk * CHUNK_BYTES + 5)
    flip(snapshot.path / "tp2/rank1.safetensors", rank.file.data_offset + 5)
    found = [(problem.path.parent.name, problem.chunk) for problem in problems(snapshot)]
    assert found == [("tp1", 0), ("tp1", 1), ("tp2", 0)]


def swap(snapshot: Path) -> None:
    first, second = snapshot / "tp2/rank0.safetensors", snapshot / "tp2/rank1.safetensors"
    first.rename(snapshot / "aside")
    second.rename(first)
    (snapshot / "aside").rename(second)


def cut(snapshot: Path) -> None:
    path = snapshot / "tp2/rank0.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def link(snapshot: Path) -> None:
    path = snapshot / "tp2/rank0.safetensors"
    path.rename(snapshot / "aside")
    path.symlink_to(snapshot / "aside")


RANK_DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (swap, r"is tp2/rank1\.safetensors: files have been swapped"),
    (cut, "should have"),
    (link, "cannot be opened"),
    (lambda path: (path / "tp2/rank0.safetensors").unlink(), "cannot be opened"),
    (lambda path: flip(path / "tp2/rank0.safetensors", 0), "another header"),
    (lambda path: flip(path / "tp2/rank0.safetensors", 100), "another header"),
]


@pytest.mark.parametrize(("damage", "message"), RANK_DAMAGES)
def test_damaged_rank_files_are_named(
    damage: Callable[[Path], object], message: str, snapshot: Snapshot
) -> None:
    damage(snapshot.path)
    first = problems(snapshot)[0]
    assert first.path == snapshot.path / "tp2/rank0.safetensors"
    with pytest.raises(SnapshotCorrupted, match=message):
        raise first
    with pytest.raises(SnapshotCorrupted) as caught:
        open_rank(snapshot.path, tensor_parallel_size=2, rank=0)
    assert caught.value.path == first.path


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_plain_files_are_named(name: str, snapshot: Snapshot) -> None:
    flip(snapshot.path / name, 7)
    (problem,) = problems(snapshot)
    assert problem.path == snapshot.path / name
    (snapshot.path / name).unlink()
    (problem,) = problems(snapshot)
    assert "cannot be opened" in problem.message


def test_files_that_do_not_belong_to_the_snapshot_are_named(snapshot: Snapshot) -> None:
    (snapshot.path / "tp1" / "extra").touch()
    (snapshot.path / "link").symlink_to(snapshot.path / "gone")
    found = [problem.path for problem in problems(snapshot)]
    assert found == [snapshot.path / "link", snapshot.path / "tp1" / "extra"]


def test_plain_file_is_read_only_as_it_was_built(snapshot: Snapshot) -> None:
    content = (snapshot.path / "config.json").read_bytes()
    assert has_file(snapshot, "config.json")
    assert read_file(snapshot, "config.json") == content
    flip(snapshot.path / "config.json", 7)
    with pytest.raises(SnapshotCorrupted, match=r"config\.json: has been changed"):
        read_file(snapshot, "config.json")
    (snapshot.path / "config.json").unlink()
    with pytest.raises(SnapshotCorrupted, match=r"config\.json: cannot be read"):
        read_file(snapshot, "config.json")
    (snapshot.path / "extra.json").write_text("{}")
    assert not has_file(snapshot, "extra.json")
    with pytest.raises(SnapshotCorrupted, match=r"extra\.json: is not in the manifest"):
        read_file(snapshot, "extra.json")


def test_ranks_and_snapshots_that_do_not_exist_are_refused(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match="built for tensor parallel sizes 1, 2") as caught:
        open_rank(snapshot.path, tensor_parallel_size=4, rank=0)
    assert "--tp 4" in caught.value.hint
    with pytest.raises(ManifestError, match=r"tp2/rank2"):
        open_rank(snapshot.path, tensor_parallel_size=2, rank=2)
    with pytest.raises(SnapshotNotFound):
        open_rank(tmp_path / "none")


def test_file_that_shrinks_after_opening_is_corrupted(snapshot: Snapshot) -> None:
    rank = open_rank(snapshot.path)
    with rank.path.open("r+b") as file:
        file.truncate(rank.file.data_offset + CHUNK_BYTES + 1000)
    with pytest.raises(SnapshotCorrupted, match="ends at byte"):
        load(rank)


@pytest.mark.parametrize("num_threads", [0, 1, 5])
def test_progress_is_in_order_and_complete(num_threads: int, snapshot: Snapshot) -> None:
    rank = open_rank(snapshot.path)
    slab = torch.empty(rank.data_bytes, dtype=torch.uint8)
    seen: list[tuple[int, int]] = []
    report = load_rank(
        rank, slab, num_threads=num_threads, on_progress=lambda *progress: seen.append(progress)
    )
    ends = [min(n * CHUNK_BYTES, rank.data_bytes) for n in range(1, 3)]
    assert seen == [(end, rank.data_bytes) for end in ends]
    assert report.num_bytes == rank.data_bytes
    assert slab.numpy().tobytes() == rank.path.read_bytes()[rank.file.data_offset :]


def test_views_share_the_slabs_memory(snapshot: Snapshot) -> None:
    rank = open_rank(snapshot.path)
    slab = load(rank)
    tensors = views(rank, slab)
    assert list(tensors) == list(rank.tensors)
    slab.zero_()
    assert not tensors["layers.3.mlp.down_proj.weight"].any()


@pytest.mark.parametrize(
    "slab", [torch.empty(10, dtype=torch.uint8), torch.empty(10, dtype=torch.float32)]
)
def test_slab_of_another_size_is_refused(slab: torch.Tensor, snapshot: Snapshot) -> None:
    with pytest.raises(ValueError, match="slab is"):
        load_rank(open_rank(snapshot.path), slab)
