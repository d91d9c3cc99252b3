"""A node whose home is on a full disk: it serves, parks and wakes, and its books catch up."""

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from functions.spec import FunctionSpec
from tests.e2e.conftest import home_directory, running_node, wait_for
from tests.e2e.test_life import PARIS

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(120)]


@pytest.fixture
def small_disk() -> Iterator[Path]:
    with home_directory() as home:
        mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(home)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("no small disk can be mounted here")
        try:
            yield home
        finally:
            subprocess.run(["umount", "--lazy", str(home)], check=True)


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
