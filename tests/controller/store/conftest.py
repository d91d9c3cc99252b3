from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine

from controller.store import sqlite
from controller.store.database import Database
from controller.store.schema import migrate


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "coldspark.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database.open(url)
    yield opened
    opened.close()


@pytest.fixture
def connection() -> Iterator[Connection]:
    """A migrated database in memory, inside a transaction."""
    engine = create_engine("sqlite://")
    sqlite.prepare(engine)
    with engine.begin() as opened:
        migrate(opened)
        yield opened
    engine.dispose()
