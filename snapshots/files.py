"""Reading the small files of a snapshot: only those the manifest lists, only as they were built.

Standard library only.
"""

import hashlib

from snapshots.errors import SnapshotCorrupted
from snapshots.store import Snapshot


def has_file(snapshot: Snapshot, name: str) -> bool:
    """Return whether the manifest lists a configuration or tokenizer file."""
    return any(file.path == name for file in snapshot.manifest.files)


def read_file(snapshot: Snapshot, name: str) -> bytes:
    """Return the content of a configuration or tokenizer file.

    Raises:
        SnapshotCorrupted: The manifest does not list it, or it is missing or has been changed.
    """
    path = snapshot.path / name
    for file in snapshot.manifest.files:
        if file.path == name:
            break
    else:
        raise SnapshotCorrupted(path, "is not in the manifest")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SnapshotCorrupted(path, f"cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise SnapshotCorrupted(path, "has been changed")
    return content
