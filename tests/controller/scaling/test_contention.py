"""Several functions on one device, on loop time: whoever wants it gets it in turn."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from controller.errors import ActivationFailed, ActivationTimeout, Conflict
from controller.scaling.activation import ColdStart
from controller.scaling.function import Function
from controller.scaling.lifecycle import ReplicaState, Tier
from functions.spec import FunctionSpec
from tests.fakes.runtime import FakeRuntime
from tests.fakes.world import World, collect, deployment, request, spec_of

pytestmark = pytest.mark.looptime

GIB = 1 << 30
PATIENCE_S = 1000.0
KEPT_READY = {"idle_timeout": None, "max_replicas": 1, "min_replicas": 1}


def now() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def functions(
    world: World, *names: str, share: float = 0.9, **sections: object
) -> AsyncIterator[list[Function]]:
    """Run functions that each need a share of a GPU and are never parked for being idle."""
    async with AsyncExitStack() as stack:
        spec = spec_of(
            resources={"gpus": 1},
            engine={"gpu_memory_utilization": share},
            **{"scaling": {"idle_timeout": None, "max_replicas": 1}} | sections,
        )
        yield [
            await stack.enter_async_context(world.function(spec.model_copy(update={"name": name})))
            for name in names
        ]


def resident(world: World) -> list[str]:
    """Return the functions whose replicas hold a whole model on a device."""
    return [
        function.name
        for function in world.functions
        for replica in function.set.replicas.values()
        if replica.state in (ReplicaState.LOADING, ReplicaState.READY, ReplicaState.PARKING)
    ]


async def test_a_waking_function_parks_the_idle_one() -> None:
    world = World(num_gpus=1)
    async with functions(world, "a", "b") as (a, b):
        await collect(a)
        await asyncio.sleep(1.0)
        began = now()
        await collect(b)
        assert a.tier is Tier.PARKED
        assert now() - began < 1.5, "a's park and b's load, nothing else"
        (replica,) = a.set.replicas.values()
        assert replica.lifecycle.history[-2].reason == "b needs its device"
        assert await collect(a) == [3, 4, 5, 6]
        assert b.tier is Tier.PARKED


@pytest.mark.parametrize(("context_gib", "is_waited_for"), [(1, False), (20, True)])
async def test_a_function_does_not_wait_for_more_of_a_park_than_it_needs(
    context_gib: int, *, is_waited_for: bool
) -> None:
    world = World(
        num_gpus=1,
        make_runtime=lambda: FakeRuntime(suspend_s=5.0, context_bytes=context_gib * GIB),
    )
    async with functions(world, "a", "b") as (a, b):
        await collect(a)
        await asyncio.sleep(1.0)
        began = now()
        await collect(b)
        assert (now() - began > 5.0) is is_waited_for
        (replica,) = a.set.replicas.values()
        assert (replica.state is ReplicaState.PARKED) is is_waited_for
        await asyncio.sleep(5.0)
        assert replica.state is ReplicaState.PARKED
        assert sum(world.node.memory.held("GPU-0").values()) == 90 * GIB, "nothing stays of a"
        assert await collect(a) == [3, 4, 5, 6]


async def test_a_redeploy_takes_the_device_of_a_start_that_hangs() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(load_s=1e6))
    async with functions(world, "a", timeouts={"startup": 900.0}) as (a,):
        waiting = asyncio.create_task(collect(a))
        await asyncio.sleep(5.0)
        world.make_runtime = FakeRuntime
        began = now()
        a.update(replace(a.deployment, runtime_hash="mended"), world.backend)
        assert await waiting == [3, 4, 5, 6]
        assert now() - began < 5.0


async def test_a_function_waits_for_memory_that_others_hold_and_disturbs_nobody() -> None:
    world = World(num_gpus=1)
    memory = world.node.memory
    async with (
        functions(world, "a", share=0.3) as (a,),
        functions(world, "b", share=0.6, queue={"timeout": 20}) as (b,),
    ):
        await collect(a)
        memory.set_foreign("GPU-0", 50 * GIB)
        with pytest.raises(ActivationTimeout, match=r"20 s: 50\.0 GiB of GPU-0 are held by proc"):
            await collect(b)
        assert resident(world) == ["a"], "parking it would not have helped"
        waiting = asyncio.create_task(collect(b))
        await asyncio.sleep(5.0)
        memory.set_foreign("GPU-0", 20 * GIB)
        assert await waiting == [3, 4, 5, 6]
        assert a.tier is Tier.PARKED


async def test_a_warm_up_says_that_others_hold_the_memory() -> None:
    world = World(num_gpus=1)
    world.node.memory.set_foreign("GPU-0", 50 * GIB)
    async with functions(world, "a", timeouts={"startup": 20}) as (a,):
        with pytest.raises(ActivationFailed, match=r"50\.0 GiB of GPU-0 are held"):
            await a.warm()


async def test_a_replica_is_stopped_when_the_host_has_too_little_memory_to_park_it() -> None:
    world = World(num_gpus=1)
    async with functions(world, "a", "b") as (a, b):
        await collect(a)
        await asyncio.sleep(1.0)
        (replica,) = a.set.replicas.values()
        world.available_bytes = (2 << 30) - 1
        with pytest.raises(Conflict, match=r"is not parked: 2\.0 GiB .* stop it instead"):
            await a.park()
        assert a.tier is Tier.READY
        await collect(b)
        assert not a.set.replicas
        moves = [(move.target, move.reason) for move in replica.lifecycle.history]
        assert moves[-3] == (ReplicaState.PARKING, "b needs its device")
        target, reason = moves[-2]
        assert target is ReplicaState.DRAINING
        assert reason.startswith("not parked: 2.0 GiB of host memory are available, less than")
        assert world.node.memory.promised_bytes("GPU-0") == 90 * GIB
        await asyncio.sleep(1.0)
        world.available_bytes = 2 << 30
        await collect(a)
        assert [one.state for one in b.set.replicas.values()] == [ReplicaState.PARKED]


async def test_parks_at_the_same_time_leave_each_other_the_hosts_memory() -> None:
    world = World(num_gpus=1)
    world.available_bytes = (3 << 30) + (1 << 29)
    scaling = {"idle_timeout": 20, "park_timeout": 600}
    async with functions(world, "a", "b", "c", share=0.3, scaling=scaling) as parties:
        await asyncio.gather(*(collect(one) for one in parties))
        replicas = [replica for one in parties for replica in one.set.replicas.values()]
        await asyncio.sleep(25.0)
        (stopped,) = [one for one in parties if one.tier is not Tier.PARKED]
        (replica,) = [one for one in replicas if one.state is ReplicaState.STOPPED]
        why = "not parked: 1.5 GiB of host memory are available beside 2.0 GiB for parks under way"
        assert replica.lifecycle.history[-2].reason.startswith(why)
        await collect(stopped)
        await asyncio.sleep(25.0)
        assert stopped.tier is Tier.PARKED, "the others are parked: what is free now is free"


@pytest.mark.parametrize(
    "sections", [{"resources": {"gpus": 0}}, {"scaling": {"idle_timeout": None, "park": "light"}}]
)
async def test_what_takes_no_host_memory_is_parked_however_little_there_is(
    sections: dict[str, object],
) -> None:
    world = World(num_gpus=1)
    world.available_bytes = 0
    async with world.function(spec_of(**{"resources": {"gpus": 1}} | sections)) as function:
        await collect(function)
        await function.park()
        assert function.tier is Tier.PARKED


async def test_a_parked_replica_moves_when_others_have_taken_its_device() -> None:
    world = World(num_gpus=2)
    async with functions(world, "a") as (a,):
        await collect(a)
        await a.park()
        world.node.memory.set_foreign("GPU-0", 50 * GIB)
        await collect(a)
        assert [home.device_ids for home in a.homes.values()] == [("GPU-1",)]


async def test_a_function_that_runs_empty_for_another_is_not_ready() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with functions(world, "a", "b") as (a, b):
        running = asyncio.create_task(collect(a, max_tokens=60))
        await asyncio.sleep(5.0)
        other = asyncio.create_task(collect(b, max_tokens=1))
        await asyncio.sleep(40.0)
        assert [replica.is_yielding for replica in a.set.replicas.values()] == [True]
        assert (a.tier, a.set.num_ready, a.set.has_place) == (Tier.PARKED, 0, False)
        with pytest.raises(ActivationFailed, match="may wake none"):
            async with a.generate(replace(request(max_tokens=1), may_wake=False)):
                pass
        async with a.generate(request(max_tokens=1)) as generation:
            assert [chunk async for chunk in generation]
        assert generation.record.tier == Tier.PARKED
        assert "room" in [phase.name for phase in generation.record.timeline]
        await asyncio.gather(running, other)


async def test_what_others_take_is_in_no_estimate() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(step_s=1.0, load_s=1.0))
    async with functions(world, "a", "b") as (a, b):
        running = asyncio.create_task(collect(a, max_tokens=60))
        await asyncio.sleep(5.0)
        began = now()
        await collect(b, max_tokens=1)
        assert now() - began > 20.0
        assert (b.books.eta_s("stopped", 0.0) or 0.0) < 5.0
        await b.stop()
        await running
        running = asyncio.create_task(collect(a, max_tokens=60))
        await asyncio.sleep(5.0)
        async with b.generate(request(max_tokens=1)) as generation:
            assert (generation.eta_s() or 0.0) > 1.0
            await asyncio.sleep(10.0)
            assert generation.eta_s() is None, "it waits in line, nobody knows how long"
        await running


async def test_the_wait_for_room_is_a_phase_of_the_cold_start() -> None:
    world = World(num_gpus=1)
    async with functions(world, "a", "b") as (a, b):
        await collect(a)
        await asyncio.sleep(1.0)
        await collect(b)
        await world.node.journal.flush()
        start = [entry for entry in world.entries if isinstance(entry, ColdStart)][-1]
        phases = {phase.name: phase.seconds for phase in start.phases}
        assert phases["room"] == pytest.approx(FakeRuntime().park_s, abs=0.02)
        assert sum(phases.values()) == pytest.approx(start.total_s)


async def test_a_function_with_requests_in_flight_is_not_parked() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with functions(world, "a", "b") as (a, b):
        running = asyncio.create_task(collect(a, max_tokens=10))
        await asyncio.sleep(3.0)
        waiting = asyncio.create_task(collect(b, max_tokens=1))
        await asyncio.sleep(5.0)
        assert not running.done()
        assert a.tier is Tier.READY
        assert await running == list(range(3, 13)), "whole, although somebody waited"
        assert await waiting == [3]


async def test_a_function_that_is_never_empty_yields_after_its_turn() -> None:
    world = World(num_gpus=1)

    async def call_on(function: Function) -> int:
        """Keep one request or another in flight for two minutes."""
        num_answers = 0
        while now() < 120.0:
            assert await collect(function, max_tokens=100) == list(range(3, 103))
            num_answers += 1
        return num_answers

    async with functions(world, "a", "b") as (a, b):
        busy = [asyncio.create_task(call_on(a)) for _ in range(3)]
        await asyncio.sleep(5.0)
        began = now()
        assert await collect(b, max_tokens=1) == [3]
        assert 30.0 <= now() - began < 40.0, "its turn of 30 s, and its last answers"
        answers = await asyncio.gather(*busy)
        assert sum(answers) > 200, "its callers have waited, and not for long"


async def test_a_function_that_must_be_ready_is_left_alone() -> None:
    world = World(num_gpus=1)
    async with (
        functions(world, "kept", scaling=KEPT_READY) as (kept_ready,),
        functions(world, "b", queue={"timeout": 5}) as (b,),
    ):
        await kept_ready.warm()
        await asyncio.sleep(60.0)
        with pytest.raises(ActivationTimeout):
            await collect(b)
        assert kept_ready.tier is Tier.READY


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize(("share", "num_ready"), [(0.6, 1), (0.9, 2)], ids=["one", "both"])
async def test_a_place_is_had_of_those_that_need_not_stay(
    share: float, num_ready: int, *, is_busy: bool
) -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(step_s=0.5))
    two = KEPT_READY | {"max_replicas": 2, "target_concurrency": 1, "scale_down_delay": 600}
    async with (
        functions(world, "kept", share=0.3, scaling=two) as (kept_ready,),
        functions(world, "b", share=share, queue={"timeout": 100}) as (b,),
    ):
        await kept_ready.warm()
        await asyncio.gather(*(collect(kept_ready, max_tokens=20) for _ in range(2)))
        await asyncio.sleep(5.0)
        num_tokens = 120 if is_busy else 1
        calls = [asyncio.create_task(collect(kept_ready, max_tokens=num_tokens)) for _ in range(2)]
        await asyncio.sleep(1.0)
        calls.append(asyncio.create_task(collect(b)))
        fewest = 2
        while not all(call.done() for call in calls):
            await asyncio.sleep(0.05)
            fewest = min(fewest, kept_ready.set.num_ready)
        assert fewest == num_ready, "min_replicas is 1; none goes if that does not help"
        assert (b.tier is Tier.READY) is (num_ready == 1)
        await asyncio.gather(*calls, return_exceptions=True)


@asynccontextmanager
async def parked_under_another(world: World) -> AsyncIterator[tuple[Function, Function]]:
    """Run one whose GPU went, while it was parked, to one that must stay; and one on the other."""
    async with functions(world, "a", "c", queue={"timeout": 5}) as (a, c):
        await collect(a)
        await collect(c)
        await a.park()
        async with functions(world, "kept", scaling=KEPT_READY) as (kept_ready,):
            await asyncio.sleep(60.0)
            (home,) = a.homes.values()
            assert [kept.device_ids for kept in kept_ready.homes.values()] == [home.device_ids]
            yield a, c


@pytest.mark.parametrize("is_parked", [True, False], ids=["room", "room to be made"])
async def test_one_whose_gpu_was_taken_for_good_starts_on_another(*, is_parked: bool) -> None:
    async with parked_under_another(World(num_gpus=2)) as (a, c):
        if is_parked:
            await c.park()
        (before,) = a.homes.values()
        assert await collect(a) == [3, 4, 5, 6]
        (after,) = a.homes.values()
        assert after.device_ids != before.device_ids
        assert c.tier is Tier.PARKED


async def test_one_whose_gpu_was_taken_is_not_given_up_while_no_start_may_be_tried() -> None:
    async with parked_under_another(World(num_gpus=2)) as (a, c):
        await c.park()
        (before,) = a.set.replicas
        a.set.backoff = a.set.backoff.after_failure(now(), "broken")
        waiting = asyncio.create_task(collect(a))
        await asyncio.sleep(0.9)
        assert list(a.set.replicas) == [before]
        assert await waiting == [3, 4, 5, 6]


async def test_one_whose_gpu_was_taken_waits_while_no_other_has_room() -> None:
    world = World(num_gpus=2, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with parked_under_another(world) as (a, c):
        running = asyncio.create_task(collect(c, max_tokens=20))
        await asyncio.sleep(1.0)
        with pytest.raises(ActivationTimeout):
            await collect(a)
        assert a.tier is Tier.PARKED
        await running
        assert await collect(a) == [3, 4, 5, 6]


@asynccontextmanager
async def draining(function: Function, *, seconds: int) -> AsyncIterator[None]:
    """Have a function's replica end a long response before it is removed; a token a second."""
    running = asyncio.create_task(collect(function, max_tokens=seconds))
    await asyncio.sleep(2.0)
    stopping = asyncio.create_task(function.stop())
    await asyncio.sleep(2.0)
    try:
        yield
    finally:
        await asyncio.gather(running, stopping)


