"""A model on the hub, by way of huggingface_hub's cache. The token is HF_TOKEN's or the login's.

Its own errors are translated here, once.
"""

import errno
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapshots.architectures.registry import architecture_of
from snapshots.errors import (
    DiskFull,
    SnapshotError,
    SourceGated,
    SourceInvalid,
    SourceNotFound,
    SourceUnreachable,
)
from snapshots.manifest import SourceKind
from snapshots.progress import OnProgress, Phase, Progress
from snapshots.sources.base import Identity
from snapshots.sources.directory import DirectorySource
from snapshots.sources.paths import (
    CONFIG_FILES,
    INDEX_FILE,
    POOLING_FILES,
    TOKENIZER_FILES,
    is_pickle,
    pickle_refused,
    read_json,
)

if TYPE_CHECKING:
    from snapshots.sources.base import Checkpoint

CONFIG_FILE = "config.json"

_WEIGHTS = "*.safetensors"
_SMALL_FILES = (*CONFIG_FILES, *TOKENIZER_FILES, INDEX_FILE, *POOLING_FILES)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """What a commit holds: its id, and the files to fetch with their sizes."""

    commit: str
    files: dict[str, int]


class HubSource:
    """Reads `org/name` at a revision; None is the default branch."""

    def __init__(self, repository: str, revision: str | None) -> None:
        self._repository = repository
        self._revision = revision
        self._listing: _Listing | None = None
        self.default_name = repository.partition("/")[2]

    def identify(self) -> Identity:
        """Ask the hub which commit is meant; without a network, the cache."""
        try:
            commit = self._list().commit
        except SourceUnreachable:
            cached = self._cached()
            if cached is None:
                raise
            commit = cached.name
        return Identity(
            kind=SourceKind.HUB,
            location=self._repository,
            requested_revision=self._revision or "",
            revision=commit,
            fingerprint=hashlib.sha256(f"{self._repository}\0{commit}".encode()).hexdigest(),
        )

    @contextmanager
    def open(self, on_progress: OnProgress) -> Iterator["Checkpoint"]:
        """Download what the cache lacks and open it."""
        with DirectorySource(self._fetch(on_progress)).open(on_progress) as checkpoint:
            yield checkpoint

    def _list(self) -> _Listing:
        if self._listing is None:
            from huggingface_hub import HfApi  # build only

            with _translated(self._repository, self._revision):
                info = HfApi().model_info(
                    self._repository, revision=self._revision, files_metadata=True
                )
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            self._listing = _Listing(commit=str(info.sha), files=_wanted(self._repository, sizes))
        return self._listing

    def _fetch(self, on_progress: OnProgress) -> Path:
        if self._listing is None:  # the hub is away, the cache has to do
            cached = self._cached()
            assert cached is not None, "identify has found it"
            return cached
        listing = self._listing
        meter = _DownloadMeter(sum(listing.files.values()), on_progress)
        # By its branch, so that the cache can tell what the branch is without a network.
        directory = self._download(CONFIG_FILE, self._revision, meter)
        architecture_of(read_json(directory / CONFIG_FILE))  # before the weights are fetched
        directories = []
        for name, size in listing.files.items():
            directories.append(self._download(name, listing.commit, meter))
            meter.finish_file(size)
        return directories[0]

    def _download(self, name: str, revision: str | None, meter: "_DownloadMeter") -> Path:
        from huggingface_hub import hf_hub_download  # build only

        with _translated(self._repository, self._revision):
            path = hf_hub_download(
                self._repository, name, revision=revision, tqdm_class=meter.bar_class()
            )
        return Path(path).parent

    def _cached(self) -> Path | None:
        """Return the cache's directory of the revision, if it has begun one."""
        from huggingface_hub import try_to_load_from_cache  # build only

        path = try_to_load_from_cache(self._repository, CONFIG_FILE, revision=self._revision)
        return Path(path).parent if isinstance(path, str) else None


