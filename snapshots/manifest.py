"""What a snapshot holds: versioned, canonical, hashed. Standard library only.

The digest of a snapshot is that of its manifest, and the manifest has the digests of everything
else, so a directory name pins every byte. Knows nothing of directories or tensors.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from types import NoneType
from typing import Any, Self

from snapshots.errors import InvalidName, ManifestError

FORMAT_VERSION = 1
CHUNK_BYTES = 16 << 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_RELATIVE_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", re.ASCII)


class SourceKind(StrEnum):
    """Where a model came from."""

    DIRECTORY = "directory"
    HUB = "hub"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Checksums of one piece of a data section.

    Attributes:
        sha256: Of its bytes.
        i64sum: Wrapping sum of its bytes read as little-endian int64.
    """

    sha256: str
    i64sum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFile:
    """The weights of one rank.

    Attributes:
        path: Relative to the snapshot, such as tp2/rank1.safetensors.
        size_bytes: Of the whole file.
        data_offset: Where the data section starts; also the length of the header.
        header_sha256: Of everything before the data section.
        chunks: One per CHUNK_BYTES of the data section; the last may be shorter.
        crc32s: One per tensor, padding included, in file order.
    """

    path: str
    size_bytes: int
    data_offset: int
    header_sha256: str
    chunks: tuple[Chunk, ...]
    crc32s: tuple[int, ...]

    @property
    def data_bytes(self) -> int:
        """Length of the data section."""
        return self.size_bytes - self.data_offset


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainFile:
    """A configuration or tokenizer file."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a snapshot was built from.

    Attributes:
        kind: How `location` is to be read.
        location: Hub id, or absolute path.
        requested_revision: Branch, tag or commit asked for; empty for the default and for paths.
        revision: The commit it stood for; empty for paths.
        fingerprint: Changes when the files do.
        dtype: The type `auto` stands for.
    """

    kind: SourceKind
    location: str
    requested_revision: str
    revision: str
    fingerprint: str
    dtype: str


