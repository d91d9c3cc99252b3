"""Start a tiny model's runner as an engine does, and keep its profile; prints its compilations."""

import os
import sys
from pathlib import Path

from runtime.profile import EngineProfile
from runtime.rpc import inference_pb2 as pb
from snapshots.profiles import MemoryPlan, Profile, kernel_files, write_profile
from tests.runtime.gpu.test_runner import CONFIG, new_gpu_runner, tiny_llama


def main(cache_dir: str, snapshot: Path) -> None:
    """Start with a kernel cache and a snapshot's directory."""
    os.environ["TRITON_CACHE_DIR"] = cache_dir
    runner = new_gpu_runner(tiny_llama())
    profile = EngineProfile(snapshot, CONFIG, runner)
    profile.apply()
    runner.warm_up()
    profile.started(pb.Memory(), 0)
    learned = profile.record(pb.ProfileRequest(with_kernels=True))
    contents = {file.path: file.content for file in learned.kernels}
    memory = MemoryPlan(weights_bytes=0, kv_cache_bytes=0, num_kv_blocks=0, max_model_len=0)
    made = Profile(
        fingerprint=dict(learned.fingerprint), memory=memory, kernels=kernel_files(contents)
    )
    write_profile(snapshot, made, contents)
    print(int(profile.use.is_used), profile.use.num_compilations)  # noqa: T201  # its answer


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
