"""The directory of all snapshots of a machine. Standard library only.

Finds, lists, pins, publishes and collects. Whatever starts with a dot is not a snapshot: builds
under way (.building), pins (.pins), snapshots taken out of use (.quarantine), locks (.locks) and
what is being deleted (.trash). Reading needs no write permission.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from snapshots.durable import move, remove_tree, tree_bytes
from snapshots.errors import (
    ManifestError,
    SnapshotAmbiguous,
    SnapshotError,
    SnapshotNotFound,
)
from snapshots.locking import Locked, locked
from snapshots.manifest import Manifest, PlainFile, RankFile, SourceKind, check_name
from snapshots.profiles import Profile, write_profile

MANIFEST_FILE = "manifest.json"
REASON_FILE = "quarantine.txt"
JOURNAL_FILE = "journal.jsonl"  # of a build; written with every step
DEFAULT_BRANCH = "main"
DAY_S = 86_400.0

_REF = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,95})(?:@([0-9a-f]{1,12}))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A published snapshot.

    Attributes:
        ref: `name@digest12`, also the name of its directory.
        path: Its directory.
        manifest: What it holds.
    """

    ref: str
    path: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenSnapshot:
    """A directory that looks like a snapshot and is none."""

    ref: str
    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """Something a collection has removed, or would remove.

    Attributes:
        ref: Of the snapshot; for anything else its path in the store.
        num_bytes: Disk space it took.
    """

    ref: str
    num_bytes: int


