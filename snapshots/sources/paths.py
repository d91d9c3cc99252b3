"""Which files of a source may be read, and which never: no pickles, nothing outside it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from snapshots.errors import PickleRefused, SourceInvalid, SourceNotFound

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
POOLING_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
INDEX_FILE = "model.safetensors.index.json"
MAX_JSON_BYTES = 256 << 20


def is_pickle(name: str) -> bool:
    """Return whether a file of this name holds weights that run code when opened."""
    return Path(name).suffix.lower() in PICKLE_SUFFIXES


def pickle_refused(location: str, names: Iterable[str]) -> PickleRefused:
    """Return the refusal of a source with no other weights than pickles."""
    return PickleRefused(
        f"{location} has its weights only as pickles ({', '.join(sorted(names)[:3])}), which run "
        "code when they are opened",
        hint="on a machine where that is safe, convert it once with transformers: "
        "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET); "
        "AutoTokenizer.from_pretrained(SOURCE).save_pretrained(TARGET); then build from TARGET",
    )


def contained(path: Path, boundary: Path) -> Path:
    """Return the real path of a file if it lies inside `boundary`.

    Raises:
        SourceNotFound: There is no such file.
        SourceInvalid: A symlink leads elsewhere, or it is not a file.
    """
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise SourceNotFound(f"{path} cannot be read: {error}") from error
    if not real.is_relative_to(boundary):
        raise SourceInvalid(
            f"{path} is a link to {real}, outside of the source", hint="copy the file there"
        )
    if not real.is_file():
        raise SourceInvalid(f"{path} is not a file")
    return real


def boundary_of(directory: Path) -> Path:
    """Return how far links in a source may lead: its directory, or its repository's hub cache."""
    real = directory.resolve()
    repository = real.parent.parent
    is_hub_cache = real.parent.name == "snapshots" and (repository / "blobs").is_dir()
    return repository if is_hub_cache else real


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        SourceInvalid: It is too large, not JSON, or not an object.
    """
    content = _parsed(path)
    if not isinstance(content, dict):
        raise SourceInvalid(f"{path} is not a JSON object")
    return content


def read_json_list(path: Path) -> list[Any]:
    """Read a JSON array of bounded size.

    Raises:
        SourceInvalid: It is too large, not JSON, or not an array.
    """
    content = _parsed(path)
    if not isinstance(content, list):
        raise SourceInvalid(f"{path} is not a JSON array")
    return content


def _parsed(path: Path) -> Any:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise SourceInvalid(f"{path} is over {MAX_JSON_BYTES} bytes, too large for what it is")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceInvalid(f"{path} is not JSON: {error}") from error


def fingerprint(files: Iterable[Path], root: Path) -> str:
    """Return a digest that changes when a file does, by name, size and time of change."""
    lines = []
    for path in sorted(files):
        status = path.stat()
        lines.append(f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
