"""The engine that products run: torch. The zygote imports this module, which takes seconds."""

from pathlib import Path

from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.model_runner import ModelRunner


class TorchEngineFactory:
    """Builds engines over tensors; implements `runtime.engine_api.EngineFactory`."""

    def open_runner(self, snapshot: Path, config: EngineConfig) -> ModelRunner:
        """Read a snapshot's configuration; weights come later."""
        return ModelRunner.open(snapshot, config)

    def build_engine(self, config: EngineConfig, runner: ModelRunner) -> Engine:
        """Join a runner, its memory in place, with a scheduler."""
        return Engine(config, runner, runner.eos_token_ids)
