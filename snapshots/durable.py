"""Making files survive a power cut, and trees disappear as a whole. Standard library only."""

import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file or the entries of a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename a tree within one file system, durably."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    sync(target.parent)


def tree_bytes(path: Path) -> int:
    """Return the disk space a tree takes."""
    return sum(entry.lstat().st_blocks * 512 for entry in path.rglob("*"))


def remove_tree(path: Path) -> int:
    """Remove a tree that nobody else uses and return the disk space it took."""
    num_bytes = tree_bytes(path)
    shutil.rmtree(path)
    return num_bytes