async def test_nobody_waits_for_a_long_response_while_another_is_idle() -> None:
    world = World(num_gpus=2, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with functions(world, "drains", "idle", "new") as (drains, idle, new):
        for function in (drains, idle):
            await collect(function, max_tokens=1)
        async with draining(drains, seconds=200):
            async with asyncio.timeout(10.0):
                await collect(new, max_tokens=1)
            assert idle.tier is Tier.PARKED


async def test_nobody_waits_for_a_long_response_beside_an_idle_replica() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with functions(world, "drains", "idle", "new", share=0.45) as (drains, idle, new):
        for function in (drains, idle):
            await collect(function, max_tokens=1)
        async with draining(drains, seconds=200), asyncio.timeout(10.0):
            await collect(new, max_tokens=1)


async def park_under(parked: Function, other: Function) -> None:
    """Have one parked on the GPU that another is ready on."""
    await collect(parked, max_tokens=1)
    (home,) = parked.homes.values()
    await parked.park()
    memory = parked.node.memory
    for gpu in {"GPU-0", "GPU-1"} - set(home.gpus):
        memory.hold("filler", [gpu], parked.deployment.demand)
    await collect(other, max_tokens=1)
    memory.release("filler")
    assert [one.gpus for one in other.homes.values()] == [home.gpus]


async def test_one_parked_under_a_long_response_starts_on_another_gpu() -> None:
    world = World(num_gpus=2, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with functions(world, "x", "y", "new") as (x, y, new):
        await park_under(x, y)
        async with draining(y, seconds=200), asyncio.timeout(10.0):
            await asyncio.gather(collect(x, max_tokens=1), collect(new, max_tokens=1))


@pytest.mark.parametrize("is_bound", [True, False], ids=["parked there", "new"])
async def test_nobody_waits_for_one_that_yields_when_another_gpu_has_room(
    *, is_bound: bool
) -> None:
    world = World(num_gpus=2, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with functions(world, "x", "y", "z") as (x, y, z):
        if is_bound:
            await park_under(x, y)
        running = [asyncio.create_task(collect(y, max_tokens=200))]
        await asyncio.sleep(2.0)
        for _ in range(5):
            await collect(z, max_tokens=1)  # it is called often: let the other one yield
        running.append(asyncio.create_task(collect(z, max_tokens=50)))
        await asyncio.sleep(2.0)
        waiting = asyncio.create_task(collect(x, max_tokens=1))
        await asyncio.sleep(40.0)
        assert [one.is_yielding for one in y.set.replicas.values()] == [True]
        async with asyncio.timeout(15.0):
            await waiting
        assert z.tier is Tier.PARKED
        assert [one.is_yielding for one in y.set.replicas.values()] == [False]
        await asyncio.gather(*running)


async def test_one_that_wants_another_gpu_than_the_head_passes_it() -> None:
    world = World(num_gpus=2, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with (
        functions(world, "x", "y", "z") as (x, y, z),
        functions(world, "small", share=0.05) as (small,),
    ):
        await park_under(x, y)
        running = [asyncio.create_task(collect(one, max_tokens=100)) for one in (y, z)]
        await asyncio.sleep(5.0)
        waiting = asyncio.create_task(collect(x, max_tokens=1))
        await asyncio.sleep(40.0)
        async with asyncio.timeout(5.0):
            await collect(small, max_tokens=1)
        assert not waiting.done()
        assert [one.gpus for one in small.homes.values()] == [
            one.gpus for one in z.homes.values()
        ], "x waits for y's"
        await asyncio.gather(waiting, *running)


async def test_nobody_waits_for_a_runtime_that_cannot_be_removed() -> None:
    world = World(num_gpus=2)
    async with functions(world, "lost", "idle", "new") as (lost, idle, new):
        for function in (lost, idle):
            await collect(function)
        world.backend.delete_s = 1e6
        (replica,) = lost.set.replicas.values()
        lost.lost(replica, "the GPU fell off")
        async with asyncio.timeout(10.0):
            await collect(new)
        assert idle.tier is Tier.PARKED
        world.backend.delete_s = 0.0


async def test_one_that_cannot_be_helped_does_not_hold_up_others() -> None:
    world = World(num_gpus=1)
    async with (
        functions(world, "kept", share=0.5, scaling=KEPT_READY) as (kept_ready,),
        functions(world, "hopeless", queue={"timeout": 100}) as (hopeless,),
        functions(world, "small", share=0.4) as (small,),
    ):
        await kept_ready.warm()
        stuck = asyncio.create_task(collect(hopeless))
        await asyncio.sleep(1.0)
        assert await collect(small) == [3, 4, 5, 6]
        with pytest.raises(ActivationTimeout):
            await stuck


async def test_small_functions_share_a_gpu() -> None:
    world = World(num_gpus=1)
    async with functions(world, "a", "b", share=0.45) as both:
        for function in both:
            await collect(function)
        assert {function.tier for function in both} == {Tier.READY}


async def test_the_one_that_is_called_most_stays() -> None:
    world = World(num_gpus=1)
    async with functions(world, "often", "seldom", "c", share=0.45) as (often, seldom, c):
        for _ in range(10):
            await collect(often)
        await collect(seldom)
        await asyncio.sleep(2.0)
        await collect(c)
        assert often.tier is Tier.READY
        assert seldom.tier is Tier.PARKED


async def test_parked_ones_whose_contexts_fill_the_gpu_are_stopped() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(kept_bytes=4 * GIB))
    async with functions(world, "a", "b", "c", "d") as several:
        for function in several:
            await collect(function)
            await asyncio.sleep(1.0)
        tiers = [function.tier for function in several]
        assert tiers.count(Tier.PARKED) == 2, "10 of 100 GiB are left for contexts of 4"
        assert tiers[-1] is Tier.READY


@pytest.mark.parametrize(
    ("share", "park", "tier"),
    [
        (0.98, "light", Tier.PARKED),
        (0.995, "deep", Tier.PARKED),
        (0.995, "light", Tier.STOPPED),
        (1.0, "deep", Tier.STOPPED),
    ],
)
async def test_an_idle_one_gives_way_to_one_that_needs_nearly_the_whole_gpu(
    share: float, park: str, tier: Tier
) -> None:
    world = World(num_gpus=1)
    scaling = {"idle_timeout": None, "max_replicas": 1, "park": park}
    async with functions(world, "a", "b", share=share, scaling=scaling) as (a, b):
        await collect(a)
        await asyncio.sleep(5.0)
        async with asyncio.timeout(5.0):
            await collect(b)
        assert a.tier is tier


async def test_one_that_holds_more_than_thought_when_parked_is_stopped_then() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(kept_bytes=GIB))
    async with functions(world, "a", "b", share=0.995) as (a, b):
        await collect(a)
        await asyncio.sleep(5.0)
        async with asyncio.timeout(5.0):
            await collect(b)
        assert a.tier is Tier.STOPPED


async def test_one_that_waits_behind_gives_up_what_its_parked_replica_holds() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(kept_bytes=6 * GIB))

    async def call_on(function: Function) -> None:
        while True:
            await collect(function, max_tokens=50)

    async with functions(world, "a", "behind", "busy") as (a, behind, busy):
        await collect(behind)
        await asyncio.sleep(2.0)
        await behind.park()
        await collect(busy)
        callers = [asyncio.create_task(call_on(busy)) for _ in range(3)]
        await asyncio.sleep(2.0)
        async with asyncio.timeout(120.0):
            first = asyncio.create_task(collect(a))
            await asyncio.sleep(1.0)
            await asyncio.gather(first, collect(behind))
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)