class _DownloadMeter:
    """Adds up the files of a download for one progress report."""

    def __init__(self, total_bytes: int, on_progress: OnProgress) -> None:
        self._total_bytes = total_bytes
        self._on_progress = on_progress
        self._finished_bytes = 0
        self._file_bytes = 0

    def finish_file(self, num_bytes: int) -> None:
        """Count a file as done, whether it was downloaded or in the cache."""
        self._finished_bytes += num_bytes
        self._file_bytes = 0
        self._report()

    def bar_class(self) -> Any:
        """Return a progress bar for the library that draws nothing and reports here."""
        from tqdm import tqdm  # type: ignore[import-untyped]  # comes with huggingface_hub

        meter = self

        class SilentBar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                kwargs.pop("name", None)
                super().__init__(*args, **kwargs | {"disable": True})

            def update(self, n: float | None = 1) -> bool | None:
                meter._file_bytes += int(n or 0)
                meter._report()
                return None

        return SilentBar

    def _report(self) -> None:
        done = min(self._finished_bytes + self._file_bytes, self._total_bytes)
        self._on_progress(
            Progress(phase=Phase.DOWNLOAD, done_bytes=done, total_bytes=self._total_bytes)
        )


def _wanted(repository: str, sizes: dict[str, int]) -> dict[str, int]:
    """Return the files of a checkpoint among all of a repository.

    Raises:
        PickleRefused: Its weights are pickles.
        SourceInvalid: It has no weights.
    """
    weights = sorted(name for name in sizes if fnmatchcase(name, _WEIGHTS) and "/" not in name)
    if INDEX_FILE in sizes:  # others may be the same weights in another layout
        weights = [name for name in weights if re.fullmatch(r"model-\d+-of-\d+.*", name)] or weights
    elif "model.safetensors" in weights:
        weights = ["model.safetensors"]
    pickles = [name for name in sizes if is_pickle(name)]
    if not weights and pickles:
        raise pickle_refused(repository, pickles)
    if weights and CONFIG_FILE not in sizes:
        raise SourceInvalid(f"{repository} has no {CONFIG_FILE}")
    if not weights:
        gguf = any(name.endswith(".gguf") for name in sizes)
        raise SourceInvalid(
            f"{repository} has no safetensors weights",
            hint="download one of its .gguf files and build from that" if gguf else "",
        )
    small = [name for name in _SMALL_FILES if name in sizes]
    return {name: sizes[name] for name in (*small, *weights)}


@contextmanager
def _translated(repository: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface_hub's errors into ours."""
    try:
        yield
    except (OSError, ValueError, _http_error()) as error:
        raise _translation(error, repository, revision) from error


def _http_error() -> type[Exception]:
    """Return the root of the errors of whichever HTTP library the hub's is made with."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _translation(error: Exception, repository: str, revision: str | None) -> SnapshotError:
    from huggingface_hub import constants, errors

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"no room to download {repository} to {constants.HF_HUB_CACHE}: {error.strerror}",
            hint="free some space there, or set HF_HOME to a directory on a larger disk",
        )
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, errors.GatedRepoError):
        return SourceGated(
            f"{repository} is gated, and this token may not read it",
            hint=f"accept its terms at {page} and set HF_TOKEN to a token of that account",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceNotFound(f"{repository} has no revision {revision!r}")
    if isinstance(error, errors.DisabledRepoError):
        return SourceNotFound(f"{repository} has been disabled by its host")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceNotFound(
            f"there is no model {repository!r}, or it is private",
            hint="check the spelling; for a private model set HF_TOKEN; a local directory starts "
            "with ./ or /",
        )
    if isinstance(error, errors.HFValidationError):
        return SourceNotFound(f"{repository!r} is no hub id: {error}")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return SourceGated(
            f"the hub refuses to show {repository}", hint="set HF_TOKEN to a valid token"
        )
    return SourceUnreachable(
        f"the hub did not answer for {repository}: {error}",
        hint="try again; without a network, build from a local directory",
    )
