"""What an engine takes from its snapshot's profile, and what it leaves for the next one.

A profile saves time and nothing else: without one, or with one that is damaged or of another
machine, an engine starts all the same and says why.
"""

import platform
from dataclasses import asdict
from pathlib import Path

import structlog

from runtime.config import EngineConfig
from runtime.engine_api import Runner
from runtime.rpc import inference_pb2 as pb
from runtime.version import VERSION
from snapshots.profiles import (
    ProfileUnusable,
    check_kernels,
    find_profile,
    fingerprint_key,
    read_kernel,
)

FOLLOWING = frozenset({"device_memory_bytes"})
"""Fields of the configuration that follow from others, and from the very GPU, to the byte."""

log = structlog.get_logger()


class EngineProfile:
    """One engine's side of a profile.

    Args:
        snapshot: The snapshot's directory.
        config: Limits of the engine.
        runner: The engine's runner, before it has run anything.
    """

    def __init__(self, snapshot: Path, config: EngineConfig, runner: Runner) -> None:
        self._snapshot = snapshot
        self._runner = runner
        self._memory = pb.Memory()
        self._num_kv_blocks = 0
        self._fingerprint = {
            "coldspark": VERSION,
            "python": f"{platform.python_version()} {platform.machine()}",
            **runner.environment(),
            **{f"engine.{k}": str(v) for k, v in asdict(config).items() if k not in FOLLOWING},
        }
        self.use = pb.ProfileUse(key=fingerprint_key(self._fingerprint))

    def apply(self) -> None:
        """Take what an earlier start has left; call it before the first kernel runs."""
        try:
            profile = find_profile(self._snapshot, self._fingerprint)
            if self._runner.kernels is not None:
                self._runner.kernels.seed(
                    profile.kernels, lambda file: read_kernel(self._snapshot, profile, file)
                )
        except (ProfileUnusable, OSError) as reason:
            self.use.reason = str(reason)
            log.info("profile_not_used", reason=self.use.reason)
            return
        self._runner.prefer_steps(profile.steps)
        self.use.is_used = True
        log.info("profile_used", key=profile.key, num_kernel_files=len(profile.kernels))

    def started(self, memory: pb.Memory, num_kv_blocks: int) -> None:
        """Note how a start ended: its memory, and what it had to compile."""
        self._memory.CopyFrom(memory)
        self._num_kv_blocks = num_kv_blocks
        if self._runner.kernels is not None:
            self.use.num_compilations = self._runner.kernels.num_compilations

    def record(self, request: pb.ProfileRequest) -> pb.ProfileResponse:
        """Return what a later start can use; kernels only if they are asked for."""
        contents = {}
        if request.with_kernels and self._runner.kernels is not None:
            contents = self._runner.kernels.collect()
        try:
            check_kernels({path: len(content) for path, content in contents.items()})
        except ProfileUnusable as reason:
            log.warning("kernels_not_recorded", reason=str(reason))
            contents = {}
        return pb.ProfileResponse(
            fingerprint=self._fingerprint,
            weights_bytes=self._memory.weights_bytes,
            kv_cache_bytes=self._memory.kv_cache_bytes,
            num_kv_blocks=self._num_kv_blocks,
            max_model_len=self._runner.max_model_len,
            steps=[pb.StepSize(**asdict(step)) for step in self._runner.used_steps()],
            kernels=[
                pb.KernelFile(path=path, content=content) for path, content in contents.items()
            ],
        )
