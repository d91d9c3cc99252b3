"""An application with files, batches and asynchronous requests, over functions that play scripts."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fastapi import FastAPI

from controller.clock import SystemClock
from controller.gateway.app import create_app
from controller.gateway.calls import Gateway
from controller.gateway.text import ModelTexts
from controller.jobs import Jobs
from controller.metrics import Metrics
from controller.scaling.embedding import Pooling
from controller.scaling.reaper import Reaper
from controller.settings import Settings
from controller.store.database import Database
from tests.controller.gateway.conftest import FakeKeyStore, client_of
from tests.fakes.function import FakeFunction, FakeRegistry


@pytest.fixture
def key_store() -> FakeKeyStore:
    """No keys, so that none are required; a test may add some before it uses the client."""
    return FakeKeyStore()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database.open(f"sqlite:///{tmp_path / 'coldspark.db'}")
    yield opened
    opened.close()


@pytest.fixture
async def app(
    tmp_path: Path, function: FakeFunction, key_store: FakeKeyStore, database: Database
) -> AsyncIterator[FastAPI]:
    """An application with files, batches and the like, looked at twenty times a second."""
    encoder = FakeFunction(function.snapshot_path, lambda _: [], name="encoder")
    encoder.pooling = Pooling(mode="mean", normalize=True, size=4, shorter=(), max_tokens=None)
    registry, metrics, clock = FakeRegistry(function, encoder), Metrics(), SystemClock()
    changes = {"home": tmp_path, "tick_s": 0.05, "require_api_keys": bool(key_store.keys)}
    settings = Settings.model_validate(changes)
    texts = ModelTexts(clock)
    gateway = Gateway(
        registry=registry,
        settings=settings,
        clock=clock,
        metrics=metrics,
        texts=texts,
        is_ready=lambda: True,
    )
    jobs, reaper = Jobs(settings, database, clock, gateway, key_store), Reaper()
    await jobs.start(reaper)
    reaper.start()
    app = create_app(
        registry,
        key_store,
        settings,
        clock,
        metrics=metrics,
        texts=texts,
        extra_routers=jobs.routers(),
    )
    yield app
    reaper.stop()
    await jobs.stop()


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


@pytest.fixture
def sdk(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key="unused",
        base_url="http://localhost/v1",
        http_client=client,  # type: ignore[arg-type]  # it takes any httpx
        max_retries=0,
    )
