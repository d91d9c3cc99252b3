import subprocess
import sys

import pytest

HEAVY = {"numpy", "torch", "transformers"}


@pytest.mark.parametrize(
    "module", ["runtime.main", "runtime.server", "runtime.rpc.client", "runtime.zygote"]
)
def test_importing_loads_neither_torch_nor_numpy(module: str) -> None:
    code = f"import sys, {module}; sys.exit(repr({HEAVY!r} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "''", done.stderr


def test_the_entry_point_spawns_the_zygote_before_it_imports_grpc() -> None:
    code = "import sys, runtime.main; sys.exit('grpc' in sys.modules or 'structlog' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
