"""Triton's cache as this process uses it: what it took from it, what it had to compile.

The cache is a directory of entries named by a hash of everything that goes into a kernel, so one
that another process has filled, on another machine, is as good as its own.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import structlog
import triton

from snapshots.profiles import KernelFile, ProfileUnusable

USED_SUFFIXES = frozenset({".json", ".cubin"})  # loading a kernel needs no more
LIBRARY_SUFFIX = ".so"
GROUP_PREFIX = "__grp__"  # names the other files of an entry; written last

log = structlog.get_logger()


class KernelCache:
    """Notes what this process takes from Triton's cache, from its making on.

    Attributes:
        num_compilations: Kernels that were not in it.
        is_seeded: Whether all that an earlier start has used is in it, so that a kernel that this
            one has not used yet is only loaded when it is.
    """

    def __init__(self) -> None:
        self.num_compilations = 0
        self.is_seeded = False
        self._files: set[Path] = set()
        triton.knobs.compilation.listener = self._note

    def seed(self, files: Iterable[KernelFile], read: Callable[[KernelFile], bytes]) -> None:
        """Put recorded files where Triton looks for them, unless an entry is there.

        An entry that is damaged is left out: Triton will compile it.

        Args:
            files: Of a profile.
            read: Returns the content of one or raises ProfileUnusable.

        Raises:
            ProfileUnusable: The cache cannot be written to.
        """
        root = Path(triton.knobs.cache.dir)
        self.is_seeded = True
        ordered = sorted(files, key=lambda file: file.path)
        for entry, group in groupby(ordered, key=lambda file: file.path.partition("/")[0]):
            try:
                self._files.update(_seed_entry(root / entry, list(group), read))
            except ProfileUnusable as reason:
                self.is_seeded = False
                log.warning("kernel_not_taken", entry=entry, reason=str(reason))
            except OSError as error:
                self.is_seeded = False
                raise ProfileUnusable(f"Triton's cache {root}: {error}") from error

    def collect(self) -> dict[str, bytes]:
        """Return the files that a later start needs, by entry/name: used here, or seeded."""
        found = {}
        for path in self._files | _loaded_libraries(Path(triton.knobs.cache.dir)):
            try:
                found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
            except OSError as error:
                log.warning("kernel_not_recorded", path=str(path), reason=str(error))
        return found

    def _note(self, *, metadata_group: dict[str, str], cache_hit: bool, **_: Any) -> None:
        self.num_compilations += not cache_hit
        paths = map(Path, metadata_group.values())
        self._files.update(path for path in paths if path.suffix in USED_SUFFIXES)


def _seed_entry(
    directory: Path, files: list[KernelFile], read: Callable[[KernelFile], bytes]
) -> Iterable[Path]:
    """Put the files of an entry into its directory, unless it is complete; return their paths."""
    targets = {directory / Path(file.path).name: file for file in files}
    groups = [path for path in targets if path.suffix == ".json"]
    needed = [_group_file(path) for path in groups] or list(targets)
    if all(path.exists() for path in needed):
        return targets
    contents = {path: read(file) for path, file in targets.items()}
    directory.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        _replace(path, content)
    for path in groups:
        children = {child.name: str(child) for child in targets if child.suffix in USED_SUFFIXES}
        _replace(_group_file(path), json.dumps({"child_paths": children}).encode())
    return targets


def _group_file(path: Path) -> Path:
    return path.with_name(GROUP_PREFIX + path.name)


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f"tmp.{os.getpid()}.{secrets.token_hex(8)}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _loaded_libraries(root: Path) -> set[Path]:
    """Return the launchers that this process has loaded from the cache."""
    lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    mapped = {Path(line.split(maxsplit=5)[-1]) for line in lines if LIBRARY_SUFFIX in line}
    resolved = root.resolve()
    return {
        path for path in mapped if path.suffix == LIBRARY_SUFFIX and path.parent.parent == resolved
    }
