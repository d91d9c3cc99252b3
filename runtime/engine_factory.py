"""The engine that products run: torch. The zygote imports this module, which takes seconds."""

from pathlib import Path

import torch

from runtime.config import EngineConfig
from runtime.cpu.runner import CpuRunner
from runtime.engine.engine import Engine
from runtime.gpu.runner import GpuRunner

TorchRunner = CpuRunner | GpuRunner


class TorchEngineFactory:
    """Builds engines over tensors; implements `runtime.engine_api.EngineFactory`."""

    def open_runner(self, snapshot: Path, config: EngineConfig) -> TorchRunner:
        """Read a snapshot's configuration; weights come later.

        It computes on the GPU that this process is bound to, on the CPU if it is bound to none.
        """
        if torch.cuda.is_available():
            return GpuRunner.open(snapshot, config)
        return CpuRunner.open(snapshot, config)

    def build_engine(self, config: EngineConfig, runner: TorchRunner) -> Engine:
        """Join a runner, its memory in place, with a scheduler."""
        return Engine(config, runner, runner.eos_token_ids)
