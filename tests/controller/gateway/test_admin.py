from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from controller.clock import SystemClock
from controller.gateway.app import create_app
from controller.gateway.routes.admin import admin_router
from controller.metrics import Metrics
from controller.settings import Settings
from tests.controller.gateway.conftest import FakeKeyStore, client_of
from tests.fakes.function import FakeRegistry


class Asked:
    """A plane, a history and a key store that only keep what they are asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **options: Any) -> dict[str, Any]:
            self.calls.append((name, arguments))
            return {}

        return call

    async def delete(self, name: str) -> dict[str, Any] | None:
        return {"name": name} if name == "stuck" else None

    async def stop_function(self, name: str) -> dict[str, Any] | None:
        return await self.delete(name)

    async def warm(self, name: str) -> None:
        """Be warm."""

    def view(self, name: str) -> dict[str, Any]:
        return {"name": name}


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
async def client(asked: Asked) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(_app(asked)) as client:
        yield client


def _app(asked: Asked) -> FastAPI:
    clock = SystemClock()
    return create_app(
        FakeRegistry(),
        FakeKeyStore(),
        Settings(),
        clock,
        metrics=Metrics(),
        extra_routers=[admin_router(asked, asked, asked, clock)],
    )


@pytest.mark.parametrize("life_s", [1e12, 0, -1])
async def test_a_key_with_an_impossible_life_is_refused(
    client: httpx.AsyncClient, asked: Asked, life_s: float
) -> None:
    response = await client.post("/api/v1/keys", json={"name": "x", "expires_in_s": life_s})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "expires_in_s"
    assert asked.calls == []


@pytest.mark.parametrize("source", ["./model", "../model", "~/model", "model.gguf"])
async def test_a_path_from_the_clients_directory_is_refused(
    client: httpx.AsyncClient, asked: Asked, source: str
) -> None:
    body = {"spec": {"name": "tiny", "model": {"source": source}}}
    response = await client.put("/api/v1/functions/tiny", json=body)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "spec.model.source"
    assert "absolute" in response.json()["error"]["message"]
    assert asked.calls == []


@pytest.mark.parametrize("source", ["/models/tiny", "/models/tiny.gguf", "org/tiny", "org/tiny@v1"])
async def test_a_source_that_means_the_same_everywhere_is_deployed(
    client: httpx.AsyncClient, asked: Asked, source: str
) -> None:
    body = {"spec": {"name": "tiny", "model": {"source": source}}}
    response = await client.put("/api/v1/functions/tiny", json=body)
    assert response.status_code == 200
    assert [name for name, _ in asked.calls] == ["deploy"]


async def test_a_deleted_function_of_which_something_is_left_is_202(
    client: httpx.AsyncClient,
) -> None:
    gone = await client.delete("/api/v1/functions/tiny")
    assert (gone.status_code, gone.content) == (204, b"")
    left = await client.delete("/api/v1/functions/stuck")
    assert (left.status_code, left.json()) == (202, {"name": "stuck"})


async def test_a_stopped_function_of_which_something_is_left_is_202(
    client: httpx.AsyncClient,
) -> None:
    for path in ("tiny/stop", "tiny/warm"):
        done = await client.post(f"/api/v1/functions/{path}")
        assert (done.status_code, done.json()) == (200, {"name": "tiny"})
    left = await client.post("/api/v1/functions/stuck/stop")
    assert (left.status_code, left.json()) == (202, {"name": "stuck"})
