"""The order of a shutdown, without anything behind the gateway."""

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any, cast

import pytest
import structlog

from controller.main import GatewayServer, configure_logging, listen
from controller.settings import Settings
from tests.fakes.world import World
from tests.runtime.test_logs import full_stderr


class Plane:
    """Has requests that end when they are told to."""

    def __init__(self) -> None:
        self.is_finishing = asyncio.Event()
        self.may_finish = asyncio.Event()

    async def finish_requests(self, timeout_s: float) -> None:
        self.is_finishing.set()
        await self.may_finish.wait()


class NoJobs:
    """No work that nobody waits for."""

    def routers(self) -> tuple[()]:
        return ()

    async def stop(self) -> None:
        pass


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    before, handlers = structlog.get_config(), logging.root.handlers[:]
    with full_stderr():
        configure_logging()
        try:
            structlog.get_logger().error("job failed", exc_info=OSError("disk full"))
            logging.getLogger("apscheduler").error("job raised")
        finally:
            structlog.configure(**before)
            logging.root.handlers[:] = handlers


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


async def serve(plane: Plane) -> None:
    with listen("127.0.0.1", 0) as listener:
        nothing, node = cast("Any", None), World().node
        server = GatewayServer(
            Settings(), cast("Any", plane), nothing, node, listener, nothing, cast("Any", NoJobs())
        )
        await server.serve_until_signal()


async def test_a_signal_lets_requests_end() -> None:
    plane = Plane()
    serving = asyncio.create_task(serve(plane))
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    await plane.is_finishing.wait()
    assert not serving.done()
    plane.may_finish.set()
    await serving


async def test_a_second_signal_does_not() -> None:
    plane = Plane()
    serving = asyncio.create_task(serve(plane))
    await asyncio.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    await plane.is_finishing.wait()
    os.kill(os.getpid(), signal.SIGINT)
    async with asyncio.timeout(5):
        await asyncio.wait([serving])
    assert serving.cancelled()
