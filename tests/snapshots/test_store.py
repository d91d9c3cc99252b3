"""The store: finding, pinning, collecting, and never leaving its directory."""

import os
import shutil
from pathlib import Path

import pytest

from snapshots.builder import BuildOptions, build
from snapshots.errors import InvalidName, ManifestError, SnapshotAmbiguous, SnapshotNotFound
from snapshots.locking import Locked, locked
from snapshots.sources.directory import DirectorySource
from snapshots.store import Snapshot, SnapshotStore
from snapshots.verifier import find_corruption


@pytest.fixture(scope="module")
def built(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with two snapshots that tests copy."""
    root = tmp_path_factory.mktemp("built")
    for name, dtype in (("alpha", "float32"), ("beta", "bfloat16")):
        options = BuildOptions(name=name, dtype=dtype)
        build(DirectorySource(tiny_llama), SnapshotStore(root), options)
    return root


@pytest.fixture
def store(built: Path, tmp_path: Path) -> SnapshotStore:
    shutil.copytree(built, tmp_path / "store")
    return SnapshotStore(tmp_path / "store")


def refs(store: SnapshotStore) -> list[str]:
    return [snapshot.ref for snapshot in store.list()]


def test_snapshots_go_by_name_digest_or_its_start(store: SnapshotStore) -> None:
    (alpha, beta) = store.list()
    assert store.get("alpha") == alpha
    assert store.get(beta.ref) == beta
    assert store.get(beta.ref[:-6]) == beta
    assert alpha.path == store.root / alpha.ref


@pytest.mark.parametrize("ref", ["", "gamma", "alpha@000000000000", "../alpha", "alph", "alpha@"])
def test_unknown_references_say_what_there_is(ref: str, store: SnapshotStore) -> None:
    with pytest.raises(SnapshotNotFound) as caught:
        store.get(ref)
    assert "alpha@" in caught.value.hint


def test_name_of_two_snapshots_is_ambiguous(store: SnapshotStore, tiny_llama: Path) -> None:
    build(DirectorySource(tiny_llama), store, BuildOptions(name="alpha", dtype="float16"))
    with pytest.raises(SnapshotAmbiguous, match="alpha"):
        store.get("alpha")


def test_store_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert SnapshotStore(tmp_path / "none").list() == []


def find(store: SnapshotStore, location: str, dtype: str = "auto") -> Snapshot | None:
    return store.find(location=location, revision=None, dtype=dtype, tensor_parallel_size=1)


def test_find_goes_by_source_type_and_ranks(store: SnapshotStore, tiny_llama: Path) -> None:
    location = str(tiny_llama)
    found = {dtype: find(store, location, dtype) for dtype in ("auto", "float32", "bfloat16")}
    assert {dtype: snapshot and snapshot.manifest.name for dtype, snapshot in found.items()} == {
        "auto": "alpha",  # the checkpoint is float32
        "float32": "alpha",
        "bfloat16": "beta",
    }
    assert find(store, location, "float16") is None
    assert find(store, location + "x") is None
    assert (
        store.find(location=location, revision=None, dtype="auto", tensor_parallel_size=2) is None
    )
    assert (
        store.find(location=location, revision="main", dtype="auto", tensor_parallel_size=1) is None
    )


def test_find_returns_the_newest(store: SnapshotStore, tiny_llama: Path) -> None:
    options = BuildOptions(name="aaa", dtype="float32")
    newest = build(DirectorySource(tiny_llama), store, options).snapshot
    os.utime(newest.path / "manifest.json", ns=(1 << 62, 1 << 62))
    assert find(store, str(tiny_llama)) == newest


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "binary", "rename"])
def test_directories_without_their_manifest_are_broken_not_listed(
    damage: str, store: SnapshotStore
) -> None:
    alpha = store.get("alpha")
    path = alpha.path / "manifest.json"
    if damage == "change":
        path.write_text(path.read_text().replace('"float32"', '"float16"', 1))
    elif damage == "truncate":
        path.write_text(path.read_text()[:100])
    elif damage == "remove":
        path.unlink()
    elif damage == "binary":
        path.write_bytes(b"\xff\xfe")
    else:
        alpha.path.rename(store.root / "alpha@000000000000")
    assert [snapshot.manifest.name for snapshot in store.list()] == ["beta"]
    (broken,) = store.broken()
    assert broken.ref.startswith("alpha@")
    with pytest.raises(ManifestError):
        store.get("alpha")


def test_collect_removes_what_nobody_pinned(store: SnapshotStore) -> None:
    alpha, beta = store.list()
    store.pin("alpha", "function-a")
    removed = store.collect()
    assert [entry.ref for entry in removed] == [beta.ref]
    assert removed[0].num_bytes > 100_000
    assert refs(store) == [alpha.ref]
    assert not beta.path.exists()
    store.unpin(alpha.ref, "function-a")
    store.unpin("alpha", "function-a")
    assert [entry.ref for entry in store.collect()] == [alpha.ref]
    assert refs(store) == []


def test_dry_run_removes_nothing(store: SnapshotStore) -> None:
    before = refs(store)
    assert [entry.ref for entry in store.collect(dry_run=True)] == before
    assert refs(store) == before


def test_collect_can_be_limited_and_forced(store: SnapshotStore) -> None:
    alpha, beta = store.list()
    store.pin("alpha", "a")
    assert store.collect(only=["alpha"]) == []
    assert [e.ref for e in store.collect(only=["alpha"], keep_pinned=False)] == [alpha.ref]
    assert refs(store) == [beta.ref]
    with pytest.raises(SnapshotNotFound):
        store.collect(only=["alpha"])


def test_pins_are_counted_by_owner(store: SnapshotStore) -> None:
    store.pin("alpha", "b")
    store.pin("alpha", "a")
    store.pin("alpha", "a")
    assert store.pins("alpha") == ["a", "b"]
    store.unpin("alpha", "a")
    assert store.pins("alpha") == ["b"]
    assert store.pins("beta") == []


def test_pins_of_a_snapshot_do_not_outlive_it(store: SnapshotStore, tiny_llama: Path) -> None:
    store.pin("alpha", "a")
    store.collect(only=["alpha"], keep_pinned=False)
    build(DirectorySource(tiny_llama), store, BuildOptions(name="alpha", dtype="float32"))
    assert store.pins("alpha") == []


def test_pins_cannot_leave_the_store(store: SnapshotStore) -> None:
    with pytest.raises(InvalidName):
        store.pin("alpha", "../../evil")
    with pytest.raises(SnapshotNotFound):
        store.pin("../alpha", "a")
    with pytest.raises(SnapshotNotFound):
        store.pin("gamma", "a")


def test_live_builds_survive_collecting_and_abandoned_ones_do_not(store: SnapshotStore) -> None:
    for key in ("live", "dead", "fresh"):
        (store.stage(key) / "content").mkdir(parents=True)
        os.utime(store.stage(key), (0, 0) if key != "fresh" else None)
    with locked(store.stage_lock("live")):
        removed = [entry.ref for entry in store.collect(only=None)]
    assert ".building/dead" in removed
    assert not store.stage("dead").exists()
    assert store.stage("live").exists()
    assert store.stage("fresh").exists()
    assert [entry.ref for entry in store.collect(stale_after_s=0)] == [
        ".building/fresh",
        ".building/live",
    ]


def test_age_of_a_build_counts_from_its_last_step(store: SnapshotStore) -> None:
    store.stage("slow").mkdir(parents=True)
    (store.stage("slow") / "journal.jsonl").touch()
    os.utime(store.stage("slow"), (0, 0))
    assert ".building/slow" not in [entry.ref for entry in store.collect()]
    os.utime(store.stage("slow") / "journal.jsonl", (0, 0))
    assert [entry.ref for entry in store.collect()] == [".building/slow"]


def test_quarantined_snapshot_is_out_of_use_until_collected(store: SnapshotStore) -> None:
    alpha = store.get("alpha")
    place = store.quarantine("alpha", "chunk 3 is wrong")
    assert (place / "quarantine.txt").read_text() == "chunk 3 is wrong\n"
    (listed,) = store.quarantined()
    assert (listed.ref, listed.reason) == (alpha.ref, "chunk 3 is wrong")
    assert [snapshot.manifest.name for snapshot in store.list()] == ["beta"]
    store.pin("beta", "a")
    assert [entry.ref for entry in store.collect()] == [f".quarantine/{alpha.ref}"]
    assert not place.exists()


def test_broken_snapshot_can_be_quarantined(store: SnapshotStore) -> None:
    alpha = store.get("alpha")
    (alpha.path / "manifest.json").write_text("{")
    assert store.quarantine(alpha.ref, "no manifest").is_dir()
    assert store.broken() == []


@pytest.mark.parametrize("damage", ["manifest", "truncate", "remove", "config"])
def test_broken_snapshot_is_built_again_and_its_remains_are_set_aside(
    damage: str, store: SnapshotStore, tiny_llama: Path
) -> None:
    alpha = store.get("alpha")
    store.pin("alpha", "function-a")
    rank = alpha.path / "tp1" / "rank0.safetensors"
    if damage == "manifest":
        (alpha.path / "manifest.json").write_text("{")
    elif damage == "truncate":
        os.truncate(rank, 4096)
    elif damage == "remove":
        rank.unlink()
    else:
        (alpha.path / "config.json").unlink()
    assert find(store, str(tiny_llama)) is None
    options = BuildOptions(name="alpha", dtype="float32")
    report = build(DirectorySource(tiny_llama), store, options)
    assert not report.is_reused
    assert report.snapshot.ref == alpha.ref
    assert list(find_corruption(store.get("alpha"), lambda _: None)) == []
    assert (store.root / ".quarantine" / alpha.ref / "quarantine.txt").read_text()
    assert store.pins("alpha") == ["function-a"]


def test_links_in_the_store_are_not_followed(store: SnapshotStore, tmp_path: Path) -> None:
    alpha = store.get("alpha")
    alpha.path.rename(tmp_path / alpha.ref)
    alpha.path.symlink_to(tmp_path / alpha.ref)
    assert [snapshot.manifest.name for snapshot in store.list()] == ["beta"]
    store.collect()
    assert (tmp_path / alpha.ref / "manifest.json").exists()


def test_removed_lock_file_protects_nobody_twice(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        path.unlink()
        with locked(path, wait=False), pytest.raises(Locked), locked(path, wait=False):
            pass


def test_shared_locks_keep_out_only_exclusive_ones(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        locked(path, shared=True),
        locked(path, shared=True, wait=False),
        pytest.raises(Locked),
        locked(path, wait=False),
    ):
        pass