async def test_parked_ones_stay_when_calls_to_others_come_fast() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(kept_bytes=8 << 20))
    async with functions(world, "a", "b", "c") as all_of_them:
        for _ in range(3):
            for function in all_of_them:
                await collect(function)
        assert len(world.backend.created) == 3
        assert not world.backend.deleted


async def test_who_came_first_is_served_first() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(step_s=1.0))
    order: list[str] = []

    async def call(function: Function) -> None:
        await collect(function, max_tokens=1)
        order.append(function.name)

    async with functions(world, "a", "b", "c", "d") as (a, *others):
        running = asyncio.create_task(collect(a, max_tokens=10))
        await asyncio.sleep(2.0)
        calls = []
        for function in (others[1], others[0], others[2]):
            calls.append(asyncio.create_task(call(function)))
            await asyncio.sleep(0.01)
        await asyncio.gather(running, *calls)
        assert order == ["c", "b", "d"]


async def test_one_that_no_longer_wants_the_device_leaves_the_line() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with functions(world, "a", "b", "c") as (a, b, c):
        running = asyncio.create_task(collect(a, max_tokens=10))
        await asyncio.sleep(2.0)
        async with b.generate(request()):
            await asyncio.sleep(1.0)  # it waits in the line, and then its client leaves
        waiting = asyncio.create_task(collect(c, max_tokens=1))
        await running
        assert await waiting == [3]
        assert b.tier is Tier.STOPPED, "nobody asks for it any more"


