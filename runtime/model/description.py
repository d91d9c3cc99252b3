"""What a snapshot says of its model beside the tensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.config import EngineConfig
from runtime.errors import LoadFailed, SnapshotDamaged
from runtime.model.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """A model's shape and the tokens that end its answers."""

    config: ModelConfig
    eos_token_ids: frozenset[int]


def read_model(snapshot_dir: Path) -> ModelDescription:
    """Read a snapshot's configuration.

    Raises:
        LoadFailed: The engine cannot run this model.
        SnapshotDamaged: A file is missing or not JSON.
    """
    config = _read_json(snapshot_dir / "config.json")
    generation_path = snapshot_dir / "generation_config.json"
    generation_config = _read_json(generation_path) if generation_path.exists() else {}
    return ModelDescription(
        config=ModelConfig.from_hf(config),
        eos_token_ids=_token_ids(generation_config) or _token_ids(config),
    )


def check_dtype(config: EngineConfig, dtype: torch.dtype) -> None:
    """Raise LoadFailed unless a snapshot of that dtype is what the engine is to run."""
    if config.tensor_parallel_size != 1:
        raise LoadFailed("this version runs a model on one device: set tensor_parallel_size to 1")
    name = str(dtype).removeprefix("torch.")
    if config.dtype not in ("auto", name):
        raise LoadFailed(
            f"the snapshot holds {name}, the engine is to run {config.dtype}: "
            "build a snapshot of that dtype"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SnapshotDamaged(f"{path.name} of the snapshot cannot be read: {error}") from error


def _token_ids(config: dict[str, Any]) -> frozenset[int]:
    """Return `eos_token_id`, which may be one, several or missing."""
    value = config.get("eos_token_id")
    if value is None:
        return frozenset()
    return frozenset(value) if isinstance(value, list) else frozenset((value,))
