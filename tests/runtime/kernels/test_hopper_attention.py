"""The Hopper kernel's results are tested with the others', on such a GPU."""

import os
import subprocess
import sys

import torch

from runtime.kernels.hopper_attention import is_usable


def test_it_compiles_for_a_gpu_that_is_not_there() -> None:
    command = [sys.executable, "-m", "tests.runtime.kernels.compile_for_hopper"]
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    lines = [line.split() for line in output.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        ["bf16", "64"], ["bf16", "128"], ["fp16", "64"], ["fp16", "128"]
    ]  # fmt: skip
    assert all(int(size) > 0 for _, _, size in lines)


def test_a_cache_in_host_memory_is_not_for_it() -> None:
    assert not is_usable(torch.zeros(1, 2, 1, 64, 64, dtype=torch.float16), 2)
