from pathlib import Path

import pytest
import torch

from runtime.config import EngineConfig
from runtime.cpu.runner import CpuRunner
from runtime.engine_factory import TorchEngineFactory
from runtime.errors import LoadFailed
from runtime.phases import PhaseLog


def test_a_gpu_function_never_runs_on_the_processor_unasked(
    smollm2_snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    with pytest.raises(LoadFailed, match=r"GPU-1 .*sees none.*resources\.gpus to 0"):
        TorchEngineFactory().open_runner(smollm2_snapshot, EngineConfig(), PhaseLog().measure)


def test_a_function_without_gpus_runs_on_the_processor_of_a_machine_that_has_some(
    smollm2_snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = EngineConfig(kv_cache_bytes=16 << 20, max_model_len=256)
    phase_log = PhaseLog()
    runner = TorchEngineFactory().open_runner(smollm2_snapshot, config, phase_log.measure)
    assert isinstance(runner, CpuRunner)
    assert [phase.name for phase in phase_log.phases] == ["open"]