class SnapshotStore:
    """All snapshots below one directory, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def list(self) -> Sequence[Snapshot]:
        """Return all snapshots with a valid manifest, by reference."""
        return [entry for entry in self._scan() if isinstance(entry, Snapshot)]

    def broken(self) -> Sequence[BrokenSnapshot]:
        """Return what lies in the store and cannot be used."""
        return [entry for entry in self._scan() if isinstance(entry, BrokenSnapshot)]

    def quarantined(self) -> Sequence[BrokenSnapshot]:
        """Return what was taken out of use, with the reasons, until a collection removes it."""
        return [
            BrokenSnapshot(ref=path.name, path=path, reason=_reason(path))
            for path in _entries(self.root / ".quarantine")
        ]

    def get(self, ref: str) -> Snapshot:
        """Return the snapshot that `name`, `name@digest12` or `name@start` stands for.

        Raises:
            SnapshotNotFound: There is none.
            SnapshotAmbiguous: There are several.
            ManifestError: It is there, but its manifest is not.
        """
        matched = _REF.fullmatch(ref)
        entries = [] if matched is None else [e for e in self._scan() if _matches(e.ref, ref)]
        if not entries:
            known = ", ".join(entry.ref for entry in self._scan())
            raise SnapshotNotFound(
                f"no snapshot {ref!r} in {self.root}", hint=known and f"there are: {known}"
            )
        if len(entries) > 1:
            names = ", ".join(entry.ref for entry in entries)
            raise SnapshotAmbiguous(f"{ref!r} can be {names}", hint="give the digest")
        if isinstance(entries[0], BrokenSnapshot):
            raise ManifestError(f"{entries[0].path}: {entries[0].reason}", hint="build it again")
        return entries[0]

    def find(
        self, *, location: str, revision: str | None, dtype: str, tensor_parallel_size: int
    ) -> Snapshot | None:
        """Return the newest snapshot built from a source that has all its files, or None.

        Args:
            location: Hub id or path.
            revision: Branch, tag or commit; None for the default branch and for paths.
            dtype: Type of the weights; `auto` for the checkpoint's own.
            tensor_parallel_size: One that must be in it.
        """
        found = [
            snapshot
            for snapshot in self.list()
            if _is_at(snapshot.manifest, location, revision)
            and has_dtype(snapshot.manifest, dtype)
            and tensor_parallel_size in snapshot.manifest.tensor_parallel_sizes
            and is_whole(snapshot)
        ]
        return max(found, key=_published_ns, default=None)

    def pin(self, ref: str, owner: str) -> None:
        """Keep a snapshot from being collected until `owner` unpins it.

        Raises:
            SnapshotNotFound: There is none, or it has just been collected.
            InvalidName: `owner` cannot name a file.
        """
        with self._collecting(shared=True):
            snapshot = self.get(ref)
            directory = self.root / ".pins" / snapshot.ref
            directory.mkdir(parents=True, exist_ok=True)
            (directory / check_name(owner)).touch()

    def unpin(self, ref: str, owner: str) -> None:
        """Drop a pin; one that is not there is no error."""
        full = self.get(ref).ref if "@" not in ref else ref
        if _REF.fullmatch(full):
            (self.root / ".pins" / full / check_name(owner)).unlink(missing_ok=True)

    def pins(self, ref: str) -> Sequence[str]:
        """Return the owners of a snapshot's pins."""
        directory = self.root / ".pins" / self.get(ref).ref
        return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []

    def quarantine(self, ref: str, reason: str) -> Path:
        """Take a snapshot out of use, keeping its files for inspection, and return its new place.

        Raises:
            SnapshotNotFound: There is none.
        """
        with self._collecting(shared=False):
            return self._set_aside(self._directory(ref), reason)

    def collect(
        self,
        *,
        only: Collection[str] | None = None,
        keep_pinned: bool = True,
        dry_run: bool = False,
        stale_after_s: float = DAY_S,
    ) -> Sequence[Removed]:
        """Remove every snapshot without a pin, broken or quarantined ones, and abandoned builds.

        Args:
            only: Leave everything alone but these snapshots; None for no such limit.
            keep_pinned: Off removes pinned snapshots too.
            dry_run: Only say what would go.
            stale_after_s: How long after its last step a build that nobody runs is kept, so that
                it can be resumed.

        Raises:
            SnapshotNotFound: One of `only` does not exist.
        """
        with self._collecting(shared=False):
            removed = []
            limit = None if only is None else {self._directory(ref).name for ref in only}
            for entry in self._scan():
                if limit is not None and entry.ref not in limit:
                    continue
                pins = self.root / ".pins" / entry.ref
                if keep_pinned and pins.is_dir() and any(pins.iterdir()):
                    continue
                removed.append(self._remove(entry.path, entry.ref, dry_run=dry_run))
                if pins.is_dir() and not dry_run:
                    remove_tree(pins)
            if limit is not None:
                return removed
            for folder in (".quarantine", ".trash"):
                for path in _entries(self.root / folder):
                    removed.append(self._remove(path, f"{folder}/{path.name}", dry_run=dry_run))
            for path in _entries(self.root / ".building"):
                removed += self._collect_stage(path, stale_after_s, dry_run=dry_run)
            return removed

    def stage(self, key: str) -> Path:
        """Return where a build keeps its unfinished files."""
        return self.root / ".building" / key

    def stage_lock(self, key: str) -> Path:
        """Return the lock that a build holds."""
        return self.root / ".locks" / f"{key}.lock"

    def publish(self, content: Path, manifest: Manifest) -> Snapshot:
        """Give a finished directory its name, in one step.

        One of the same content may exist: it stays if it has all its files, else it goes into
        quarantine.
        """
        snapshot = Snapshot(ref=manifest.ref, path=self.root / manifest.ref, manifest=manifest)
        with self._collecting(shared=False):
            if snapshot not in self.list() or not is_whole(snapshot):
                if snapshot.path.exists():
                    self._set_aside(snapshot.path, "incomplete, and built again")
                move(content, snapshot.path)
        return snapshot

    def record(
        self, ref: str, profile: Profile, kernels: Mapping[str, bytes] | None = None
    ) -> None:
        """Keep a profile beside a snapshot.

        Args:
            ref: `name@digest12`.
            profile: It replaces the one of the same fingerprint.
            kernels: Contents of its kernels' files; None leaves those that are there.

        Raises:
            SnapshotNotFound: It has just been collected or taken out of use.
            OSError: The store cannot be written to.
        """
        path = self.root / ref
        with self._collecting(shared=True):
            if not (_REF.fullmatch(ref) and (path / MANIFEST_FILE).is_file()):
                raise SnapshotNotFound(f"no snapshot {ref!r} in {self.root}")
            write_profile(path, profile, kernels)

    def _set_aside(self, path: Path, reason: str) -> Path:
        target = self.root / ".quarantine" / path.name
        if target.exists():
            remove_tree(target)
        move(path, target)
        (target / REASON_FILE).write_text(reason + "\n", encoding="utf-8")
        return target

    def _collect_stage(
        self, path: Path, stale_after_s: float, *, dry_run: bool
    ) -> Sequence[Removed]:
        journal = path / JOURNAL_FILE
        last_step = (journal if journal.exists() else path).stat().st_mtime
        age_s = datetime.now(UTC).timestamp() - last_step
        if age_s < stale_after_s:
            return []
        lock = self.stage_lock(path.name)
        try:
            with locked(lock, wait=False):
                removed = self._remove(path, f".building/{path.name}", dry_run=dry_run)
                lock.unlink()
                return [removed]
        except Locked:
            return []

    def _remove(self, path: Path, ref: str, *, dry_run: bool) -> Removed:
        if dry_run:
            return Removed(ref=ref, num_bytes=tree_bytes(path))
        trash = self.root / ".trash" / path.name
        if path != trash:
            if trash.exists():
                remove_tree(trash)
            move(path, trash)
        return Removed(ref=ref, num_bytes=remove_tree(trash))

    def _directory(self, ref: str) -> Path:
        """Return a snapshot's directory even if its manifest cannot be read."""
        for entry in self._scan():
            if entry.ref == ref:
                return entry.path
        return self.get(ref).path

    def _scan(self) -> Iterator[Snapshot | BrokenSnapshot]:
        for path in _entries(self.root):
            matched = _REF.fullmatch(path.name)
            if matched is None or matched[2] is None or path.is_symlink() or not path.is_dir():
                continue
            try:
                yield open_snapshot(path)
            except SnapshotError as error:
                yield BrokenSnapshot(ref=path.name, path=path, reason=error.message)

    def _collecting(self, *, shared: bool) -> AbstractContextManager[None]:
        return locked(self.root / ".locks" / "store.lock", shared=shared)


