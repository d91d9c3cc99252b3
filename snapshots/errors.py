"""Everything that can go wrong with a snapshot. Standard library only.

SnapshotError
├── SourceError                 the model to build from
│   ├── SourceNotFound          no such directory, file, repository or revision
│   ├── SourceGated             the hub wants a token that may read it
│   ├── SourceUnreachable       temporary: the hub did not answer
│   ├── PickleRefused           weights only in a format that can run code
│   ├── SourceInvalid           malformed or incomplete
│   └── SourceUnsupported       well-formed, but not something this version can serve
├── TensorParallelUnsupported   the model does not divide over this many ranks
├── DiskFull                    no room for the build, or for the download it starts with
├── InvalidName                 not usable as the name of a snapshot
├── SnapshotNotFound
├── SnapshotAmbiguous           a short reference that several snapshots match
├── ManifestError               a manifest that cannot be read or contradicts itself
└── SnapshotCorrupted           bytes on disk are not those that were built
"""

from collections.abc import Sequence
from pathlib import Path


class SnapshotError(Exception):
    """A failure with advice.

    Args:
        message: What failed, and the value.
        hint: What to do about it; empty when the message says it.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SourceError(SnapshotError):
    """The model to build from cannot be used."""


class SourceNotFound(SourceError):
    """No such directory, file, repository or revision."""


class SourceGated(SourceError):
    """The repository exists, but this token may not read it."""


class SourceUnreachable(SourceError):
    """The hub did not answer; trying again can help."""


class PickleRefused(SourceError):
    """The weights exist only as pickles, which run code when they are opened."""


class SourceInvalid(SourceError):
    """The source is malformed or incomplete."""


class SourceUnsupported(SourceError):
    """The source is well-formed, but this version cannot serve it."""


class TensorParallelUnsupported(SnapshotError):
    """The model does not divide over the ranks asked for."""


class DiskFull(SnapshotError):
    """A file system has no room for the build, or for the download it starts with."""


class InvalidName(SnapshotError):
    """Not usable as the name of a snapshot."""


class SnapshotNotFound(SnapshotError):
    """No snapshot goes by this reference."""


class SnapshotAmbiguous(SnapshotError):
    """Several snapshots match a reference without a digest."""


class ManifestError(SnapshotError):
    """A manifest cannot be read or contradicts itself."""


class SnapshotCorrupted(SnapshotError):
    """Bytes on disk are not those that were built.

    Args:
        path: The file at fault.
        detail: What is wrong with it.
        chunk: Index of the 16 MiB piece of the data section at fault, if there is one.
        tensors: Names of the tensors with wrong bytes, as far as they are known.
    """

    def __init__(
        self, path: Path, detail: str, *, chunk: int | None = None, tensors: Sequence[str] = ()
    ) -> None:
        self.path = path
        self.chunk = chunk
        self.tensors = tuple(tensors)
        place = "" if chunk is None else f", chunk {chunk}"
        named = f" (tensors: {', '.join(tensors)})" if tensors else ""
        super().__init__(
            f"{path}{place}: {detail}{named}",
            hint="take it out of use with `snapshots verify --quarantine` and build it again; if it "
            "happens twice, check the disk",
        )
