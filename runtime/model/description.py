"""What a snapshot says of its model beside the tensors."""

from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.config import EngineConfig
from runtime.errors import LoadFailed
from runtime.model.config import ModelConfig
from runtime.model.files import end_token_ids, read_configs


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """A model's shape and the tokens that end its answers."""

    config: ModelConfig
    eos_token_ids: frozenset[int]


def read_model(snapshot_dir: Path) -> ModelDescription:
    """Read a snapshot's configuration.

    Raises:
        LoadFailed: The engine cannot run this model.
        SnapshotDamaged: A file is missing, not JSON, or not what the manifest says.
    """
    config, generation_config = read_configs(snapshot_dir)
    return ModelDescription(
        config=ModelConfig.from_hf(config),
        eos_token_ids=end_token_ids(config, generation_config),
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
