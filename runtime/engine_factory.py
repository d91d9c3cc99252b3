"""The engine that products run: torch. The zygote imports this module, which takes seconds."""

from pathlib import Path

from runtime.config import EngineConfig
from runtime.cpu.runner import CpuRunner
from runtime.engine.engine import Engine


class TorchEngineFactory:
    """Builds engines over tensors; implements `runtime.engine_api.EngineFactory`."""

    def open_runner(self, snapshot: Path, config: EngineConfig) -> CpuRunner:
        """Read a snapshot's configuration; weights come later."""
        return CpuRunner.open(snapshot, config)

    def build_engine(self, config: EngineConfig, runner: CpuRunner) -> Engine:
        """Join a runner, its memory in place, with a scheduler."""
        return Engine(config, runner, runner.eos_token_ids)