async def test_random_calls_to_ten_functions_on_one_gpu_are_all_answered() -> None:
    world = World(num_gpus=1)
    chance = random.Random(0)
    names = [f"f{number}" for number in range(10)]
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(resident(world)))
            await asyncio.sleep(0.01)

    async def caller(all_of_them: list[Function]) -> None:
        for _ in range(40):
            function = chance.choice(all_of_them)
            num_prompt = 1 + names.index(function.name)
            assert await collect(function, num_prompt=num_prompt, max_tokens=2) == [
                num_prompt,
                num_prompt + 1,
            ]
            await asyncio.sleep(chance.expovariate(1.0))

    async with functions(world, *names) as all_of_them:
        watching = asyncio.create_task(watch())
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*(caller(all_of_them) for _ in range(3)))
        watching.cancel()
    assert most == 1, "two models were on one GPU"


async def test_a_replica_that_yielded_serves_again_when_nobody_wants_its_place() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with functions(world, "a", "b") as (a, b):
        running = asyncio.create_task(collect(a, max_tokens=100))
        await asyncio.sleep(5.0)
        async with b.generate(request()):
            await asyncio.sleep(40.0)  # a's turn is over, and then b's client leaves
            assert [one.is_yielding for one in a.set.replicas.values()] == [True]
        async with asyncio.timeout(5.0):
            assert await collect(a, max_tokens=1) == [3], "beside the one that still runs"
        assert len(await running) == 100


