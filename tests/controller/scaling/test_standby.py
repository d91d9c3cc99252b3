"""Runtimes in standby: kept, taken, given back and replaced, on loop time."""

import asyncio

import pytest

from controller.backends.base import BackendError, RuntimeInfo, RuntimeSpec
from controller.scaling.activation import ColdStart
from controller.scaling.function import Function
from controller.scaling.lifecycle import ReplicaState, Tier
from controller.scaling.policy import backoff_s
from controller.scaling.replica_log import replica_log
from controller.scaling.standby import REFILL_DELAY_S, STARTUP_TIMEOUT_S
from runtime.rpc import inference_pb2 as pb
from tests.fakes.backend import FakeBackend
from tests.fakes.runtime import FakeRuntime
from tests.fakes.world import World, collect, spec_of

pytestmark = pytest.mark.looptime

SETTLE_S = 0.1


async def world_with(num_standbys: int = 1, *, num_gpus: int = 0) -> World:
    """Return a world whose pool has had time to fill."""
    world = World(num_standbys=num_standbys, num_gpus=num_gpus)
    world.node.standbys.use([world.backend])
    await asyncio.sleep(SETTLE_S)
    return world


def counts(world: World) -> tuple[int, int]:
    """Return how many are ready and starting."""
    found = world.node.standbys.counts()["fake"]
    return found["ready"], found["starting"]


async def close(world: World) -> None:
    await world.node.standbys.close(remove=True)


async def stopped(function: Function) -> None:
    await function.stop()
    assert not function.set.replicas


async def test_the_pool_keeps_as_many_as_it_was_told_for_the_backends_in_use() -> None:
    world = await world_with(2, num_gpus=2)
    assert counts(world) == (2, 0)
    assert [spec.function for spec in world.backend.created] == ["", ""]
    assert world.backend.created[0].device_uuids == ("GPU-0", "GPU-1"), "it may get any of them"
    world.node.standbys.use([])
    await asyncio.sleep(SETTLE_S)
    assert not world.backend.machine.runtimes
    await close(world)


async def test_a_backend_nobody_uses_gets_none() -> None:
    world = World(num_standbys=1)
    world.node.standbys.use([FakeBackend()])
    await asyncio.sleep(SETTLE_S)
    assert not world.backend.created
    await close(world)


async def test_a_cold_start_takes_a_standby_and_creates_nothing() -> None:
    world = await world_with()
    spec = spec_of(resources={"gpus": 0, "cpu": 2, "memory": "1Gi"})
    async with world.function(spec) as function:
        assert function.tier is Tier.STANDBY
        (standby,) = world.node.standbys.runtime_ids
        assert await collect(function, num_prompt=3, max_tokens=1) == [3]
        assert [created.runtime_id for created in world.backend.created] == [standby]
        (replica,) = function.set.replicas.values()
        assert replica.id.startswith("tiny-"), "a replica is called after its function"
        owner = world.runtimes[f"fake:{standby}"].owner
        assert owner == pb.Owner(replica_id=replica.id, function="tiny", revision="hash")
        assert world.backend.limits[standby] == (2, 1 << 30)
        await world.node.journal.flush()
        (start,) = [entry for entry in world.entries if isinstance(entry, ColdStart)]
        assert start.from_tier == "standby"
        assert "container_start" not in {phase.name for phase in start.phases}
    await close(world)


async def test_another_one_is_made_once_the_taken_one_has_had_time_to_load() -> None:
    world = await world_with()
    async with world.function() as function:
        await collect(function)
        assert counts(world) == (0, 1)
        await asyncio.sleep(REFILL_DELAY_S)
        assert counts(world) == (1, 0)
    await close(world)


async def test_a_stopped_replicas_runtime_goes_back_while_the_pool_has_room() -> None:
    world = await world_with()
    async with world.function() as function:
        (standby,) = world.node.standbys.runtime_ids
        await collect(function)
        world.backend.create_error = BackendError("no room")
        await asyncio.sleep(REFILL_DELAY_S + SETTLE_S)
        assert counts(world)[0] == 0
        await stopped(function)
        assert world.runtimes[f"fake:{standby}"].calls == ["load", "unload"]
        assert standby in world.node.standbys.runtime_ids
        assert await collect(function) == [3, 4, 5, 6]
        assert len(world.backend.machine.runtimes) == 1
    await close(world)


