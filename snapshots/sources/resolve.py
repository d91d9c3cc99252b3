"""From what a user writes to a source. The spelling alone decides, never what lies around."""

import re
from pathlib import Path

from snapshots.errors import SourceInvalid, SourceNotFound
from snapshots.sources.base import ModelSource
from snapshots.sources.directory import DirectorySource
from snapshots.sources.gguf import GgufSource
from snapshots.sources.hub import HubSource
from snapshots.sources.paths import is_pickle, pickle_refused

_HUB_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_HUB_ID = re.compile(
    rf"({_HUB_PART}/{_HUB_PART})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?", re.ASCII
)
_PATH_STARTS = ("/", "./", "../", "~/")


def resolve_source(text: str, revision: str | None = None) -> ModelSource:
    """Return the source that `text` names.

    Args:
        text: Hub id `org/name[@revision]`; or a path, which starts with `/`, `./`, `../` or `~/`,
            ends in `.gguf`, or does not look like a hub id.
        revision: Of a hub id; None for what `text` says, or else the default branch.

    Raises:
        SourceNotFound: A path to nothing.
        SourceInvalid: A revision of a path, or two revisions.
        PickleRefused: A file of pickled weights.
    """
    hub_id = None if _is_path(text) else _HUB_ID.fullmatch(text)
    if hub_id is not None:
        if revision and hub_id[2] and revision != hub_id[2]:
            raise SourceInvalid(f"{text!r} names another revision than {revision!r}")
        return HubSource(hub_id[1], revision or hub_id[2])
    if revision:
        raise SourceInvalid(f"{text!r} is a path, which has no revision {revision!r}")
    return _local(Path(text).expanduser())


def _is_path(text: str) -> bool:
    return text.startswith(_PATH_STARTS) or text.endswith(".gguf")


def _local(path: Path) -> ModelSource:
    if not path.exists():
        raise SourceNotFound(
            f"{str(path)!r} does not exist", hint="give a directory, a .gguf file or org/name"
        )
    if path.is_dir():
        return DirectorySource(path)
    if is_pickle(path.name):
        raise pickle_refused(str(path), [path.name])
    if path.suffix == ".safetensors":
        return DirectorySource(path.parent)
    return GgufSource(path)  # judged by its first bytes, not by its name
