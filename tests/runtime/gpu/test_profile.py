"""A start with a profile compiles nothing: no kernel, and no launcher, so it needs no C compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.kernels.device import DEVICE


@pytest.mark.skipif(DEVICE != "cuda", reason="kernels are compiled for a GPU")
@pytest.mark.timeout(180)
def test_a_second_start_elsewhere_compiles_nothing(tmp_path: Path) -> None:
    def start(name: str, **environment: str) -> tuple[bool, int]:
        command = [sys.executable, "-m", "tests.runtime.gpu.start_once"]
        done = subprocess.run(
            [*command, str(tmp_path / name), str(tmp_path / "snapshot")],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        is_used, num_compilations = map(int, done.stdout.splitlines()[-1].split())
        return bool(is_used), num_compilations

    is_used, num_compilations = start("first")
    assert not is_used
    assert num_compilations > 10
    assert start("second", CC="/bin/false") == (True, 0)
