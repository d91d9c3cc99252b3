"""Calls to embed through a function's life, on loop time; and how a function comes to embed."""

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from controller.errors import (
    ActivationTimeout,
    FirstTokenTimeout,
    InternalError,
    InvalidSpec,
    RuntimeDied,
)
from controller.scaling.deployment import deployment_of
from controller.scaling.embedding import EmbeddingRequest, Pooling, pooling_of
from controller.scaling.embedding_call import FunctionEmbedding
from controller.scaling.function import Function
from controller.scaling.journal import UsageEntry
from controller.scaling.lifecycle import Tier
from controller.scaling.placement import ENGINE_OVERHEAD_BYTES, demand_of
from tests.fakes.world import World, spec_of

pytestmark = pytest.mark.looptime
TEXTS = [[1], [1, 2, 3]]


def call(function: Function, request_id: str = "e") -> FunctionEmbedding:
    return function.embed(
        EmbeddingRequest(request_id=request_id, texts=TEXTS, dimensions=None, num_bytes=10)
    )


async def embed(function: Function) -> list[float]:
    async with call(function) as embedding:
        return [struct.unpack("<f", one)[0] for one in await embedding.run()]


async def test_first_call_wakes_and_is_in_the_books() -> None:
    world = World()
    async with world.function() as function:
        assert await embed(function) == [1, 3]
        assert function.set.in_flight == 0
        await world.node.journal.flush()
    (usage,) = [entry.record for entry in world.entries if isinstance(entry, UsageEntry)]
    assert (usage.tier, usage.outcome) == ("stopped", "stop")
    assert (usage.num_prompt_tokens, usage.num_output_tokens) == (4, 0)
    assert usage.queue_s is not None
    assert usage.first_token_s is not None
    assert usage.first_token_s > usage.queue_s >= 1.0


async def test_device_is_active_while_it_embeds() -> None:
    world = World()
    async with world.function() as function:
        await embed(function)
        world.runtime.embed_s = 5.0
        running = asyncio.create_task(embed(function))
        await asyncio.sleep(1)
        (replica,) = function.set.replicas.values()
        assert replica.in_flight == 1
        await running
        assert replica.in_flight == 0
        assert replica.idle_since == function.clock.monotonic()


async def test_replica_that_dies_is_replaced_once() -> None:
    world = World()
    async with world.function() as function:
        await embed(function)
        world.runtime.embed_s = 5.0
        running = asyncio.create_task(embed(function))
        await asyncio.sleep(1)
        world.runtime.crash()
        assert await running == [1, 3]
        assert len(world.runtimes) == 2


async def test_time_spent_embedding_is_no_wait_in_the_queue() -> None:
    world = World()
    async with world.function(spec_of(queue={"timeout": 3})) as function:
        await embed(function)
        world.runtime.embed_s = 10.0
        running = asyncio.create_task(embed(function))
        await asyncio.sleep(1)
        world.runtime.crash()  # which the call hears of after ten seconds
        assert await running == [1, 3]


async def test_second_death_is_told() -> None:
    world = World()
    async with world.function() as function:
        await embed(function)
        for runtime in world.runtimes.values():
            runtime.embed_s = 5.0
        make = world.make_runtime

        def slow() -> Any:
            runtime = make()
            runtime.embed_s = 5.0
            return runtime

        world.make_runtime = slow
        running = asyncio.create_task(embed(function))
        for seconds in (3, 5):  # the first death is noticed after 5
            await asyncio.sleep(seconds)
            list(world.runtimes.values())[-1].crash()
        with pytest.raises(RuntimeDied, match="retry"):
            await running
        assert function.set.in_flight == 0


@pytest.mark.parametrize("tier", [Tier.STOPPED, Tier.READY])
async def test_leaving_gives_the_place_back_and_is_in_the_books(tier: Tier) -> None:
    world = World()
    async with world.function() as function:
        if tier is Tier.READY:
            await embed(function)
            world.runtime.embed_s = 50.0
        running = asyncio.create_task(embed(function))
        await asyncio.sleep(0.05)
        assert (function.set.num_queued, function.set.in_flight) == (
            (0, 1) if tier is Tier.READY else (1, 0)
        )
        running.cancel()
        await asyncio.wait([running])
        assert (function.set.num_queued, function.set.in_flight) == (0, 0)
        await world.node.journal.flush()
    records = [entry.record for entry in world.entries if isinstance(entry, UsageEntry)]
    assert len(records) == (2 if tier is Tier.READY else 1)
    assert records[-1].outcome == "disconnected"
    assert records[-1].tier == tier


async def test_time_limits_and_refusals_are_told_apart() -> None:
    world = World()
    spec = spec_of(timeouts={"first_token": 2}, queue={"timeout": 0.5})
    async with world.function(spec) as function:
        with pytest.raises(ActivationTimeout):
            await embed(function)
        await function.warm()
        world.runtime.embed_s = 3.0
        with pytest.raises(FirstTokenTimeout, match="2 s"):
            await embed(function)
        world.runtime.embed_s = 0.1
        world.runtime.fails.add("embed")
        with pytest.raises(InternalError, match="did not embed"):
            await embed(function)
        assert function.set.in_flight == 0


