"""What runs of a snapshot have learned for later starts: `profiles/<key>/` beside its manifest.

A profile holds for one machine and one configuration, its fingerprint. It only saves time: the
digest of the snapshot does not cover it, and one that is damaged, or another machine's, is left
alone for a reason that can be told. Standard library only.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from snapshots.durable import remove_tree

PROFILES_DIR = "profiles"
PROFILE_FILE = "profile.json"
KERNELS_DIR = "kernels"
FORMAT_VERSION = 1
MAX_PROFILE_BYTES = 4 << 20
MAX_KERNEL_FILES = 4096
MAX_KERNELS_BYTES = 48 << 20
MAX_PROFILES = 8  # of one snapshot; the oldest go

# An entry of Triton's cache and one of its files. `__grp__…` names other files by their paths, so
# it is written anew where it is used, and never taken from anybody.
_KERNEL_PATH = re.compile(
    r"[A-Z2-7]{52}/(?!__grp__)[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.(json|cubin|so)", re.ASCII
)
_KEY = re.compile(r"[0-9a-f]{16}", re.ASCII)

Fingerprint = Mapping[str, str]
"""What a profile depends on: names of a machine's and a configuration's properties, and values."""


class ProfileUnusable(Exception):
    """There is no profile for this machine and configuration; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How an engine divided its memory."""

    weights_bytes: int
    kv_cache_bytes: int
    num_kv_blocks: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """A shape of steps, and how often it was run.

    Attributes:
        num_tokens: Padding included.
        num_tiles: Of chunks of prompts; 0 if every sequence decodes.
        count: Steps of this shape.
    """

    num_tokens: int
    num_tiles: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFile:
    """A file of a compiler's cache; `path` is entry/name."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStartTimes:
    """Medians of the latest cold starts from one tier.

    Attributes:
        count: How many they are of.
        total_s: From the beginning to the first token, or to readiness if nobody waited.
        phases: Seconds of each phase.
    """

    count: int
    total_s: float
    phases: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What is known of a snapshot on one kind of machine in one configuration."""

    fingerprint: Fingerprint
    memory: MemoryPlan
    steps: tuple[StepSize, ...] = ()
    kernels: tuple[KernelFile, ...] = ()
    cold_starts: Mapping[str, ColdStartTimes] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name of its directory."""
        return fingerprint_key(self.fingerprint)

    def to_json(self) -> str:
        """Return the text of a profile.json."""
        content = asdict(self) | {"format_version": FORMAT_VERSION}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of a profile.json.

        Raises:
            ProfileUnusable: It is damaged, of another version, or larger than profiles are.
        """
        try:
            content = json.loads(text)
            if content["format_version"] != FORMAT_VERSION:
                raise ProfileUnusable(f"the profile has version {content['format_version']!r}")
            profile = cls(
                fingerprint={_str(k): _str(v) for k, v in content["fingerprint"].items()},
                memory=MemoryPlan(**{k: _count(v) for k, v in content["memory"].items()}),
                steps=tuple(
                    StepSize(**{k: _count(v) for k, v in step.items()}) for step in content["steps"]
                ),
                kernels=tuple(
                    KernelFile(
                        path=_str(file["path"]),
                        size_bytes=_count(file["size_bytes"]),
                        sha256=_str(file["sha256"]),
                    )
                    for file in content["kernels"]
                ),
                cold_starts={
                    _str(tier): ColdStartTimes(
                        count=_count(times["count"]),
                        total_s=_seconds(times["total_s"]),
                        phases={_str(k): _seconds(v) for k, v in times["phases"].items()},
                    )
                    for tier, times in content["cold_starts"].items()
                },
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ProfileUnusable(f"the profile is damaged: {error!r}") from error
        check_kernels({file.path: file.size_bytes for file in profile.kernels})
        return profile


def fingerprint_key(fingerprint: Fingerprint) -> str:
    """Return the short name of a fingerprint, fit for a directory."""
    canonical = json.dumps(dict(fingerprint), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def check_kernels(sizes: Mapping[str, int]) -> None:
    """Make sure that files are a compiler's, by path and size in bytes, and not too much.

    Raises:
        ProfileUnusable: A path leads elsewhere, or there is more than a profile may hold.
    """
    for path in sizes:
        if not _KERNEL_PATH.fullmatch(path):
            raise ProfileUnusable(f"{path[:300]!r} is no file of a kernel")
    if len(sizes) > MAX_KERNEL_FILES or sum(sizes.values()) > MAX_KERNELS_BYTES:
        raise ProfileUnusable(
            f"the kernels are {len(sizes)} files of {sum(sizes.values())} bytes; a profile holds "
            f"at most {MAX_KERNEL_FILES} of {MAX_KERNELS_BYTES}"
        )


def find_profile(snapshot: Path, fingerprint: Fingerprint) -> Profile:
    """Return the profile in a snapshot's directory that was made for this fingerprint.

    Raises:
        ProfileUnusable: There is none, and in what the nearest one differs; or it is damaged.
    """
    path = snapshot / PROFILES_DIR / fingerprint_key(fingerprint)
    if path.is_dir():
        profile = _read(path)
        if dict(profile.fingerprint) != dict(fingerprint):
            raise ProfileUnusable("the profile is damaged: it is another's")
        return profile
    others = read_profiles(snapshot)
    if not others:
        raise ProfileUnusable("no profile has been recorded yet")
    raise ProfileUnusable(
        min((_difference(one.fingerprint, fingerprint) for one in others), key=len)
    )


def read_profiles(snapshot: Path) -> Sequence[Profile]:
    """Return all profiles of a snapshot that can be read, the newest first."""
    return [one for one in scan_profiles(snapshot).values() if isinstance(one, Profile)]


def scan_profiles(snapshot: Path) -> Mapping[str, Profile | ProfileUnusable]:
    """Return every profile of a snapshot, or why it cannot be used, by key, the newest first."""
    found: dict[str, Profile | ProfileUnusable] = {}
    for path in _directories(snapshot / PROFILES_DIR):
        try:
            found[path.name] = _read(path)
        except ProfileUnusable as reason:
            found[path.name] = reason
    return found


def read_kernel(snapshot: Path, profile: Profile, file: KernelFile) -> bytes:
    """Return the content of a kernel's file.

    Raises:
        ProfileUnusable: It is missing, or not what was recorded.
    """
    path = snapshot / PROFILES_DIR / profile.key / KERNELS_DIR / file.path
    content = _bytes_of(path, file.size_bytes)
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise ProfileUnusable(f"{file.path} is not what was recorded")
    return content


def write_profile(
    snapshot: Path, profile: Profile, contents: Mapping[str, bytes] | None = None
) -> None:
    """Write a profile, so that whoever reads it meanwhile sees the old one or the new one.

    Args:
        snapshot: The snapshot's directory.
        profile: It replaces the one of the same fingerprint.
        contents: Of its kernels' files, by path; None leaves those that are there.

    Raises:
        OSError: The disk is full, or it may not be written to.
    """
    directory = snapshot / PROFILES_DIR / profile.key
    directory.mkdir(parents=True, exist_ok=True)
    for path, content in (contents or {}).items():
        _replace(directory / KERNELS_DIR / path, content)
    _replace(directory / PROFILE_FILE, profile.to_json().encode())
    if contents is not None:
        _remove_others(directory / KERNELS_DIR, {file.path for file in profile.kernels})
    for old in _directories(directory.parent)[MAX_PROFILES:]:
        with suppress(FileNotFoundError):  # another writer removes it too
            remove_tree(old)


def kernel_files(contents: Mapping[str, bytes]) -> tuple[KernelFile, ...]:
    """Return how files are named in a profile.

    Raises:
        ProfileUnusable: See `check_kernels`.
    """
    check_kernels({path: len(content) for path, content in contents.items()})
    return tuple(
        KernelFile(path=path, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for path, content in sorted(contents.items())
    )


def _read(directory: Path) -> Profile:
    content = _bytes_of(directory / PROFILE_FILE, MAX_PROFILE_BYTES)
    try:
        profile = Profile.from_json(content.decode())
    except UnicodeDecodeError as error:
        raise ProfileUnusable("the profile is damaged: it is no text") from error
    if profile.key != directory.name:
        raise ProfileUnusable("the profile is damaged: it is another's")
    return profile


def _bytes_of(path: Path, max_bytes: int) -> bytes:
    """Return the content of a plain file; one that is longer than this is cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        raise ProfileUnusable(f"the profile is damaged: {path.name}: {error.strerror}") from error


def _difference(recorded: Fingerprint, here: Fingerprint) -> str:
    names = sorted(
        name for name in {*recorded, *here} if recorded.get(name, "") != here.get(name, "")
    )
    parts = (f"{name} {recorded.get(name, '')!r}, here {here.get(name, '')!r}" for name in names)
    return f"the profile is of {'; '.join(parts)}"


def _directories(parent: Path) -> list[Path]:
    """Return the directories of profiles, the one written last first."""
    try:
        found = [path for path in parent.iterdir() if _KEY.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: (-_written_ns(path), path.name))
    except OSError:
        return []


def _written_ns(directory: Path) -> int:
    try:
        return (directory / PROFILE_FILE).stat().st_mtime_ns
    except OSError:
        return 0


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{secrets.token_hex(8)}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_others(kernels: Path, wanted: set[str]) -> None:
    for path in kernels.glob("*/*"):
        if str(path.relative_to(kernels)) not in wanted:
            path.unlink(missing_ok=True)
    for entry in kernels.glob("*"):
        with suppress(OSError):  # it is not empty
            entry.rmdir()


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value


def _seconds(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e9:
        raise TypeError(f"{value!r} are no seconds")
    return float(value)
