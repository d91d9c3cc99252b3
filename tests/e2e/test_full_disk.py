"""A node on a full disk, its home or its store: it serves, parks and wakes, and catches up."""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from functions.spec import FunctionSpec
from tests.e2e.conftest import Node, home_directory, running_node, wait_for
from tests.e2e.test_life import PARIS

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(120)]


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A home that is easily filled."""
    with home_directory() as home, mounted(home, size="24m"):
        yield home


@contextmanager
def mounted(path: Path, size: str) -> Iterator[None]:
    """Have a directory be a disk of its own; where nothing can be mounted, only CI insists."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = f"no small disk can be mounted here: {done.stderr.strip()}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(descriptor, bytes(4096))
    except OSError:
        os.close(descriptor)


def num_records(home: Path) -> int:
    with closing(sqlite3.connect(home / "coldspark.db")) as database:
        return int(database.execute("SELECT COUNT(*) FROM usage").fetchone()[0])


def record_profile(node: Node) -> httpx.Response:
    return httpx.post(f"{node.url}/api/v1/functions/smollm2/profile", timeout=60.0)


def test_a_full_disk_stops_only_the_books(
    small_disk: Path, smollm2_snapshot: Path, spec: FunctionSpec
) -> None:
    (small_disk / "snapshots").symlink_to(smollm2_snapshot.parent)
    with running_node(small_disk) as node:
        node.deploy(spec)
        assert node.ask() == PARIS
        wait_for(lambda: num_records(small_disk) == 1, "the first record")
        fill(small_disk / "rubbish")
        for _ in range(3):
            node.operate("park")
            assert node.ask() == PARIS, "woken"
        assert num_records(small_disk) == 1
        (small_disk / "rubbish").unlink()
        wait_for(lambda: num_records(small_disk) == 4, "the books")


def test_a_full_store_is_loaded_from_and_learns_later(
    smollm2_snapshot: Path, spec: FunctionSpec
) -> None:
    with home_directory() as home:
        store = home / "snapshots"
        store.mkdir()
        with mounted(store, size="400m"):
            as_built = shutil.ignore_patterns("profiles")
            shutil.copytree(smollm2_snapshot, store / smollm2_snapshot.name, ignore=as_built)
            with running_node(home) as node:
                node.deploy(spec)
                fill(store / "rubbish")
                assert node.ask() == PARIS, "loaded"
                log = home / "controller.log"
                wait_for(lambda: "profile not recorded" in log.read_text(), "a recording in vain")
                refused = record_profile(node)
                assert refused.status_code == 409
                assert "No space left on device" in refused.json()["error"]["message"]
                node.operate("park")
                assert node.ask() == PARIS, "woken"
                node.kill()
                node.start()
                assert node.ask() == PARIS, "adopted"
                node.operate("stop")
                assert node.ask() == PARIS, "loaded once more"
                assert not list(store.rglob("profile.json"))
                (store / "rubbish").unlink()
                assert record_profile(node).status_code == 200
                assert [path.name for path in store.rglob("profiles/*/*")] == ["profile.json"]