def snapshot_of(directory: Path, config: dict[str, Any], pooling: object = None) -> Path:
    directory.mkdir(exist_ok=True)
    sizes = {"hidden_size": 64, "max_position_embeddings": 512}
    (directory / "config.json").write_text(json.dumps(sizes | config))
    if pooling is not None:
        (directory / "pooling.json").write_text(json.dumps(pooling))
    return directory


LLAMA, BERT = {"model_type": "llama"}, {"model_type": "bert"}
TOLD = {"mode": "cls", "normalize": False, "max_tokens": 128}


@pytest.mark.parametrize(
    ("config", "told", "spec", "expected"),
    [
        (LLAMA, None, {}, None),
        (LLAMA, None, {"task": "embed"}, ("last", True, None)),
        (LLAMA, TOLD, {}, ("cls", False, 128)),
        (LLAMA, TOLD, {"task": "generate"}, None),
        (BERT, None, {}, ("mean", True, None)),
        (BERT, TOLD, {}, ("cls", False, 128)),
    ],
)
def test_task_and_pooling_follow_from_model_and_spec(
    tmp_path: Path,
    config: dict[str, Any],
    told: object,
    spec: dict[str, Any],
    expected: tuple[str, bool, int | None] | None,
) -> None:
    found = pooling_of(
        spec_of(model={"source": "./model"} | spec), snapshot_of(tmp_path / "s", config, told)
    )
    assert expected == (found and (found.mode, found.normalize, found.max_tokens))


def test_spec_goes_before_the_author(tmp_path: Path) -> None:
    spec = spec_of(pooling={"mode": "mean", "normalize": True, "dimensions": [16, 32]})
    found = pooling_of(spec, snapshot_of(tmp_path / "s", BERT, TOLD))
    assert found == Pooling(
        mode="mean", normalize=True, size=64, shorter=(16, 32), max_tokens=128, bytes_per_token=8192
    )


@pytest.mark.parametrize(
    ("config", "shorter"),
    [
        ({}, ()),
        ({"is_matryoshka": True}, None),
        ({"is_matryoshka": True, "matryoshka_dimensions": [32, 16]}, (16, 32)),
    ],
)
def test_smaller_sizes_are_what_the_checkpoint_says(
    tmp_path: Path, config: dict[str, Any], shorter: tuple[int, ...] | None
) -> None:
    found = pooling_of(spec_of(), snapshot_of(tmp_path / "s", BERT | config))
    assert found is not None
    assert found.shorter == shorter


def test_length_is_the_authors_unless_the_spec_says_more(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "s", BERT, TOLD)
    assert deployment_of(spec_of(), "process", snapshot).max_model_len == 128
    longer = spec_of(model={"source": "./model", "max_model_len": 512})
    assert deployment_of(longer, "process", snapshot).max_model_len == 512
    too_long = spec_of(model={"source": "./model", "max_model_len": 513})
    with pytest.raises(InvalidSpec, match="513"):
        deployment_of(too_long, "process", snapshot)


@pytest.mark.parametrize(
    ("config", "spec", "words"),
    [
        (BERT, {"model": {"source": "./m", "task": "generate"}}, "only embeds"),
        (BERT, {"pooling": {"dimensions": [65]}}, "65"),
        (BERT | {"hidden_size": None}, {}, "hidden_size"),
    ],
)
def test_what_the_model_cannot_do_is_refused(
    tmp_path: Path, config: dict[str, Any], spec: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidSpec, match=words):
        pooling_of(spec_of(**spec), snapshot_of(tmp_path / "s", config))


def test_how_it_pools_is_part_of_what_a_runtime_cannot_change(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "s", BERT)
    hashes = {
        deployment_of(spec_of(pooling={"mode": mode}), "process", snapshot).runtime_hash
        for mode in ("auto", "mean", "cls")
    }
    assert len(hashes) == 2


def test_gpu_is_asked_for_weights_and_one_step_only(tmp_path: Path) -> None:
    snapshot = snapshot_of(tmp_path / "s", BERT | {"intermediate_size": 256})
    spec = spec_of(resources={"gpus": 0, "memory": "1Gi"})
    assert deployment_of(spec, "process", snapshot).demand.memory_bytes == 1 << 30
    found = pooling_of(spec, snapshot)
    assert found is not None
    assert found.bytes_per_token == 4 * 2 * 256 * 4
    on_gpu = spec_of(resources={"gpus": 1})
    demand = demand_of(on_gpu, lambda: 1000, working_bytes=2000)
    assert demand.memory_bytes == 3000 + ENGINE_OVERHEAD_BYTES
    assert demand_of(on_gpu, lambda: 1000).memory_bytes is None
