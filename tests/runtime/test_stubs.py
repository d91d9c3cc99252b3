import subprocess
import sys
from pathlib import Path

import pytest

from runtime.rpc import inference_pb2 as pb
from runtime.server import RuntimeServicer, service_handler
from runtime.spawn import ZygoteOptions
from runtime.status_board import StatusBoard
from runtime.supervisor import Supervisor

ROOT = Path(__file__).parents[2]
STUBS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", "runtime/rpc/inference.proto"]
        + [f"--{kind}_out={out}" for kind in kinds],
        cwd=ROOT,
        check=True,
        env={"PATH": str(Path(sys.executable).parent)},  # where protoc finds its mypy plugins
        capture_output=True,
    )
    return out


@pytest.mark.parametrize("suffix", STUBS)
def test_the_committed_stub_matches_the_proto(generated: Path, suffix: str) -> None:
    name = f"runtime/rpc/inference{suffix}"
    assert (ROOT / name).read_text() == (generated / name).read_text(), "generate the stubs again"


def test_every_rpc_has_a_handler() -> None:
    board = StatusBoard(runtime_id="test", build="0")
    options = ZygoteOptions(
        runtime_id="test", store=ROOT, engine_factory="nothing:Nothing", log_level="info"
    )
    handler = service_handler(RuntimeServicer(Supervisor(options, board), board))
    service = pb.DESCRIPTOR.services_by_name["RuntimeService"]
    for method in service.methods:
        found = handler._method_handlers[f"/{service.full_name}/{method.name}"]  # type: ignore[attr-defined]
        assert found is not None
