"""A snapshot's configuration files: read, verified, parsed. No torch."""

import json
from pathlib import Path
from typing import Any

from runtime.errors import SnapshotDamaged
from snapshots.errors import SnapshotError
from snapshots.files import has_file, read_file
from snapshots.store import Snapshot, open_snapshot

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"


def read_configs(snapshot_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model's config and its generation config, which is empty if there is none.

    Raises:
        SnapshotDamaged: One is missing, no JSON, or not what the manifest says.
    """
    try:
        snapshot = open_snapshot(snapshot_dir)
        model_config = _read_json(snapshot, CONFIG_FILE)
        has_generation_config = has_file(snapshot, GENERATION_CONFIG_FILE)
        generation_config = (
            _read_json(snapshot, GENERATION_CONFIG_FILE) if has_generation_config else {}
        )
    except SnapshotError as error:
        raise SnapshotDamaged(str(error)) from error
    return model_config, generation_config


def read_tokenizer(snapshot_dir: Path) -> str:
    """Return the text of a snapshot's tokenizer.json.

    Raises:
        SnapshotDamaged: It is missing, or not what the manifest says.
    """
    try:
        return read_file(open_snapshot(snapshot_dir), TOKENIZER_FILE).decode()
    except SnapshotError as error:
        raise SnapshotDamaged(str(error)) from error


def end_token_ids(
    model_config: dict[str, Any], generation_config: dict[str, Any]
) -> frozenset[int]:
    """Return the end-of-sequence tokens: the generation config's, else the model's."""
    return _token_ids(generation_config) or _token_ids(model_config)


def _read_json(snapshot: Snapshot, name: str) -> dict[str, Any]:
    content = read_file(snapshot, name)
    try:
        parsed: dict[str, Any] = json.loads(content)
    except ValueError as error:
        raise SnapshotDamaged(f"{name} of {snapshot.ref} is no JSON: {error}") from error
    return parsed


def _token_ids(config: dict[str, Any]) -> frozenset[int]:
    """Return `eos_token_id`, which may be one, several or missing."""
    value = config.get("eos_token_id")
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset((value,))
