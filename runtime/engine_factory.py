"""The engine that runs on torch, as the engine process takes it.

Importing this imports torch; the zygote does so once, and no tensor is computed before a fork.
"""

from pathlib import Path

from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.model_runner import ModelRunner


class TorchEngineFactory:
    """Builds runner and engine; see `runtime.engine_api.EngineFactory`."""

    def open_runner(self, snapshot: Path, config: EngineConfig) -> ModelRunner:
        """Read a snapshot's configuration; weights come later."""
        return ModelRunner.open(snapshot, config)

    def build_engine(self, config: EngineConfig, runner: ModelRunner) -> Engine:
        """Join a runner, its weights and KV cache in place, with a scheduler."""
        return Engine(config, runner, runner.eos_token_ids)
