from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contracts.harnesses import FakeHarness, Harness, ProcessHarness


@pytest.fixture(params=["fake", "process"])
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Harness]:
    opened: Harness
    match request.param:
        case "fake":
            opened = FakeHarness()
        case _:
            opened = ProcessHarness(tmp_path / "runtimes")
    yield opened
    await opened.close()
