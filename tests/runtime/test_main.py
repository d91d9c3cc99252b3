import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.main import MAX_SOCKET_PATH_BYTES
from runtime.rpc import inference_pb2 as pb
from tests.runtime.conftest import FAKE_FACTORY, TIMEOUT_S, Launch, Process, command


def run(
    arguments: list[str], env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, **(env or {})},
    )


def test_a_socket_path_that_is_too_long_is_refused_at_the_start(home: Path) -> None:
    done = run(command(home / ("x" * MAX_SOCKET_PATH_BYTES)))
    assert done.returncode == 2
    assert "over the system's limit of 107: choose a shorter directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_limit_of_a_socket_path_is_the_systems(home: Path) -> None:
    length = MAX_SOCKET_PATH_BYTES - len(os.fsencode(home)) - 1
    with socket.socket(socket.AF_UNIX) as longest:
        longest.bind(str(home / ("x" * length)))
    with socket.socket(socket.AF_UNIX) as longer, pytest.raises(OSError, match="too long"):
        longer.bind(str(home / ("y" * (length + 1))))


def test_a_store_that_does_not_exist_is_refused_at_the_start(home: Path) -> None:
    (home / "store").rmdir()
    done = run(command(home))
    assert done.returncode == 2
    assert "is no directory" in done.stderr


def test_a_missing_option_is_named() -> None:
    done = run([sys.executable, "-m", "runtime.main"])
    assert done.returncode == 2
    assert "--runtime-id, --socket, --store" in done.stderr


def test_options_can_come_from_the_environment(home: Path) -> None:
    done = run(
        [sys.executable, "-m", "runtime.main"],
        {
            "COLDSPARK_RUNTIME_ID": "from-env",
            "COLDSPARK_RUNTIME_SOCKET": str(home / "run" / "runtime.sock"),
            "COLDSPARK_RUNTIME_STORE": str(home / "no-store"),
            "COLDSPARK_RUNTIME_ENGINE_FACTORY": FAKE_FACTORY,
        },
    )
    assert "no-store' is no directory" in done.stderr


async def test_the_socket_is_for_its_user_alone(server: Process) -> None:
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700


async def test_a_socket_that_is_served_is_not_taken_over(server: Process) -> None:
    done = run(command(server.home))
    assert done.returncode == 2
    assert "another runtime is serving" in done.stderr
    assert (await server.status()).runtime_id == "test-1"


async def test_a_socket_left_by_a_dead_server_is_replaced(launch: Launch) -> None:
    first = launch()
    await first.client.wait_reachable(TIMEOUT_S)
    first.popen.kill()
    await first.exited()
    assert first.socket.exists()
    second = launch()
    await second.client.wait_reachable(TIMEOUT_S)
    status = await second.until(lambda status: status.state == pb.RUNTIME_STATE_STANDBY)
    assert status.state == pb.RUNTIME_STATE_STANDBY


def test_a_file_in_the_place_of_the_socket_is_left_alone(home: Path) -> None:
    (home / "run").mkdir()
    (home / "run" / "runtime.sock").write_text("precious")
    done = run(command(home))
    assert done.returncode == 2
    assert "is no socket" in done.stderr
    assert (home / "run" / "runtime.sock").read_text() == "precious"


def test_a_server_told_to_stop_while_it_imports_stops(home: Path) -> None:
    code = (
        "import os, signal, sys, runtime.main\n"
        "runtime.main.spawn_zygote = lambda options: os.kill(os.getpid(), signal.SIGTERM)\n"
        "runtime.main.main(sys.argv[1:])"
    )
    done = run([sys.executable, "-c", code, *command(home)[4:]])
    assert (done.returncode, done.stderr) == (0, "")


async def test_a_zygote_looks_for_modules_where_its_server_does(home: Path, launch: Launch) -> None:
    """A directory that happens to be called like one of our packages must not be imported."""
    decoy = home / "runtime"
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise SystemExit('the decoy was imported')")
    server = launch(cwd=home)
    await server.client.wait_reachable(TIMEOUT_S)
    status = await server.until(lambda status: status.state != pb.RUNTIME_STATE_STARTING)
    assert status.state == pb.RUNTIME_STATE_STANDBY, status.error
