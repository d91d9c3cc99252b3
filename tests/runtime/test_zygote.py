import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.spawn import ZygoteOptions, ZygoteProcess, spawn_zygote
from runtime.zygote_messages import (
    MAX_MESSAGE_BYTES,
    Prepared,
    Preparing,
    Ready,
    decode_message,
)


class PreparingFactory:
    """What the zygote is told to build engines with."""

    def prepare(self) -> None:
        sys.stdout.write("preparing\n")
        sys.stdout.flush()


class FailingFactory:
    """Cannot prepare anything."""

    def prepare(self) -> None:
        raise RuntimeError("no compiler")


@pytest.fixture
def zygote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ZygoteProcess]:
    factory = f"{__name__}:{request.param}"
    spawned = spawn_zygote(
        ZygoteOptions(runtime_id="test-1", store=tmp_path, engine_factory=factory, log_level="info")
    )
    yield spawned
    spawned.process.kill()
    spawned.process.wait()
    spawned.control.close()
    os.close(spawned.output)


def read_until(text: str, descriptor: int) -> str:
    found = b""
    while text.encode() not in found:
        more = os.read(descriptor, 4096)
        assert more, f"it ended after {found!r}"
        found += more
    return found.decode()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("zygote", ["PreparingFactory"], indirect=True)
def test_a_zygote_that_nobody_wants_yet_prepares_its_engines(zygote: ZygoteProcess) -> None:
    output = read_until('"prepared"', zygote.output)
    assert output.index("zygote_ready") < output.index("preparing")
    zygote.control.setblocking(True)
    messages = [type(decode_message(zygote.control.recv(MAX_MESSAGE_BYTES))) for _ in range(3)]
    assert messages == [Ready, Preparing, Prepared]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("zygote", ["FailingFactory"], indirect=True)
def test_a_zygote_that_cannot_prepare_lives_on(zygote: ZygoteProcess) -> None:
    assert "no compiler" in read_until('"not_prepared"', zygote.output)
    assert zygote.process.poll() is None
    zygote.control.setblocking(True)
    messages = [type(decode_message(zygote.control.recv(MAX_MESSAGE_BYTES))) for _ in range(3)]
    assert messages == [Ready, Preparing, Prepared]