async def test_a_stopped_replicas_runtime_is_removed_when_the_pool_is_full() -> None:
    world = await world_with()
    async with world.function() as function:
        (standby,) = world.node.standbys.runtime_ids
        await collect(function)
        await asyncio.sleep(REFILL_DELAY_S)
        await stopped(function)
        assert world.backend.deleted == [standby]
    await close(world)


@pytest.mark.parametrize("obstacle", ["unload", "resize"])
async def test_a_runtime_that_cannot_be_cleared_is_removed(obstacle: str) -> None:
    world = await world_with()
    async with world.function() as function:
        (standby,) = world.node.standbys.runtime_ids
        await collect(function)
        world.backend.create_error = BackendError("no room")
        if obstacle == "unload":
            world.runtimes[f"fake:{standby}"].fails.add("unload")
        else:
            world.backend.resize_error = BackendError("limits cannot be lifted")
        await asyncio.sleep(REFILL_DELAY_S + SETTLE_S)
        await stopped(function)
        assert world.backend.deleted == [standby]
    await close(world)


async def test_a_lost_replicas_runtime_never_goes_back() -> None:
    world = await world_with()
    async with world.function() as function:
        (standby,) = world.node.standbys.runtime_ids
        await collect(function)
        world.runtimes[f"fake:{standby}"].crash()
        await asyncio.sleep(SETTLE_S)
        assert standby in world.backend.deleted
        assert await collect(function) == [3, 4, 5, 6]
    await close(world)


async def test_a_standby_that_dies_is_replaced() -> None:
    world = await world_with()
    (first,) = world.node.standbys.runtime_ids
    world.runtimes[f"fake:{first}"].crash()
    await asyncio.sleep(backoff_s(1) + SETTLE_S)
    assert world.backend.deleted == [first]
    assert counts(world) == (1, 0)
    assert world.node.standbys.runtime_ids != {first}
    await close(world)


async def test_a_standby_found_dead_when_taken_costs_the_request_nothing() -> None:
    world = await world_with()
    async with world.function() as function:
        (standby,) = world.node.standbys.runtime_ids
        world.runtimes[f"fake:{standby}"].is_alive = False  # and nobody has noticed yet
        assert await collect(function) == [3, 4, 5, 6]
        (replica,) = function.set.replicas.values()
        assert function.homes[replica.id].runtime_id == replica.id
        assert standby in world.backend.deleted
    await close(world)


async def test_the_exit_of_a_standby_is_not_that_of_the_replica_which_was_to_get_it() -> None:
    world = await world_with()
    async with world.function() as function:
        (standby,) = world.node.standbys.runtime_ids
        world.runtimes[f"fake:{standby}"].is_alive = False
        world.backend.exit(standby)
        info = world.backend.machine.runtimes[standby]
        world.backend.delete_s = 1.0
        answer = asyncio.create_task(collect(function))
        await asyncio.sleep(0.5)
        await function.exited(info)  # while what is left of it is removed
        assert await answer == [3, 4, 5, 6]
    await close(world)


async def test_a_standby_that_is_still_starting_is_better_than_none() -> None:
    world = World(num_standbys=1, make_runtime=lambda: FakeRuntime(state=pb.RUNTIME_STATE_STARTING))
    world.node.standbys.use([world.backend])
    await asyncio.sleep(SETTLE_S)
    assert counts(world) == (0, 1)
    async with world.function() as function:
        assert function.tier is Tier.STOPPED, "its imports are still to be waited for"
        await collect(function)
        assert len(world.backend.created) == 1
    await close(world)


async def test_a_pool_that_cannot_be_filled_is_tried_ever_more_rarely_and_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = World(num_standbys=1)
    world.backend.create_error = BackendError("the engine has no image")
    world.node.standbys.use([world.backend])
    await asyncio.sleep(10.0)
    assert counts(world) == (0, 1)
    assert capsys.readouterr().out.count("the engine has no image") == 1
    world.backend.create_error = None
    await asyncio.sleep(backoff_s(100))
    assert counts(world) == (1, 0)
    await close(world)


async def test_while_a_standby_loads_the_function_is_as_warm_as_that() -> None:
    world = await world_with()
    async with world.function() as function:
        answer = asyncio.create_task(collect(function))
        await asyncio.sleep(SETTLE_S)
        assert {r.state for r in function.set.replicas.values()} == {ReplicaState.LOADING}
        assert function.tier is Tier.STANDBY
        await answer
    await close(world)


