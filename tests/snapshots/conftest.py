"""A tiny checkpoint and an empty store for every test that wants one."""

from pathlib import Path

import pytest

from snapshots.store import SnapshotStore
from tests.checkpoints import write_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint directory that no test may change."""
    directory = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    write_tiny_llama(directory)
    return directory


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "store")
