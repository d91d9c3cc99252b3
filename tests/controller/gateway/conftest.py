from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from tokenizers import Tokenizer

from controller.clock import SystemClock
from controller.gateway.app import create_app
from controller.gateway.auth import ApiKey
from controller.metrics import Metrics
from controller.scaling.generation import GenerationRequest, TokenChunk
from controller.settings import Settings
from tests.fakes.function import FakeFunction, FakeRegistry, Step
from tests.fakes.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer, write_snapshot

AppMaker = Callable[..., FastAPI]


class FakeKeyStore:
    """Keys by hash, all asked-for hashes kept."""

    def __init__(self, *keys: ApiKey) -> None:
        self.keys = {key.key_hash: key for key in keys}
        self.asked: list[str] = []

    async def find(self, key_hash: str) -> ApiKey | None:
        self.asked.append(key_hash)
        return self.keys.get(key_hash)

    async def may_call(self, key_id: str) -> bool:
        return any(key.id == key_id and not key.is_revoked for key in self.keys.values())


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    return byte_fallback_tokenizer()


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory: pytest.TempPathFactory, byte_level: Tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("store") / "tiny@0123456789ab"
    return write_snapshot(directory, byte_level, eos_token="<|im_end|>")


@pytest.fixture
def answer_tokens(byte_level: Tokenizer) -> list[int]:
    """An answer with characters split over tokens, without its end."""
    ids: list[int] = byte_level.encode("Zürich is warm, 東京 too 🔥.").ids
    return ids


@pytest.fixture
def function(snapshot: Path, answer_tokens: list[int]) -> FakeFunction:
    """Answers `Zürich is warm, 東京 too 🔥.`, a token a step, and stops."""

    def script(request: GenerationRequest) -> Iterable[Step]:
        limit = request.sampling.max_tokens
        for token_id in answer_tokens[: limit - 1]:
            yield TokenChunk([token_id])
        if limit <= len(answer_tokens):
            yield TokenChunk([answer_tokens[limit - 1]], finish_reason="length")
        else:
            yield TokenChunk([2], finish_reason="stop")

    return FakeFunction(snapshot, script)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def make_app(function: FakeFunction, metrics: Metrics) -> AppMaker:
    """Make the application around `function`, with settings changed as asked."""

    def make(
        *functions: FakeFunction,
        keys: tuple[ApiKey, ...] = (),
        is_ready: bool = True,
        extra_routers: Iterable[APIRouter] = (),
        **changes: Any,
    ) -> FastAPI:
        return create_app(
            FakeRegistry(*(functions or (function,))),
            FakeKeyStore(*keys),
            Settings.model_validate(changes),
            SystemClock(),
            metrics=metrics,
            is_ready=lambda: is_ready,
            extra_routers=extra_routers,
        )

    return make


@pytest.fixture
async def client(make_app: AppMaker) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app()) as client:
        yield client


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://localhost"
    )
