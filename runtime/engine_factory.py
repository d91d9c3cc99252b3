"""The engine that products run: torch. The zygote imports this module, which takes seconds."""

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runtime.config import EngineConfig
from runtime.cpu.runner import CpuRunner
from runtime.engine.engine import Engine
from runtime.engine.grammars import GrammarCompiler
from runtime.engine_api import Measure
from runtime.errors import LoadFailed
from runtime.model.files import read_tokenizer
from runtime.pooling.engine import PoolingEngine
from runtime.pooling.runner import PoolingRunner

if TYPE_CHECKING:
    from runtime.gpu.context import ContextInMaking
    from runtime.gpu.runner import GpuRunner

EMBED = "embed"
# Imports Triton, which a machine without a GPU need not have.
GPU_RUNNER = "runtime.gpu.runner"
GPU_CONTEXT = "runtime.gpu.context"
HAS_GPU = torch.version.cuda is not None and Path("/dev/nvidiactl").exists()
if HAS_GPU:
    # Before the fork, with what they import in their turn only where there is a driver.
    for module in (GPU_RUNNER, GPU_CONTEXT, "runtime.gpu.pinned_copies"):
        importlib.import_module(module)


class TorchEngineFactory:
    """Builds engines over tensors; implements `runtime.engine_api.EngineFactory`."""

    def prepare(self) -> None:
        """Do what Triton does before its first kernel, where there is a GPU."""
        if GPU_RUNNER in sys.modules:
            importlib.import_module("runtime.kernels.launch").prepare_compiler()

    def open_runner(
        self, snapshot: Path, config: EngineConfig, measure: Measure
    ) -> "CpuRunner | GpuRunner | PoolingRunner":
        """Read a snapshot's configuration and set the GPU up; weights come later.

        It computes on the GPU that this process is bound to, on the CPU if it is bound to none.

        Raises:
            LoadFailed: It is bound to a GPU that cannot be used.
        """
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if not devices:
            with measure("open"):
                if config.task == EMBED:
                    return PoolingRunner.open(snapshot, config)
                return CpuRunner.open(snapshot, config)
        if not HAS_GPU:
            raise LoadFailed(
                f"the function is to run on GPU {devices} and torch {torch.__version__} sees none: "
                "install a build of torch for CUDA and give the runtime the device, or set "
                "resources.gpus to 0"
            )
        context: ContextInMaking = importlib.import_module(GPU_CONTEXT).ContextInMaking()
        if config.task == EMBED:
            with measure("context"):
                context.wait()
            with measure("open"):
                return PoolingRunner.open(snapshot, config, "cuda")
        runner: GpuRunner = sys.modules[GPU_RUNNER].GpuRunner.open(
            snapshot, config, context, measure
        )
        return runner

    def build_engine(
        self,
        snapshot: Path,
        config: EngineConfig,
        runner: "CpuRunner | GpuRunner | PoolingRunner",
    ) -> Engine | PoolingEngine:
        """Join a snapshot's runner, its memory in place, with a scheduler."""
        if isinstance(runner, PoolingRunner):
            return PoolingEngine(config, runner)
        grammars = GrammarCompiler(
            lambda: read_tokenizer(snapshot),
            vocab_size=runner.vocab_size,
            eos_token_ids=runner.eos_token_ids,
        )
        return Engine(config, runner, runner.eos_token_ids, grammars)
