"""The engine that products run: torch. The zygote imports this module, which takes seconds."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runtime.config import EngineConfig
from runtime.cpu.runner import CpuRunner
from runtime.engine.engine import Engine

if TYPE_CHECKING:
    from runtime.gpu.runner import GpuRunner

# Imports Triton, which a machine without a GPU need not have. Imported here, before the fork.
GPU_RUNNER = "runtime.gpu.runner"
if Path("/dev/nvidiactl").exists():
    importlib.import_module(GPU_RUNNER)


class TorchEngineFactory:
    """Builds engines over tensors; implements `runtime.engine_api.EngineFactory`."""

    def open_runner(self, snapshot: Path, config: EngineConfig) -> "CpuRunner | GpuRunner":
        """Read a snapshot's configuration; weights come later.

        It computes on the GPU that this process is bound to, on the CPU if it is bound to none.
        """
        if not torch.cuda.is_available():
            return CpuRunner.open(snapshot, config)
        runner: GpuRunner = importlib.import_module(GPU_RUNNER).GpuRunner.open(snapshot, config)
        return runner

    def build_engine(self, config: EngineConfig, runner: "CpuRunner | GpuRunner") -> Engine:
        """Join a runner, its memory in place, with a scheduler."""
        return Engine(config, runner, runner.eos_token_ids)