def open_snapshot(path: Path) -> Snapshot:
    """Read the snapshot in a directory.

    Raises:
        SnapshotNotFound: There is no manifest.
        ManifestError: It cannot be read, or is not the one the directory is named after.
    """
    try:
        text = (path / MANIFEST_FILE).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path / MANIFEST_FILE} is not text") from error
    except OSError as error:
        raise SnapshotNotFound(f"{path} has no manifest: {error}") from error
    manifest = Manifest.from_json(text)
    if manifest.ref != path.name:
        raise ManifestError(
            f"{path / MANIFEST_FILE} describes {manifest.ref}: it has been changed",
            hint="build the snapshot again",
        )
    return Snapshot(ref=manifest.ref, path=path, manifest=manifest)


def is_whole(snapshot: Snapshot) -> bool:
    """Return whether every file is there at its size; what is in them is the verifier's."""
    files: Sequence[RankFile | PlainFile] = (*snapshot.manifest.ranks, *snapshot.manifest.files)
    return all(_has_size(snapshot.path / file.path, file.size_bytes) for file in files)


def has_dtype(manifest: Manifest, dtype: str) -> bool:
    """Return whether a snapshot is what a build for `dtype` would give."""
    return manifest.dtype == (manifest.source.dtype if dtype == "auto" else dtype)


def _is_at(manifest: Manifest, location: str, revision: str | None) -> bool:
    source = manifest.source
    if source.kind is not SourceKind.HUB:
        return not revision and source.location == str(Path(location).expanduser().resolve())
    if source.location != location:
        return False
    if revision is None or revision == DEFAULT_BRANCH:
        return source.requested_revision in ("", DEFAULT_BRANCH)
    return revision in (source.requested_revision, source.revision)


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


def _published_ns(snapshot: Snapshot) -> int:
    return (snapshot.path / MANIFEST_FILE).stat().st_mtime_ns


def _matches(ref: str, wanted: str) -> bool:
    return ref.startswith(wanted) if "@" in wanted else ref.partition("@")[0] == wanted


def _reason(path: Path) -> str:
    try:
        return (path / REASON_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
