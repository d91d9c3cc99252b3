"""A function of the controller's contract that plays a script instead of running a model."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from controller.errors import ApiError, ModelNotFound
from controller.scaling.activation import PhaseTiming
from controller.scaling.embedding import EmbeddingRequest, Pooling
from controller.scaling.generation import (
    FunctionLoad,
    GenerationRecord,
    GenerationRequest,
    ServedFunction,
    TokenChunk,
)
from functions.spec import FunctionSpec

Step = TokenChunk | BaseException | asyncio.Event
Script = Callable[[GenerationRequest], Iterable[Step]]


class FakeFunction:
    """Serves generations that play `script`: chunks are yielded, errors raised, events awaited.

    `refusal`, if set, is raised at admission. `generations` keeps all that were asked for, and
    `entered` is set with the first admission. Nothing is embedded before `may_embed` is set.
    """

    def __init__(
        self,
        snapshot_path: Path,
        script: Script,
        *,
        name: str = "tiny",
        served_names: tuple[str, ...] | None = None,
        max_model_len: int = 256,
        tier: str = "ready",
    ) -> None:
        self.name = name
        self.spec = FunctionSpec.model_validate({"name": name, "model": {"source": "/nowhere"}})
        self.served_names = served_names or (name,)
        self.max_model_len = max_model_len
        self.snapshot_path = snapshot_path
        self.created = 1_700_000_000
        self.tier = tier
        self.script = script
        self.pooling: Pooling | None = None
        self.refusal: ApiError | None = None
        self.eta_s: float | None = None
        self.timeline: Sequence[PhaseTiming] = ()
        self.generations: list[FakeGeneration] = []
        self.embeddings: list[FakeEmbedding] = []
        self.entered = asyncio.Event()
        self.may_embed = asyncio.Event()
        self.may_embed.set()

    def generate(self, request: GenerationRequest) -> "FakeGeneration":
        """Prepare one generation."""
        generation = FakeGeneration(self, request)
        self.generations.append(generation)
        return generation

    def embed(self, request: EmbeddingRequest) -> "FakeEmbedding":
        """Prepare one call to embed."""
        embedding = FakeEmbedding(self, request)
        self.embeddings.append(embedding)
        return embedding

    @property
    def load(self) -> FunctionLoad:
        """What it has to do now."""
        is_ready = self.tier == "ready"
        return FunctionLoad(
            num_ready=int(is_ready),
            in_flight=self.num_running,
            num_queued=0,
            wake_s=0.0 if is_ready else 1.0,
        )

    @property
    def num_running(self) -> int:
        """Generations that were entered and not left."""
        return sum(generation.is_running for generation in self.generations)


class FakeGeneration:
    """One playing of a function's script."""

    def __init__(self, function: FakeFunction, request: GenerationRequest) -> None:
        self.request = request
        self.record = GenerationRecord(
            request_id=request.request_id,
            function=function.name,
            tier=function.tier,
            key_id=request.key_id,
            num_prompt_tokens=len(request.prompt_token_ids),
        )
        self.is_running = False
        self.left_with: BaseException | None = None
        self.left = asyncio.Event()
        self._function = function

    def eta_s(self) -> float | None:
        """Return what the function was told to expect."""
        return self._function.eta_s

    async def __aenter__(self) -> Self:
        if self._function.refusal is not None:
            raise self._function.refusal
        self.is_running = True
        self._function.entered.set()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.is_running = False
        self.left_with = error
        self.left.set()
        if isinstance(error, ApiError):
            self.record.outcome = error.code or error.type

    async def __aiter__(self) -> AsyncIterator[TokenChunk]:
        for step in self._function.script(self.request):
            await asyncio.sleep(0)  # a real step comes over the wire
            if isinstance(step, asyncio.Event):
                await step.wait()
                continue
            if isinstance(step, BaseException):
                raise step
            self._note(step)
            yield step

    def _note(self, chunk: TokenChunk) -> None:
        record = self.record
        record.queue_s = record.queue_s or 0.0125
        record.first_token_s = record.first_token_s or 0.05
        record.num_output_tokens += len(chunk.token_ids)
        record.outcome = chunk.finish_reason or record.outcome
        record.timeline = self._function.timeline


class FakeEmbedding:
    """One call to embed: a text's vector is its length, over the fake's size of numbers."""

    def __init__(self, function: FakeFunction, request: EmbeddingRequest) -> None:
        self.request = request
        self.record = GenerationRecord(
            request_id=request.request_id,
            function=function.name,
            tier=function.tier,
            key_id=request.key_id,
            num_prompt_tokens=sum(map(len, request.texts)),
        )
        self.left = asyncio.Event()
        self._function = function

    async def __aenter__(self) -> Self:
        if self._function.refusal is not None:
            raise self._function.refusal
        self._function.entered.set()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.left.set()

    async def run(self) -> Sequence[bytes]:
        """Return the vectors."""
        assert self._function.pooling is not None
        await self._function.may_embed.wait()
        self.record.queue_s = 0.0125
        size = self.request.dimensions or self._function.pooling.size
        return [struct.pack(f"<{size}f", *[len(text) / 3] * size) for text in self.request.texts]


class FakeRegistry:
    """Functions by served name."""

    def __init__(self, *functions: ServedFunction) -> None:
        self.functions = functions

    def resolve(self, model: str) -> ServedFunction:
        """Return the function that serves a name."""
        for function in self.functions:
            if model in function.served_names:
                return function
        known = sorted(name for function in self.functions for name in function.served_names)
        raise ModelNotFound(f"no function serves {model!r}; near names: {known}", param="model")

    def served(self) -> Sequence[ServedFunction]:
        """Return all functions."""
        return self.functions
