import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from runtime.log_tail import LogTail
from runtime.logs import configure_logs


@contextmanager
def full_stderr() -> Iterator[None]:
    """Make every write to stderr fail, as a pipe without a reader or a full disk does."""
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stderr", Unbuffered(full.fileno()))
        yield


class Unbuffered:
    """A text stream over a descriptor that keeps nothing for later."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.buffer = self

    def write(self, data: str | bytes) -> int:
        return os.write(self._descriptor, data.encode() if isinstance(data, str) else data)

    def flush(self) -> None:
        pass


def test_a_line_that_cannot_be_written_is_dropped() -> None:
    before = structlog.get_config()
    with full_stderr():
        configure_logs("info", runtime_id="test-1")
        try:
            structlog.get_logger().info("loaded")
        finally:
            structlog.configure(**before)


async def test_output_is_read_on_when_it_cannot_be_copied() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"first\nsecond\n")
    os.close(write_end)
    with full_stderr():
        tail = await LogTail.follow(read_end)
        await tail.ended()
    assert tail.text == "first\nsecond"


async def test_the_end_of_output_is_not_waited_for_while_a_child_of_the_writer_lives() -> None:
    read_end, write_end = os.pipe()
    held_by_child = os.dup(write_end)
    os.write(write_end, b"last words\n")
    os.close(write_end)
    tail = await LogTail.follow(read_end)
    async with asyncio.timeout(20.0):
        await tail.ended()
    assert tail.text == "last words"
    os.close(held_by_child)
    await tail.ended()
