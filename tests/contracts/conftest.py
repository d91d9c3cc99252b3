from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contracts.harnesses import DockerHarness, FakeHarness, Harness, ProcessHarness
from tests.docker_engine import base_image


@pytest.fixture(params=["fake", "process", pytest.param("docker", marks=pytest.mark.docker)])
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Harness]:
    opened: Harness
    match request.param:
        case "fake":
            opened = FakeHarness()
        case "process":
            opened = ProcessHarness(tmp_path / "runtimes")
        case _:
            opened = DockerHarness(tmp_path / "runtimes", image=base_image())
    yield opened
    await opened.close()