async def test_a_log_begins_where_the_runtime_was_given_to_the_replica() -> None:
    world = await world_with()
    (standby,) = world.node.standbys.runtime_ids
    for line in ("imports", '{"event": "assigned"}', "of another", '{"event": "assigned"}', "mine"):
        world.backend.machine.log(standby, line)
    lines = [line async for line in replica_log(world.backend, standby, tail=100)]
    assert lines == ['{"event": "assigned"}', "mine"]
    assert [line async for line in replica_log(world.backend, standby, tail=1)] == ["mine"]
    await close(world)


async def test_leaving_the_runtimes_leaves_the_standbys() -> None:
    world = await world_with()
    await world.node.standbys.close(remove=False)
    assert len(world.backend.machine.runtimes) == 1
    assert not world.backend.deleted


async def test_a_standby_that_is_just_being_removed_is_removed_when_the_pool_closes() -> None:
    world = await world_with()
    world.backend.delete_s = 5.0
    world.node.standbys.use([])
    await asyncio.sleep(SETTLE_S)
    assert len(world.node.standbys.runtime_ids) == 1
    await close(world)
    assert not world.backend.machine.runtimes
    assert not world.node.standbys.runtime_ids


async def test_a_standby_that_dies_before_it_answers_is_replaced_at_once() -> None:
    world = World(num_standbys=1, make_runtime=lambda: FakeRuntime(is_alive=False))
    world.node.standbys.use([world.backend])
    await asyncio.sleep(SETTLE_S)
    (dead,) = world.node.standbys.runtime_ids
    world.make_runtime = FakeRuntime
    world.backend.exit(dead)
    for _ in range(2):  # the second time, nobody waits for it any more
        world.node.standbys.exited(world.backend.machine.runtimes[dead])
    await asyncio.sleep(backoff_s(1) + SETTLE_S)
    assert world.backend.deleted == [dead]
    assert counts(world) == (1, 0)
    await close(world)


async def test_a_creation_that_fails_unforeseen_is_not_tried_again_at_once() -> None:
    world = World(num_standbys=1)
    calls: list[float] = []

    async def refuse(_spec: RuntimeSpec) -> RuntimeInfo:
        calls.append(asyncio.get_running_loop().time())
        raise PermissionError("chown")

    world.backend.create = refuse  # type: ignore[assignment,method-assign]
    world.node.standbys.use([world.backend])
    await asyncio.sleep(backoff_s(1) + backoff_s(2) + SETTLE_S)
    assert len(calls) == 3, "each later than the one before"
    await close(world)


async def test_a_standby_given_back_knows_nothing_of_the_function_it_served() -> None:
    world = World(num_standbys=1, make_runtime=lambda: FakeRuntime(kept_bytes=5 << 30))
    world.node.standbys.use([world.backend])
    await asyncio.sleep(SETTLE_S)
    async with world.function() as function:
        await collect(function)
        await function.park()
        (link,) = function.links.values()
        assert link.kept_bytes == 5 << 30
        await stopped(function)
        standby = world.node.standbys.take(world.backend)
        assert standby is not None
        assert standby.link.kept_bytes is None
    await close(world)


async def test_a_standby_that_never_gets_ready_is_replaced() -> None:
    world = World(
        num_standbys=1,
        make_runtime=lambda: FakeRuntime(state=pb.RUNTIME_STATE_STARTING, load_s=1e6),
    )
    world.node.standbys.use([world.backend])
    await asyncio.sleep(STARTUP_TIMEOUT_S - 1.0)
    (first,) = world.node.standbys.runtime_ids
    assert counts(world) == (0, 1)
    world.make_runtime = FakeRuntime
    await asyncio.sleep(1.0 + backoff_s(1) + SETTLE_S)
    assert world.backend.deleted == [first]
    assert counts(world) == (1, 0)
    await asyncio.sleep(2 * STARTUP_TIMEOUT_S)
    assert world.backend.deleted == [first], "one that is ready may wait for ever"
    await close(world)


async def test_a_standby_that_does_not_get_ready_again_is_replaced() -> None:
    world = await world_with(1)
    (first,) = world.node.standbys.runtime_ids
    await asyncio.sleep(2 * STARTUP_TIMEOUT_S)
    world.runtime.enter(pb.RUNTIME_STATE_STARTING)
    await asyncio.sleep(STARTUP_TIMEOUT_S - 1.0)
    assert counts(world) == (0, 1)
    assert not world.backend.deleted, "there may come another zygote"
    await asyncio.sleep(1.0 + backoff_s(1) + SETTLE_S)
    assert world.backend.deleted == [first]
    assert counts(world) == (1, 0)
    await close(world)