async def test_a_replica_yields_on_while_another_still_waits_for_its_place() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with functions(world, "a", "b", "c") as (a, b, c):
        running = asyncio.create_task(collect(a, max_tokens=60))
        await asyncio.sleep(5.0)
        async with b.generate(request()):
            await asyncio.sleep(1.0)
            waiting = asyncio.create_task(collect(c, max_tokens=1))
            await asyncio.sleep(40.0)
        late = asyncio.create_task(collect(a, max_tokens=1))
        await asyncio.sleep(1.0)
        assert [one.is_yielding for one in a.set.replicas.values()] == [True]
        assert await waiting == [3]
        assert (await running)[-1] == 62
        assert await late == [3]


@pytest.fixture
def no_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing happen by the clock alone but what somebody has set a timer for."""
    monkeypatch.setattr(Function, "sweep", lambda _: None)


@pytest.mark.usefixtures("no_sweeps")
async def test_a_park_that_is_refused_is_asked_for_again() -> None:
    world = World(num_gpus=1)
    async with functions(world, "a", "b") as (a, b), asyncio.timeout(10.0):
        await collect(a)
        await asyncio.sleep(1.0)
        world.runtime.fails = {"park"}
        waiting = asyncio.create_task(collect(b))
        await asyncio.sleep(0.2)
        assert a.tier is Tier.READY
        world.runtime.fails = set()
        assert await waiting == [3, 4, 5, 6]


@pytest.mark.usefixtures("no_sweeps")
async def test_one_that_refuses_to_park_is_asked_ever_more_seldom() -> None:
    world = World(num_gpus=1)
    async with functions(world, "a", "b") as (a, b):
        await collect(a)
        world.runtime.fails = {"park"}
        waiting = asyncio.create_task(collect(b))
        await asyncio.sleep(60.0)
        assert world.runtime.calls.count("park") == 6, "after 1, 2, 4, 8, 16 s"
        world.runtime.fails = set()
        assert await waiting == [3, 4, 5, 6]


@pytest.mark.usefixtures("no_sweeps")
async def test_one_that_became_ready_for_nobody_gives_way() -> None:
    world = World(num_gpus=1)
    async with functions(world, "a", "b") as (a, b), asyncio.timeout(10.0):
        async with a.generate(request()):
            await asyncio.sleep(0.5)  # it loads, and then its client leaves
            waiting = asyncio.create_task(collect(b))
            await asyncio.sleep(0.1)
        assert await waiting == [3, 4, 5, 6]


@pytest.mark.usefixtures("no_sweeps")
async def test_one_that_need_not_be_ready_any_more_gives_way() -> None:
    world = World(num_gpus=1)
    async with functions(world, "a", "b") as (a, b), asyncio.timeout(20.0):
        floor_one = a.spec.scaling.model_copy(update={"min_replicas": 1})
        kept = replace(a.deployment, spec=a.spec.model_copy(update={"scaling": floor_one}))
        usual = a.deployment
        a.update(kept, world.backend)
        await asyncio.sleep(5.0)
        waiting = asyncio.create_task(collect(b))
        await asyncio.sleep(5.0)
        assert not waiting.done()
        a.update(usual, world.backend)
        assert await waiting == [3, 4, 5, 6]


@pytest.mark.usefixtures("no_sweeps")
async def test_a_warm_up_that_has_no_more_time_leaves_the_line() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(step_s=1.0))
    async with functions(world, "a", "b", timeouts={"startup": 40.0}) as (a, b):
        running = asyncio.create_task(collect(a, max_tokens=100))
        await asyncio.sleep(5.0)
        with pytest.raises(ActivationFailed):
            await b.warm()
        async with asyncio.timeout(5.0):
            assert await collect(a, max_tokens=1) == [3], "its place is not wanted any more"
        assert len(await running) == 100


@pytest.mark.usefixtures("no_sweeps")
async def test_one_that_has_lost_hope_lets_those_behind_it_pass() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(step_s=1.0, load_s=0.0))
    async with (
        functions(world, "small", share=0.3) as (small,),
        functions(world, "a", "b", share=0.6) as (a, b),
        asyncio.timeout(20.0),
    ):
        await collect(a, max_tokens=1)
        first = asyncio.create_task(collect(b))  # a will have to go, in a moment
        await asyncio.sleep(0.01)
        behind = asyncio.create_task(collect(small, max_tokens=1))
        await asyncio.sleep(0.01)
        running = asyncio.create_task(collect(a, max_tokens=10))  # and now it does not
        assert await behind == [3]
        assert not running.done()
        assert await first == [3, 4, 5, 6]


@pytest.mark.usefixtures("no_sweeps")
async def test_one_that_must_be_ready_is_replaced_while_it_is_removed() -> None:
    world = World(num_gpus=2)
    async with functions(world, "a", scaling=KEPT_READY) as (a,):
        await asyncio.sleep(5.0)
        assert a.tier is Tier.READY
        world.backend.delete_s = 10.0
        world.runtime.crash()
        await asyncio.sleep(5.0)
        assert a.tier is Tier.READY
        assert len(world.backend.created) == 2


def on_gpu(name: str, share: float, **sections: object) -> FunctionSpec:
    return spec_of(
        name=name,
        model={"source": "./model", "served_names": [name]},
        resources={"gpus": 1},
        engine={"gpu_memory_utilization": share},
        **sections,
    )


def is_left_alone(function: Function) -> bool:
    (replica,) = function.set.replicas.values()
    reasons = [move.reason for move in replica.lifecycle.history]
    return replica.state is ReplicaState.READY and not any("device" in one for one in reasons)


async def test_a_new_revision_waits_for_the_old_ones_memory_and_evicts_nobody() -> None:
    world = World(num_gpus=1)
    old = on_gpu("a", 0.5, scaling={"min_replicas": 1})
    async with world.function(old) as a, world.function(on_gpu("b", 0.4)) as b:
        await collect(b)
        await collect(a)
        await asyncio.sleep(30.0)
        (before,) = a.set.replicas
        world.backend.delete_s = 1.0
        a.update(deployment(old, "new hash"), a.backend)
        await asyncio.sleep(10.0)
        assert before not in a.set.replicas
        assert is_left_alone(a)
        assert is_left_alone(b)


async def test_a_killed_start_is_made_again_in_its_own_memory() -> None:
    world = World(num_gpus=1, make_runtime=lambda: FakeRuntime(load_s=5.0))
    async with functions(world, "a", "b", "c", share=0.3) as (a, b, c):
        await collect(b)
        await collect(c)
        await asyncio.sleep(5.0)
        world.backend.delete_s = 2.0
        call = asyncio.create_task(collect(a))
        await asyncio.sleep(2.0)
        (replica_id,) = a.set.replicas
        (runtime,) = (one for at, one in world.runtimes.items() if replica_id in at)
        runtime.crash()
        assert await call == [3, 4, 5, 6]
        assert is_left_alone(b)
        assert is_left_alone(c)
