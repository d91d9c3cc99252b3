import asyncio
import errno
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import restarts, supervisor
from runtime.errors import ZygoteDied
from runtime.rpc import inference_pb2 as pb
from runtime.spawn import ZygoteOptions, ZygoteProcess
from runtime.status_board import StatusBoard
from runtime.supervisor import Supervisor
from runtime.zygote_messages import Ready, encode_message

SNAPSHOT = "fake@0123456789ab"


def short_lived(_options: ZygoteOptions) -> ZygoteProcess:
    """Start a zygote that gets ready and dies."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    output, their_output = os.pipe()
    process = subprocess.Popen(["true"], stdout=their_output)
    os.close(their_output)
    with theirs:
        theirs.send(encode_message(Ready(import_s=0.1)))
    return ZygoteProcess(process=process, control=ours, output=output)


def none_left(_options: ZygoteOptions) -> ZygoteProcess:
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.fixture
def options(tmp_path: Path) -> ZygoteOptions:
    (tmp_path / SNAPSHOT).mkdir()
    (tmp_path / SNAPSHOT / "manifest.json").write_text("{}")
    return ZygoteOptions(runtime_id="test-1", store=tmp_path, engine_factory="", log_level="info")


async def failure(board: StatusBoard) -> str:
    """Wait until the runtime has failed; return why."""
    async with asyncio.timeout(10.0):
        async for status in board.follow():
            if status.state == pb.RUNTIME_STATE_FAILED:
                return status.error
    raise AssertionError("the board was closed")


async def test_a_load_that_cannot_start_a_zygote_fails(
    options: ZygoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "spawn_zygote", none_left)
    board = StatusBoard(runtime_id="test-1", build="0")
    with pytest.raises(ZygoteDied, match="Too many open files"):
        await Supervisor(options, board).load(pb.LoadRequest(snapshot=SNAPSHOT))
    assert "Too many open files" in await failure(board)


async def test_a_load_fails_with_what_nobody_expects(
    options: ZygoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_options: ZygoteOptions) -> ZygoteProcess:
        raise ValueError("a defect")

    monkeypatch.setattr(supervisor, "spawn_zygote", broken)
    board = StatusBoard(runtime_id="test-1", build="0")
    with pytest.raises(ValueError, match="a defect"):
        await Supervisor(options, board).load(pb.LoadRequest(snapshot=SNAPSHOT))
    assert "ValueError: a defect" in await failure(board)


@pytest.mark.parametrize(
    ("next_one", "reason"),
    [(short_lived, "zygotes have died 6 times within 60 s"), (none_left, "Too many open files")],
)
async def test_a_zygote_is_not_replaced_for_ever(
    next_one: Callable[[ZygoteOptions], ZygoteProcess],
    reason: str,
    options: ZygoteOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "spawn_zygote", next_one)
    monkeypatch.setattr(restarts, "FIRST_DELAY_S", 0.001)
    board = StatusBoard(runtime_id="test-1", build="0")
    owner = Supervisor(options, board)
    owner.start(short_lived(options))
    assert reason in await failure(board)
    await owner.stop()


async def test_no_zygote_is_started_while_stopping(
    options: ZygoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "spawn_zygote", short_lived)
    monkeypatch.setattr(restarts, "FIRST_DELAY_S", 3600.0)
    owner = Supervisor(options, StatusBoard(runtime_id="test-1", build="0"))
    owner.start(short_lived(options))
    async with asyncio.timeout(10.0):
        while owner._restarts.num_deaths < 2:  # noqa: ASYNC110  # nobody is told of a delay
            await asyncio.sleep(0.01)
        await owner.stop()
