from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from controller.errors import NotFound
from controller.gateway.response_api.store import ResponseStore
from controller.store.database import Database
from tests.fakes.clock import FakeClock


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database.open(f"sqlite:///{tmp_path / 'coldspark.db'}")
    yield opened
    opened.close()


async def test_sweep_forgets_what_is_old_and_what_is_too_much(database: Database) -> None:
    clock = FakeClock()
    store = ResponseStore(database=database, clock=clock)
    for response_id in ("old", "older half", "newer half"):
        await store.keep(response_id, key_id=None, body=b"x" * 600, conversation=b"[]" * 200)
        clock.advance(10)
    with capture_logs() as logs:
        await store.sweep(retention_s=25, max_bytes=1500)
    assert [entry["num_responses"] for entry in logs] == [1]
    assert (await store.get("newer half", key_id=None)).body == b"x" * 600
    for response_id in ("old", "older half"):
        with pytest.raises(NotFound, match="there is no response"):
            await store.get(response_id, key_id=None)
    with capture_logs() as logs:
        await store.sweep(retention_s=25, max_bytes=1500)
    assert logs == []