@dataclass(frozen=True, kw_only=True)  # no slots: the digest is cached
class Manifest:
    """The whole content of one snapshot."""

    format_version: int
    name: str
    source: Source
    architecture: str
    dtype: str
    tensor_parallel_sizes: tuple[int, ...]
    ranks: tuple[RankFile, ...]
    files: tuple[PlainFile, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical form."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def digest12(self) -> str:
        """The part of the digest that names the directory."""
        return self.digest[:12]

    @property
    def ref(self) -> str:
        """The snapshot's full reference, `name@digest12`."""
        return f"{self.name}@{self.digest12}"

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest itself."""
        ranks = sum(rank.size_bytes for rank in self.ranks)
        return ranks + sum(file.size_bytes for file in self.files)

    def rank_file(self, tensor_parallel_size: int, rank: int) -> RankFile:
        """Return the file of one rank.

        Raises:
            ManifestError: The snapshot was not built for it.
        """
        path = rank_path(tensor_parallel_size, rank)
        for file in self.ranks:
            if file.path == path:
                return file
        raise ManifestError(
            f"{self.ref} has no {path}: built for tensor parallel sizes "
            f"{', '.join(map(str, self.tensor_parallel_sizes))}",
            hint=f"build it again with --tp {tensor_parallel_size}",
        )

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of a manifest.json.

        Raises:
            ManifestError: Not JSON, of another version, incomplete, or inconsistent.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"the manifest is not JSON: {error}") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise ManifestError(
                f"the manifest has format version {version!r}, this build reads {FORMAT_VERSION}",
                hint="build the snapshot again",
            )
        manifest = cls(
            **_fields(
                content,
                {
                    "format_version": int,
                    "name": str,
                    "source": dict,
                    "architecture": str,
                    "dtype": str,
                    "tensor_parallel_sizes": list,
                    "ranks": list,
                    "files": list,
                },
            )
            | {
                "source": _source(content.get("source")),
                "tensor_parallel_sizes": tuple(content.get("tensor_parallel_sizes", ())),
                "ranks": tuple(_rank_file(entry) for entry in content.get("ranks", ())),
                "files": tuple(_plain_file(entry) for entry in content.get("files", ())),
            }
        )
        _check(manifest)
        return manifest


def rank_path(tensor_parallel_size: int, rank: int) -> str:
    """Return a rank file's path relative to its snapshot."""
    return f"tp{tensor_parallel_size}/rank{rank}.safetensors"


def check_name(name: str) -> str:
    """Return `name` if a snapshot may be called so.

    Raises:
        InvalidName: It may not.
    """
    if not _NAME.fullmatch(name):
        raise InvalidName(
            f"{name!r} cannot name a snapshot",
            hint="use up to 96 letters, digits, '.', '_' and '-', starting with a letter or digit",
        )
    return name


def _fields(content: object, types: Mapping[str, type]) -> dict[str, Any]:
    """Return `content` as keyword arguments if its keys and types are exactly `types`."""
    found = content if isinstance(content, dict) else {}
    if found.keys() != types.keys():
        wrong = sorted(map(str, found.keys() ^ types.keys()))
        raise ManifestError(f"the manifest has unexpected or missing keys: {', '.join(wrong)}")
    for key, expected in types.items():
        if type(found[key]) is not expected:  # a bool is no count
            actual = type(found[key]) if found[key] is not None else NoneType
            raise ManifestError(
                f"{key} in the manifest is {actual.__name__}, not {expected.__name__}"
            )
    return found


def _source(content: object) -> Source:
    names = ("kind", "location", "requested_revision", "revision", "fingerprint", "dtype")
    fields = _fields(content, dict.fromkeys(names, str))
    try:
        return Source(**fields | {"kind": SourceKind(fields["kind"])})
    except ValueError as error:
        raise ManifestError(f"the manifest's source: {error}") from error


def _rank_file(content: object) -> RankFile:
    fields = _fields(
        content,
        {
            "path": str,
            "size_bytes": int,
            "data_offset": int,
            "header_sha256": str,
            "chunks": list,
            "crc32s": list,
        },
    )
    chunks = tuple(
        Chunk(**_fields(chunk, {"sha256": str, "i64sum": int})) for chunk in fields["chunks"]
    )
    return RankFile(**fields | {"chunks": chunks, "crc32s": tuple(fields["crc32s"])})


def _plain_file(content: object) -> PlainFile:
    return PlainFile(**_fields(content, {"path": str, "size_bytes": int, "sha256": str}))


def _check(manifest: Manifest) -> None:
    try:
        check_name(manifest.name)
    except InvalidName as error:
        raise ManifestError(f"the manifest's name: {error}") from error
    sizes = manifest.tensor_parallel_sizes
    if not sizes or any(type(size) is not int or not 1 <= size <= 1024 for size in sizes):
        raise ManifestError(f"tensor_parallel_sizes in the manifest are {list(sizes)!r}")
    expected = [rank_path(size, rank) for size in sizes for rank in range(size)]
    if [rank.path for rank in manifest.ranks] != expected:
        raise ManifestError("the manifest's rank files are not those of its tensor parallel sizes")
    for rank in manifest.ranks:
        _check_rank(rank)
    for file in manifest.files:
        if not _RELATIVE_PATH.fullmatch(file.path) or file.size_bytes < 0:
            raise ManifestError(f"the manifest lists {file.path!r}, which no snapshot holds")
        _check_sha256(file.sha256, file.path)


def _check_rank(rank: RankFile) -> None:
    if not 0 < rank.data_offset <= rank.size_bytes:
        raise ManifestError(f"{rank.path} has no room for its header in the manifest")
    num_chunks = -(-rank.data_bytes // CHUNK_BYTES)
    if len(rank.chunks) != num_chunks:
        raise ManifestError(
            f"{rank.path} has {len(rank.chunks)} chunks in the manifest, its size needs {num_chunks}"
        )
    if any(type(crc) is not int for crc in rank.crc32s):
        raise ManifestError(f"crc32s of {rank.path} in the manifest are not numbers")
    _check_sha256(rank.header_sha256, rank.path)
    for chunk in rank.chunks:
        _check_sha256(chunk.sha256, rank.path)


def _check_sha256(value: str, path: str) -> None:
    if not _SHA256.fullmatch(value):
        raise ManifestError(f"the manifest's digest {value!r} for {path} is not a SHA-256")
