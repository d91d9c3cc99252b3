"""A function's owner with fake runtimes, on loop time."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from unittest.mock import Mock

import pytest
from apscheduler.triggers.cron import CronTrigger

from controller.backends.base import BackendError, BackendUnavailable
from controller.errors import (
    ActivationFailed,
    ActivationTimeout,
    ApiError,
    Conflict,
    FirstTokenTimeout,
    ModelNotFound,
    Overloaded,
    QueueFull,
    RuntimeDied,
    ShuttingDown,
)
from controller.scaling.activation import ColdStart
from controller.scaling.function import Function
from controller.scaling.journal import UsageEntry
from controller.scaling.lifecycle import ReplicaState, Tier
from controller.scaling.replica import Instruction
from controller.scaling.serving import FunctionGeneration
from functions.spec import ScheduleSpec
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import SnapshotUnusable
from tests.fakes.runtime import FakeRuntime
from tests.fakes.world import SNAPSHOT, World, collect, deployment, request, spec_of

pytestmark = pytest.mark.looptime


def now() -> float:
    return asyncio.get_running_loop().time()


async def until(function: Function, tier: Tier, limit_s: float = 100.0) -> None:
    deadline = now() + limit_s
    while function.tier is not tier or ReplicaState.PARKING in states(function):
        assert now() < deadline, f"still {function.tier}, not {tier}"
        await asyncio.sleep(0.05)


def states(function: Function) -> set[ReplicaState]:
    return {replica.state for replica in function.set.replicas.values()}


async def read_on(generation: FunctionGeneration) -> None:
    async for _ in generation:
        pass


async def first_failure(world: World) -> ColdStart:
    """Return the first cold start in the journal that failed."""
    await world.node.journal.flush()
    starts = (entry for entry in world.entries if isinstance(entry, ColdStart))
    return next(start for start in starts if start.outcome == "failed")


async def ask(function: Function, received_at: float) -> FunctionGeneration:
    asked = replace(request(max_tokens=1), received_at=received_at)
    async with function.generate(asked) as generation:
        await read_on(generation)
    return generation


async def test_the_first_request_starts_a_replica_and_is_answered() -> None:
    world = World()
    async with world.function() as function:
        assert await collect(function, num_prompt=5, max_tokens=3) == [5, 6, 7]
        assert function.tier is Tier.READY
        assert len(world.backend.created) == 1


async def test_a_request_goes_off_before_its_function_looks_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    order: list[str] = []
    async with world.function() as function:
        await collect(function)
        plan = function.set.plan

        def noted(_set: object, now: float) -> list[Instruction]:
            order.append("looks")
            return plan(now)

        monkeypatch.setattr(type(function.set), "plan", noted)
        async with function.generate(request()) as generation:
            asyncio.get_running_loop().call_soon(order.append, "goes off")  # as on a real wire
            await read_on(generation)
    assert order[:2] == ["goes off", "looks"]


async def test_a_crowd_shares_one_activation() -> None:
    world = World()
    async with world.function() as function:
        answers = await asyncio.gather(*(collect(function, num_prompt=n) for n in range(1, 33)))
        assert [answer[0] for answer in answers] == list(range(1, 33))
        assert len(world.backend.created) == 1


async def test_idle_is_parked_and_the_next_request_wakes_the_same_runtime() -> None:
    world = World()
    async with world.function(spec_of(scaling={"idle_timeout": 10})) as function:
        await collect(function)
        ended_at = now()
        await until(function, Tier.PARKED)
        assert now() - ended_at == pytest.approx(10.1, abs=0.1)
        assert await collect(function) == [3, 4, 5, 6]
        assert world.runtime.calls == ["load", "park", "wake"]
        assert len(world.backend.created) == 1


async def test_a_parked_replica_is_stopped_after_the_park_timeout() -> None:
    world = World()
    spec = spec_of(scaling={"idle_timeout": 0, "park_timeout": 60})
    async with world.function(spec) as function:
        await collect(function)
        await until(function, Tier.PARKED)
        parked_at = now()
        await until(function, Tier.STOPPED)
        assert now() - parked_at == pytest.approx(60, abs=0.5)
        await asyncio.sleep(0.1)
        assert not world.backend.machine.runtimes


async def test_the_phases_of_a_cold_start_add_up_to_the_clients_wait() -> None:
    world = World()
    world.backend.create_s = 0.5
    async with world.function() as function:
        async with function.generate(request()) as generation:
            await anext(aiter(generation))
        await world.node.journal.flush()
        (start,) = [entry for entry in world.entries if isinstance(entry, ColdStart)]
        assert start.from_tier == Tier.STOPPED
        assert start.reason == "request"
        assert sum(phase.seconds for phase in start.phases) == pytest.approx(start.total_s)
        assert generation.record.first_token_s == pytest.approx(start.total_s, abs=0.01)
        assert {"queue", "place", "read", "first_token"} <= {phase.name for phase in start.phases}


async def test_a_wake_that_fails_is_in_the_books_of_the_request_that_waits_for_it() -> None:
    world = World()
    async with world.function(spec_of(scaling={"idle_timeout": 0})) as function:
        await collect(function)
        await until(function, Tier.PARKED)
        world.runtime.fails.add("wake")
        await collect(function)
        wake = await first_failure(world)
        assert (wake.from_tier, wake.reason) == (Tier.PARKED, "request")
        assert [phase.name for phase in wake.phases] == ["queue", "failed"]
        assert wake.total_s == pytest.approx(0.2), "the fake's time to wake"


async def test_a_replica_that_dies_before_its_first_token_is_in_the_books_of_its_request() -> None:
    world = World(make_runtime=lambda: FakeRuntime(step_s=5.0))
    async with world.function() as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(2.0)
        world.runtime.crash()
        await task
        assert (await first_failure(world)).reason == "request"


async def test_a_start_that_fails_while_another_replica_serves_is_nobodys() -> None:
    runtimes = iter([FakeRuntime(step_s=5.0), FakeRuntime(fails={"load"})])
    world = World(make_runtime=lambda: next(runtimes, FakeRuntime()))
    spec = spec_of(scaling={"min_replicas": 1, "max_replicas": 2})
    async with world.function(spec) as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(2.0)
        function.update(deployment(spec, runtime_hash="newer"), function.backend)
        await task
        assert (await first_failure(world)).reason == "kept ready"


async def test_usage_is_written_for_finished_and_for_abandoned_requests() -> None:
    world = World(make_runtime=lambda: FakeRuntime(num_cached_tokens=6))
    async with world.function() as function:
        await collect(function, num_prompt=7, max_tokens=5)
        async with function.generate(request(max_tokens=1000)) as generation:
            await anext(aiter(generation))
        await world.node.journal.flush()
    whole, cut = [entry.record for entry in world.entries if isinstance(entry, UsageEntry)]
    assert (whole.num_prompt_tokens, whole.num_output_tokens, whole.outcome) == (7, 5, "length")
    assert cut.num_output_tokens == 1
    assert cut.outcome == "disconnected"
    assert (whole.num_cached_tokens, cut.num_cached_tokens) == (6, 6)


async def test_tokens_that_nobody_stayed_to_read_are_counted() -> None:
    world = World(make_runtime=lambda: FakeRuntime(step_s=0.01))
    async with world.function() as function:
        async with function.generate(request(max_tokens=1000)) as generation:
            await anext(aiter(generation))
            await asyncio.sleep(0.5)
        await world.node.journal.flush()
    (record,) = [entry.record for entry in world.entries if isinstance(entry, UsageEntry)]
    assert record.outcome == "disconnected"
    assert record.num_output_tokens == pytest.approx(50, abs=2)


@pytest.mark.parametrize("tier", [Tier.STOPPED, Tier.PARKED])
@pytest.mark.parametrize("after_s", [0.05, 0.15, 0.201, 0.206, 1.1])
async def test_who_leaves_while_it_wakes_is_in_the_books_and_it_is_parked_again(
    tier: Tier, after_s: float
) -> None:
    world = World()
    async with world.function(spec_of(scaling={"idle_timeout": 5})) as function:
        if tier is Tier.PARKED:
            await collect(function)
            await until(function, Tier.PARKED)
        with pytest.raises(TimeoutError):
            async with (
                asyncio.timeout(after_s),
                function.generate(request(max_tokens=1000)) as generation,
            ):
                await read_on(generation)
        await asyncio.sleep(60.0)
        assert function.tier is Tier.PARKED
        assert not world.runtime.sequences
        await world.node.journal.flush()
    outcomes = [entry.record.outcome for entry in world.entries if isinstance(entry, UsageEntry)]
    assert outcomes[-1] == "disconnected"
    assert len(outcomes) == (2 if tier is Tier.PARKED else 1)


async def test_leaving_early_cancels_the_sequence_and_frees_its_lease() -> None:
    world = World()
    async with world.function() as function:
        async with function.generate(request(max_tokens=1000)) as generation:
            await anext(aiter(generation))
            assert function.set.in_flight == 1
        await asyncio.sleep(0.01)
        assert function.set.in_flight == 0
        assert not world.runtime.sequences


async def test_leaving_the_queue_leaves_nothing_behind() -> None:
    world = World()
    async with world.function() as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(0.1)
        assert function.set.num_queued == 1
        task.cancel()
        await asyncio.wait([task])
        assert function.set.num_queued == 0
        await until(function, Tier.READY)
        assert function.set.in_flight == 0


async def test_a_runtime_that_dies_before_the_first_token_is_replaced_unnoticed() -> None:
    runtimes = iter([FakeRuntime(step_s=5.0), FakeRuntime()])
    world = World(make_runtime=lambda: next(runtimes))
    async with world.function() as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(2.0)
        (first,) = world.runtimes.values()
        first.crash()
        assert await task == [3, 4, 5, 6]
        assert len(world.backend.created) == 2


async def test_a_runtime_that_dies_in_the_stream_ends_it_with_an_error() -> None:
    world = World()
    async with world.function() as function:
        async with function.generate(request(max_tokens=1000)) as generation:
            await anext(aiter(generation))
            world.runtime.crash()
            with pytest.raises(RuntimeDied, match="went away") as died:
                await read_on(generation)
            await generation.__aexit__(RuntimeDied, died.value, None)
        assert generation.record.outcome == "runtime_died"
        assert await collect(function) == [3, 4, 5, 6], "the next request gets a new replica"
        assert len(world.backend.created) == 2


async def test_a_stream_that_was_read_too_slowly_costs_its_answers_and_not_the_replica() -> None:
    world = World()
    async with world.function() as function:
        await collect(function)
        answer = asyncio.create_task(collect(function, max_tokens=1000))
        await asyncio.sleep(0.5)
        world.runtime.overrun()
        with pytest.raises(Overloaded, match="fell behind"):
            await answer
        assert await collect(function) == [3, 4, 5, 6]
        assert len(world.backend.created) == 1


async def test_a_start_that_fails_is_told_at_once_and_backed_off() -> None:
    world = World(make_runtime=lambda: FakeRuntime(fails={"load"}))
    async with world.function() as function:
        with pytest.raises(ActivationFailed, match="told to refuse load"):
            await collect(function)
        assert now() < 2.0
        with pytest.raises(ActivationFailed) as refused:
            await collect(function)
        assert refused.value.retry_after_s is not None
        await asyncio.sleep(refused.value.retry_after_s + 0.1)
        world.make_runtime = FakeRuntime
        assert await collect(function) == [3, 4, 5, 6], "the back-off expires by itself"


async def test_an_exit_during_the_start_is_told_and_its_log_only_to_the_operator() -> None:
    world = World(make_runtime=lambda: FakeRuntime(load_s=1000.0))
    async with world.function() as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(1.0)
        (runtime_id,) = world.backend.machine.runtimes
        world.backend.machine.log(runtime_id, "ImportError: no module named torch")
        world.backend.exit(runtime_id, exit_code=1)
        await function.exited(await world.backend.inspect(runtime_id))
        with pytest.raises(ActivationFailed, match=r"status 1.*`coldspark logs tiny`") as told:
            await task
        assert "torch" not in told.value.message
        assert "no module named torch" in function.last_error
        assert now() < 2.0


@pytest.mark.parametrize("exit_code", [-9, 137, None])
async def test_a_runtime_that_is_killed_before_it_answers_is_replaced_unnoticed(
    exit_code: int | None,
) -> None:
    runtimes = iter([FakeRuntime(is_alive=False), FakeRuntime()])
    world = World(make_runtime=lambda: next(runtimes))
    async with world.function() as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(0.5)
        (runtime_id,) = function.runtime_ids
        world.backend.exit(runtime_id, exit_code)
        await function.exited(await world.backend.inspect(runtime_id))
        assert await task == [3, 4, 5, 6]
        assert now() < 2.0, "nothing was backed off"


async def test_a_runtime_that_is_killed_while_it_loads_is_replaced_unnoticed() -> None:
    world = World()
    async with world.function() as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(0.5)
        world.runtime.crash()
        assert await task == [3, 4, 5, 6]
        assert len(world.backend.created) == 2
        assert now() < 2.0, "nothing was backed off"


async def test_an_engine_that_dies_between_load_and_attach_is_replaced_unnoticed() -> None:
    runtimes = iter([FakeRuntime(fails={"attach"}), FakeRuntime()])
    world = World(make_runtime=lambda: next(runtimes))
    async with world.function() as function:
        assert await collect(function) == [3, 4, 5, 6]
        assert len(world.backend.created) == 2


async def test_runtimes_that_are_killed_again_and_again_are_told_of() -> None:
    def short_lived() -> FakeRuntime:
        runtime = FakeRuntime()
        asyncio.get_running_loop().call_later(0.5, runtime.crash)
        return runtime

    world = World(make_runtime=short_lived)
    async with world.function() as function:
        with pytest.raises(ActivationFailed, match="the runtime is gone"):
            await collect(function)
        assert len(world.backend.created) == 2
        with pytest.raises(ActivationFailed, match="possible in 1 s"):
            await collect(function)


async def test_a_runtime_that_does_not_wake_is_replaced_without_the_client_noticing() -> None:
    world = World()
    async with world.function(spec_of(scaling={"idle_timeout": 0})) as function:
        await collect(function)
        await until(function, Tier.PARKED)
        world.runtime.fails.add("wake")
        assert await collect(function) == [3, 4, 5, 6]
        assert len(world.backend.created) == 2


async def test_a_runtime_that_refuses_to_park_serves_on() -> None:
    world = World()
    async with world.function(spec_of(scaling={"idle_timeout": 1})) as function:
        await collect(function)
        world.runtime.fails.add("park")
        await asyncio.sleep(1.5)
        assert await collect(function) == [3, 4, 5, 6]
        world.runtime.fails.clear()
        await until(function, Tier.PARKED)


async def test_waiting_for_a_replica_ends_at_the_queue_timeout() -> None:
    world = World(make_runtime=lambda: FakeRuntime(load_s=1000.0))
    async with world.function(spec_of(queue={"timeout": 5})) as function:
        with pytest.raises(ActivationTimeout, match=r"queue\.timeout, 5 s"):
            await collect(function)
        assert now() == pytest.approx(5.0, abs=0.6)


@pytest.mark.parametrize(("load_s", "is_in_time"), [(1.0, True), (4.0, False)])
async def test_the_queue_timeout_counts_all_waits_and_nothing_between_them(
    load_s: float, *, is_in_time: bool
) -> None:
    runtimes = iter([FakeRuntime(load_s=2.0, step_s=100.0), FakeRuntime(load_s=load_s)])
    world = World(make_runtime=lambda: next(runtimes))
    async with world.function(spec_of(queue={"timeout": 5})) as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(12.0)  # two in the queue and ten in the engine
        (first,) = world.runtimes.values()
        first.crash()
        began = now()
        if is_in_time:
            assert await task == [3, 4, 5, 6]
        else:
            with pytest.raises(ActivationTimeout):
                await task
            assert now() - began == pytest.approx(3.0, abs=0.6)
        await world.node.journal.flush()
    (record,) = (entry.record for entry in world.entries if isinstance(entry, UsageEntry))
    assert record.queue_s == pytest.approx(3.0 if is_in_time else 2.0, abs=0.1)


async def test_the_cold_start_that_replaces_a_lost_replica_is_not_blamed_for_its_work() -> None:
    runtimes = iter([FakeRuntime(step_s=100.0), FakeRuntime()])
    world = World(make_runtime=lambda: next(runtimes))
    async with world.function() as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(10.0)
        (first,) = world.runtimes.values()
        first.crash()
        await task
        await world.node.journal.flush()
    start = [entry for entry in world.entries if isinstance(entry, ColdStart)][-1]
    assert start.total_s == pytest.approx(FakeRuntime().load_s, abs=0.1)


async def test_a_silent_engine_ends_the_wait_for_the_first_token() -> None:
    world = World(make_runtime=lambda: FakeRuntime(is_stuck=True))
    async with world.function(spec_of(timeouts={"first_token": 3})) as function:
        with pytest.raises(FirstTokenTimeout, match=r"timeouts\.first_token"):
            await collect(function)
        await asyncio.sleep(0.1)
        assert function.set.in_flight == 0


async def test_a_stream_that_stalls_is_ended_after_stream_idle() -> None:
    world = World()
    async with (
        world.function(spec_of(timeouts={"stream_idle": 2})) as function,
        function.generate(request(max_tokens=1000)) as generation,
    ):
        await anext(aiter(generation))
        world.runtime.is_stuck = True
        with pytest.raises(RuntimeDied, match=r"timeouts\.stream_idle"):
            await read_on(generation)


async def test_a_full_queue_refuses_and_admits_again_when_it_drains() -> None:
    world = World()
    async with world.function(spec_of(queue={"max_requests": 2})) as function:
        tasks = [asyncio.create_task(collect(function)) for _ in range(2)]
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull) as refused:
            await collect(function)
        assert refused.value.retry_after_s == function.books.eta_s(Tier.STOPPED, 0.0) != 1.0
        await asyncio.gather(*tasks)
        assert await collect(function) == [3, 4, 5, 6]


async def test_a_full_queue_of_a_warm_function_is_worth_asking_again_soon() -> None:
    world = World()
    limits = {"max_replicas": 1, "max_concurrency": 1, "target_concurrency": 1}
    async with world.function(spec_of(queue={"max_requests": 1}, scaling=limits)) as function:
        await collect(function)
        tasks = [asyncio.create_task(collect(function, max_tokens=1000)) for _ in range(2)]
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull) as refused:
            await collect(function)
        assert refused.value.retry_after_s == 1.0
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_on_cold_reject_answers_at_once_and_wakes_for_the_next() -> None:
    world = World()
    async with world.function(spec_of(queue={"on_cold": "reject"})) as function:
        with pytest.raises(ActivationFailed, match="being woken") as refused:
            await collect(function)
        assert refused.value.retry_after_s is not None
        await until(function, Tier.READY)
        assert await collect(function) == [3, 4, 5, 6]


async def test_min_replicas_are_up_before_any_request() -> None:
    world = World()
    async with world.function(spec_of(scaling={"min_replicas": 1, "idle_timeout": 1})) as function:
        await until(function, Tier.READY)
        await asyncio.sleep(100.0)
        assert function.tier is Tier.READY
        with pytest.raises(Conflict, match="keeps 1 replicas ready"):
            await function.park()


async def test_warm_park_and_stop_do_what_they_say() -> None:
    world = World()
    async with world.function() as function:
        await function.warm()
        assert states(function) == {ReplicaState.READY}
        await function.park()
        assert states(function) == {ReplicaState.PARKED}
        await function.warm()
        await function.stop()
        assert not states(function)
        assert not world.backend.machine.runtimes


async def test_parking_by_hand_is_refused_while_requests_run() -> None:
    world = World()
    async with (
        world.function() as function,
        function.generate(request(max_tokens=1000)) as generation,
    ):
        await anext(aiter(generation))
        with pytest.raises(Conflict, match="1 requests"):
            await function.park()


async def test_stopping_waits_for_running_requests_and_takes_new_ones_elsewhere() -> None:
    world = World()
    async with world.function() as function:
        await function.warm()
        running = asyncio.create_task(collect(function, max_tokens=100))
        await asyncio.sleep(0.1)
        stopping = asyncio.create_task(function.stop())
        await asyncio.sleep(0.1)
        assert await collect(function) == [3, 4, 5, 6]
        assert len(await running) == 100
        await stopping
        assert len(world.backend.created) == 2
        assert len(world.backend.deleted) == 1


async def test_a_drain_that_takes_too_long_cuts_requests_off() -> None:
    world = World()
    async with world.function(spec_of(timeouts={"drain": 1})) as function:
        async with function.generate(request(max_tokens=100_000)) as generation:
            await anext(aiter(generation))
            await function.stop()
        assert not world.backend.machine.runtimes


async def test_a_new_revision_serves_on_a_new_replica_and_the_old_one_goes() -> None:
    world = World()
    async with world.function() as function:
        await collect(function)
        changed = spec_of(engine={"block_size": 32})
        function.update(deployment(changed, runtime_hash="new"), world.backend)
        assert await collect(function) == [3, 4, 5, 6]
        await asyncio.sleep(1.0)
        assert [spec.revision for spec in world.backend.created] == ["hash", "new"]
        assert len(world.backend.machine.runtimes) == 1


async def test_damage_that_an_old_revision_finds_is_not_blamed_on_the_new_ones_snapshot() -> None:
    class Redeployed(FakeRuntime):
        """Finds damage in the moment a new revision is deployed."""

        async def work(self, name: str, seconds: float) -> None:
            try:
                await super().work(name, seconds)
            except SnapshotUnusable:
                newer = deployment(spec_of(), runtime_hash="newer")
                function.update(replace(newer, snapshot="newer@0123456789ab"), world.backend)
                raise

    told: list[str] = []
    runtimes = iter([Redeployed(damage="chunk 3"), FakeRuntime()])
    world = World(make_runtime=lambda: next(runtimes))
    async with world.function(
        on_snapshot_unusable=lambda snapshot, _reason: told.append(snapshot)
    ) as function:
        assert await collect(function) == [3, 4, 5, 6]
        assert told == [SNAPSHOT]


async def test_nothing_is_kept_of_a_replica_that_is_gone() -> None:
    use = pb.ProfileUse(key="0123456789abcdef")
    world = World(make_runtime=lambda: FakeRuntime(profile=use))
    async with world.function() as function:
        await collect(function)
        await asyncio.sleep(2.0)  # its profile cannot be written
        await function.stop()
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(0.5)
        function.update(deployment(spec_of(), runtime_hash="newer"), function.backend)
        await task
        (replica,) = function.set.replicas
        parts = (part for part in vars(function).values() if hasattr(part, "__dict__"))
        kept = {
            key
            for part in (function, *parts)
            for value in vars(part).values()
            if isinstance(value, dict | set)
            for key in value
            if isinstance(key, str) and key.startswith(f"{function.name}-")
        }
        assert kept == {replica}


async def test_a_changed_timeout_alone_keeps_the_replica() -> None:
    world = World()
    async with world.function() as function:
        await collect(function)
        function.update(deployment(spec_of(scaling={"idle_timeout": 1})), world.backend)
        await until(function, Tier.PARKED, limit_s=5.0)
        assert len(world.backend.created) == 1


async def test_a_closed_function_finishes_and_leaves_nothing() -> None:
    world = World()
    async with world.function() as function:
        await function.warm()
        running = asyncio.create_task(collect(function, max_tokens=50))
        await asyncio.sleep(0.1)
        function.close()
        with pytest.raises(ModelNotFound):
            await collect(function)
        assert len(await running) == 50
        await asyncio.sleep(1.0)
        assert not world.backend.machine.runtimes


async def test_shutdown_fails_the_queue_lets_streams_end_and_keeps_runtimes() -> None:
    world = World()
    async with world.function() as function:
        await function.warm()
        running = asyncio.create_task(collect(function, max_tokens=50))
        await asyncio.sleep(0.1)
        await function.finish_requests(10.0)
        assert len(await running) == 50
        with pytest.raises(ShuttingDown):
            await collect(function)
    assert len(world.backend.machine.runtimes) == 1


async def test_everybody_who_waited_is_told_where_their_own_wait_went() -> None:
    world = World()
    async with world.function() as function:
        first = asyncio.create_task(ask(function, received_at=now()))
        await asyncio.sleep(0.4)
        second = asyncio.create_task(ask(function, received_at=now() - 0.1))
        reads = []
        for generation, gateway_s in ((await first, 0.0), (await second, 0.1)):
            timeline = {phase.name: phase.seconds for phase in generation.record.timeline}
            reads.append(timeline["read"])
            assert generation.record.first_token_s is not None
            waited_s = generation.record.first_token_s + gateway_s
            assert sum(timeline.values()) == pytest.approx(waited_s)
            assert timeline["gateway"] == pytest.approx(gateway_s)
        assert reads == pytest.approx([1.0, 0.6], abs=0.05), "it came when 0.4 s were over"
        warm = await ask(function, received_at=now())
        assert warm.record.timeline == ()


async def test_who_waits_for_one_more_replica_is_told_where_the_wait_went() -> None:
    world = World(make_runtime=lambda: FakeRuntime(step_s=1.0, load_s=1.0))
    scaling = {"max_replicas": 2, "target_concurrency": 1, "max_concurrency": 1}
    async with world.function(spec_of(scaling=scaling)) as function:
        running = asyncio.create_task(collect(function, max_tokens=60))
        await asyncio.sleep(5.0)
        generation = await ask(function, received_at=now())
        assert generation.record.tier == Tier.READY
        timeline = {phase.name: phase.seconds for phase in generation.record.timeline}
        assert sum(timeline.values()) == pytest.approx(generation.record.first_token_s)
        assert timeline["read"] == pytest.approx(1.0, abs=0.05)
        running.cancel()


async def test_who_comes_when_the_replica_is_up_is_told_of_no_cold_start() -> None:
    world = World(make_runtime=lambda: FakeRuntime(step_s=1.0, load_s=1.0))
    async with world.function() as function:
        first = asyncio.create_task(ask(function, received_at=now()))
        await until(function, Tier.READY)
        second = await ask(function, received_at=now())
        assert (await first).record.timeline
        assert second.record.timeline == (), "though no token had come by then"


async def test_two_functions_take_turns_on_one_gpu() -> None:
    world = World(num_gpus=1)
    scaling = {"idle_timeout": 1, "max_replicas": 1}
    spec = spec_of(resources={"gpus": 1}, scaling=scaling)
    async with (
        world.function(spec) as first,
        world.function(spec.model_copy(update={"name": "other"})) as second,
    ):
        assert await collect(first) == [3, 4, 5, 6]
        waiting = asyncio.create_task(collect(second))
        await asyncio.sleep(0.01)
        assert second.set.num_queued == 1
        assert await waiting == [3, 4, 5, 6], "parking the first has freed the GPU"
        assert first.tier is Tier.PARKED
        assert await collect(first) == [3, 4, 5, 6]


async def test_a_hanging_backend_delete_is_retried_until_the_runtime_is_gone() -> None:
    world = World()
    async with world.function() as function:
        await function.warm()
        world.backend.error = BackendUnavailable("the daemon is away", temporary=True)
        stopping = asyncio.create_task(function.stop())
        await asyncio.sleep(5.0)
        assert not stopping.done()
        world.backend.error = None
        await stopping
        assert not world.backend.machine.runtimes


@pytest.mark.parametrize("seed", range(12))
async def test_nothing_is_lost_in_a_storm_of_requests_crashes_and_reaping(seed: int) -> None:
    chance = random.Random(seed)
    world = World(
        make_runtime=lambda: FakeRuntime(
            load_s=chance.choice([0.1, 1.0]),
            park_s=chance.choice([0.0, 0.3]),
            fails={"load"} if chance.random() < 0.1 else set(),
        )
    )
    scaling = {"idle_timeout": 0.2, "park_timeout": 1, "target_concurrency": 4, "max_replicas": 3}
    answers = {"served": 0, "refused": 0}

    async def client(function: Function, number: int) -> None:
        await asyncio.sleep(chance.uniform(0, 20))
        try:
            async with asyncio.timeout(chance.choice([0.3, 60])):
                tokens = await collect(function, num_prompt=number, max_tokens=8)
            assert tokens == list(range(number, number + 8))
            answers["served"] += 1
        except (ApiError, TimeoutError):
            answers["refused"] += 1

    async def vandal() -> None:
        for _ in range(5):
            await asyncio.sleep(chance.uniform(0, 4))
            alive = [runtime for runtime in world.runtimes.values() if runtime.is_alive]
            if alive:
                chance.choice(alive).crash()

    async with world.function(spec_of(scaling=scaling)) as function:
        await asyncio.gather(*(client(function, number) for number in range(1, 101)), vandal())
        assert answers["served"] + answers["refused"] == 100
        assert answers["served"] > 50
        await asyncio.sleep(0.1)
        assert function.set.in_flight == 0
        assert function.set.num_queued == 0
        await until(function, Tier.STOPPED)
        await asyncio.sleep(1.0)
        assert not world.backend.machine.runtimes
        assert all(not runtime.sequences for runtime in world.runtimes.values() if runtime.is_alive)


async def test_the_ledger_sees_idle_and_active_as_requests_come_and_go() -> None:
    world = World()
    await world.ledger.recover({})
    async with world.function() as function:
        await function.warm()
        async with function.generate(request(max_tokens=1000)) as generation:
            await anext(aiter(generation))
            assert _states(world) == {"active"}
        await asyncio.sleep(0.01)
        assert _states(world) == {"idle"}
        await function.park()
        assert _states(world) == {"parked"}
        await function.stop()
        assert _states(world) == {"unallocated"}


def _states(world: World) -> set[str]:
    timelines = world.ledger._timelines.values()
    return {str(one.state) for line in timelines for one in line.open_intervals}


async def test_a_request_whose_replica_dies_while_its_function_is_deleted_is_told() -> None:
    world = World(make_runtime=lambda: FakeRuntime(step_s=5.0))
    async with world.function() as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(2.0)
        function.close()
        world.runtime.crash()
        async with asyncio.timeout(5.0):
            with pytest.raises(ModelNotFound, match="was deleted"):
                await task


async def test_a_request_whose_replica_dies_while_the_controller_stops_is_told() -> None:
    world = World(make_runtime=lambda: FakeRuntime(step_s=5.0))
    async with world.function() as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(2.0)
        stopping = asyncio.create_task(function.finish_requests(60.0))
        await asyncio.sleep(0.1)
        world.runtime.crash()
        async with asyncio.timeout(5.0):
            with pytest.raises(ShuttingDown):
                await task
            await stopping


async def test_a_deleted_function_says_so_to_a_request_that_comes_late() -> None:
    world = World()
    async with world.function() as function:
        generation = function.generate(request())
        function.close()
        with pytest.raises(ModelNotFound, match="'tiny' was deleted"):
            await generation.__aenter__()


async def test_whoever_still_waits_when_the_owner_ends_is_told() -> None:
    world = World(make_runtime=lambda: FakeRuntime(load_s=1000.0))
    async with world.function() as function:
        task = asyncio.create_task(collect(function))
        await asyncio.sleep(1.0)
    async with asyncio.timeout(5.0):
        with pytest.raises(ShuttingDown):
            await task


async def test_a_defect_in_one_decision_does_not_end_the_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    async with world.function() as function:
        plan, calls = function.set.plan, []

        def fails_once(now: float) -> list[Instruction]:
            calls.append(now)
            if len(calls) == 1:
                raise RuntimeError("a defect")
            return plan(now)

        monkeypatch.setattr(function.set, "plan", fails_once)
        async with asyncio.timeout(10.0):
            assert await collect(function) == [3, 4, 5, 6]


async def test_a_schedule_is_looked_up_at_its_edges_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from controller.scaling import policy

    looked: list[float] = []
    trigger = policy.cron_trigger

    def counted(schedule: ScheduleSpec) -> CronTrigger:
        looked.append(now())
        return trigger(schedule)

    monkeypatch.setattr(policy, "cron_trigger", counted)
    world = World()  # it is Monday, noon, and 0 s by the loop
    schedule = {"cron": "1 12 * * *", "min_replicas": 1, "duration": 60}
    spec = spec_of(schedules=[schedule], scaling={"idle_timeout": 10})
    async with world.function(spec) as function:
        tiers = []
        for seconds in (50.0, 20.0, 70.0):
            await asyncio.sleep(seconds)
            tiers.append(function.tier)
    assert tiers == [Tier.STOPPED, Tier.READY, Tier.PARKED]
    assert len(looked) == 3


async def test_a_delete_that_can_never_succeed_is_left_to_the_sweep() -> None:
    world = World()
    async with world.function() as function:
        await function.warm()
        world.backend.error = BackendError("no such permission")
        async with asyncio.timeout(5.0):
            await function.stop()
        assert not function.set.replicas
        assert world.backend.machine.runtimes


async def test_parking_by_hand_says_when_the_runtime_refuses() -> None:
    world = World()
    async with world.function() as function:
        await function.warm()
        world.runtime.fails.add("park")
        with pytest.raises(Conflict, match="told to refuse park"):
            await function.park()


async def test_parking_by_hand_waits_for_one_that_is_under_way() -> None:
    world = World(make_runtime=lambda: FakeRuntime(park_s=5.0))
    async with world.function() as function:
        await function.warm()
        first = asyncio.create_task(function.park())
        await asyncio.sleep(0.1)
        await function.park()
        assert states(function) == {ReplicaState.PARKED}
        await first


async def test_a_deleted_function_is_not_warmed() -> None:
    world = World()
    async with world.function() as function:
        function.close()
        with pytest.raises(ModelNotFound):
            await function.warm()


async def test_a_log_that_cannot_be_read_hides_no_loss() -> None:
    world = World()

    async def unreadable(
        _runtime_id: str, *, tail: int = 100, follow: bool = False
    ) -> AsyncIterator[str]:
        if tail:
            raise OSError(24, "Too many open files")
        yield ""

    async with world.function() as function:
        await collect(function)
        world.backend.logs = unreadable  # type: ignore[assignment,method-assign]
        world.runtime.crash()
        await asyncio.sleep(1.0)
        assert not function.set.replicas, "it was noticed and removed"


async def test_a_defect_at_the_start_of_an_instruction_loses_only_its_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with World().function() as function:
        with monkeypatch.context() as patch:
            patch.setattr(function.tenancy, "settle", Mock(side_effect=RuntimeError("a defect")))
            with pytest.raises(ActivationFailed, match="a defect"):
                await collect(function)
        await asyncio.sleep(60.0)
        assert not function.set.replicas
        assert await collect(function) == [3, 4, 5, 6]


async def test_a_defect_in_a_removal_is_no_reason_to_keep_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(num_gpus=1)
    async with world.function(spec_of(resources={"gpus": 1})) as function:
        await collect(function)
        defects = iter([OSError("no descriptor"), OSError("no descriptor")])
        delete = world.backend.delete

        async def faulty(runtime_id: str) -> None:
            if defect := next(defects, None):
                raise defect
            await delete(runtime_id)

        monkeypatch.setattr(world.backend, "delete", faulty)
        await function.stop()
        await asyncio.sleep(60.0)
        assert not function.set.replicas
        assert not world.backend.machine.runtimes
        assert not world.node.memory.held("GPU-0")


async def test_a_lost_request_of_a_function_that_may_not_start_is_told_at_once() -> None:
    world = World(make_runtime=lambda: FakeRuntime(step_s=5.0))
    async with world.function() as function:
        await function.warm()
        call = asyncio.create_task(collect(function))
        await asyncio.sleep(1.0)
        function.hold("its snapshot is being built anew")
        began = asyncio.get_running_loop().time()
        world.runtime.crash()
        with pytest.raises(ActivationFailed, match="being built anew"):
            await call
        assert asyncio.get_running_loop().time() - began < 1.0
