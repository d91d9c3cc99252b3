"""Many starts at once, on loop time: a few are under way, the others come in turn."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from controller.backends.base import BackendError
from controller.scaling.function import Function
from controller.scaling.lifecycle import ReplicaState, Tier
from controller.scaling.starts import LONGEST_S, usual_limit
from tests.fakes.runtime import FakeRuntime
from tests.fakes.world import World, collect, request, spec_of

pytestmark = pytest.mark.looptime

LOAD_S = 2.0


def now() -> float:
    return asyncio.get_running_loop().time()


def world_of(max_starts: int, **options: object) -> World:
    return World(
        max_starts=max_starts,
        make_runtime=lambda: FakeRuntime(load_s=LOAD_S, step_s=0.0),
        **options,  # type: ignore[arg-type]  # options of World
    )


@asynccontextmanager
async def functions(world: World, *names: str, **sections: object) -> AsyncIterator[list[Function]]:
    async with AsyncExitStack() as stack:
        spec = spec_of(**sections)
        yield [
            await stack.enter_async_context(world.function(spec.model_copy(update={"name": name})))
            for name in names
        ]


def starting(world: World) -> list[str]:
    """Return the functions with a replica that is being started."""
    return [
        function.name
        for function in world.functions
        for replica in function.set.replicas.values()
        if replica.state in (ReplicaState.STARTING, ReplicaState.LOADING)
    ]


async def test_a_burst_starts_a_few_at_a_time_first_come_first_served() -> None:
    world = world_of(4)
    order: list[str] = []

    async def call(function: Function) -> None:
        assert await collect(function) == [3, 4, 5, 6]
        order.append(function.name)

    async with functions(world, *(f"f{number:02}" for number in range(30))) as all_of_them:
        calls = [asyncio.create_task(call(function)) for function in all_of_them]
        most = 0
        while not all(one.done() for one in calls):
            await asyncio.sleep(0.1)
            most = max(most, len(starting(world)))
        assert most == 4
        rounds = [sorted(order[at : at + 4]) for at in range(0, 30, 4)]
        assert [name for one in rounds for name in one] == sorted(order)
        assert now() < 8 * LOAD_S + 1.0, "no place stays empty"
        await asyncio.gather(*calls)


async def test_who_waits_sees_it_as_queue_and_in_no_estimate() -> None:
    world = world_of(1)
    async with functions(world, "a", "b") as (a, b):
        first = asyncio.create_task(collect(a))
        await asyncio.sleep(0.1)
        async with b.generate(request()) as generation:
            tokens = asyncio.create_task(anext(generation))
            await asyncio.sleep(1.0)
            assert generation.eta_s() is None, "nobody knows how long others take"
            assert world.node.starts.counts() == {"under_way": 1, "waiting": 1, "limit": 1}
            await first
            await asyncio.sleep(0.5)
            assert generation.eta_s() == pytest.approx(b.books.reload_s("stopped") - 0.5, abs=0.1)
            await tokens
            timeline = {phase.name: phase.seconds for phase in generation.record.timeline}
            assert timeline["queue"] == pytest.approx(LOAD_S - 0.1, abs=0.1)
            assert sum(timeline.values()) == pytest.approx(generation.record.first_token_s)
        assert b.books.reload_s("stopped") == pytest.approx(LOAD_S, abs=0.1)


async def test_clients_go_before_what_is_only_kept_ready() -> None:
    world = world_of(1)
    async with AsyncExitStack() as stack:
        kept = await stack.enter_async_context(
            functions(world, "k1", "k2", "k3", scaling={"min_replicas": 1})
        )
        await asyncio.sleep(0.1)
        assert starting(world) == ["k1"]
        (called,) = await stack.enter_async_context(functions(world, "called"))
        calling = asyncio.create_task(collect(called))
        await asyncio.sleep(LOAD_S)
        assert starting(world) == ["called"]
        late = asyncio.create_task(collect(kept[2]))
        await calling
        await asyncio.sleep(0.1)
        assert starting(world) == ["k3"], "it has a client by now"
        await late
        await asyncio.sleep(LOAD_S + 0.5)
        assert {one.tier for one in kept} == {Tier.READY}


async def test_waking_is_no_start() -> None:
    world = world_of(1)
    async with functions(world, "a", "b") as (a, b):
        await collect(a)
        await a.park()
        starts = asyncio.create_task(collect(b))
        await asyncio.sleep(0.1)
        began = now()
        await collect(a)
        assert now() - began < 0.5
        assert starting(world) == ["b"]
        await starts


async def test_a_start_that_fails_or_hangs_keeps_nobody_waiting() -> None:
    world = world_of(1)
    async with functions(world, "a", "b", "c") as (a, b, c):
        world.make_runtime = lambda: FakeRuntime(fails={"load"})
        failing = asyncio.create_task(collect(a))
        await asyncio.sleep(0.1)
        world.make_runtime = lambda: FakeRuntime(load_s=1e6)
        hanging = asyncio.create_task(collect(b))
        await asyncio.sleep(2.0)
        assert failing.exception()
        assert starting(world) == ["b"]
        world.make_runtime = FakeRuntime
        began = now()
        assert await collect(c) == [3, 4, 5, 6]
        assert LONGEST_S - 5.0 < now() - began < LONGEST_S + 5.0
        hanging.cancel()


async def test_who_wants_no_start_any_more_leaves_the_line() -> None:
    world = world_of(1)
    async with functions(world, "a", "b", "c") as (a, b, c):
        first, gone, last = (asyncio.create_task(collect(one)) for one in (a, b, c))
        await asyncio.sleep(0.5)
        gone.cancel()
        await asyncio.sleep(0.1)
        assert world.node.starts.counts()["waiting"] == 1
        await first
        await asyncio.sleep(0.1)
        assert starting(world) == ["c"]
        c.close()
        await asyncio.sleep(0.5)
        assert world.node.starts.counts() == {"under_way": 0, "waiting": 0, "limit": 1}
        last.cancel()


async def test_who_waits_for_memory_takes_no_place() -> None:
    world = world_of(1, num_gpus=1)
    async with AsyncExitStack() as stack:
        gpu, none = {"gpus": 1}, {"gpus": 0}
        (held,) = await stack.enter_async_context(
            functions(world, "held", resources=gpu, scaling={"min_replicas": 1})
        )
        await collect(held)
        (waits,) = await stack.enter_async_context(functions(world, "waits", resources=gpu))
        (other,) = await stack.enter_async_context(functions(world, "other", resources=none))
        waiting = asyncio.create_task(collect(waits))
        await asyncio.sleep(5.0)
        assert await collect(other) == [3, 4, 5, 6]
        assert world.node.starts.counts()["under_way"] == 0
        waiting.cancel()


async def test_standbys_are_made_when_no_client_waits_for_a_start() -> None:
    world = world_of(1, num_standbys=3)
    async with functions(world, "a", "b") as (a, b):
        calls = [asyncio.create_task(collect(a))]
        await asyncio.sleep(0.1)
        world.node.standbys.use([world.backend])
        await asyncio.sleep(0.1)
        calls.append(asyncio.create_task(collect(b)))
        await asyncio.sleep(0.1)
        assert world.node.starts.counts() == {"under_way": 1, "waiting": 4, "limit": 1}
        await calls[0]
        await asyncio.sleep(0.1)
        assert starting(world) == ["b"], "nobody waits for a standby"
        await calls[1]
        await asyncio.sleep(10.0)
        assert world.node.starts.counts() == {"under_way": 0, "waiting": 0, "limit": 1}
        assert world.node.standbys.counts()["fake"] == {"ready": 3, "starting": 0}
    await world.node.standbys.close(remove=True)


async def test_a_standby_that_cannot_be_made_keeps_nobody_waiting() -> None:
    world = world_of(1, num_standbys=1)
    world.backend.create_error = BackendError("no room")
    world.node.standbys.use([world.backend])
    await asyncio.sleep(0.5)
    assert world.node.standbys.counts()["fake"] == {"ready": 0, "starting": 1}, "it is tried again"
    assert world.node.starts.counts()["under_way"] == 0
    await world.node.standbys.close(remove=False)


def test_there_are_always_two_places_by_default() -> None:
    assert usual_limit() >= 2
