"""Batches from their input to their outputs, over restarts, failures and deadlines."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.batches.lines import BatchInput
from controller.batches.run import BatchRun
from controller.errors import Conflict, InvalidRequest, NotFound
from controller.store.batches import StoredBatch
from controller.store.errors import DatabaseUnavailable
from controller.store.files import Files
from tests.fakes.batches import CHAT, DAY_S, BatchWorld, request_line


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[BatchWorld]:
    world = BatchWorld(tmp_path)
    yield world
    await world.close()


def custom_ids(answers: list[dict[str, Any]]) -> list[str]:
    return sorted(answer["custom_id"] for answer in answers)


async def test_every_request_is_answered_once(world: BatchWorld) -> None:
    contents = [f"q{number}" for number in range(40)]
    made = await world.create(contents)
    assert made.status == "validating"
    batch = await world.ended(made.id)
    assert batch.status == "completed"
    assert (batch.num_total, batch.num_completed, batch.num_failed) == (40, 40, 0)
    assert (batch.model, batch.error_file_id) == ("tiny", None)
    assert batch.metadata_ == {"for": "tests"}
    assert list(batch.moments) == ["completed", "finalizing", "in_progress"]
    answers = world.answers(batch.output_file_id)
    assert custom_ids(answers) == sorted(contents)
    for answer in answers:
        assert set(answer) == {"id", "custom_id", "response", "error"}
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"] == {"echo": answer["custom_id"]}
    assert len({answer["id"] for answer in answers}) == 40
    assert {call.path for call in world.caller.calls} == {CHAT}
    assert not any(call.may_wake for call in world.caller.calls)
    output = await world.files.get(str(batch.output_file_id), key_id=None)
    assert (output.purpose, output.num_bytes > 0) == ("batch_output", True)


async def test_refused_requests_are_in_the_error_file(world: BatchWorld) -> None:
    world.caller.script = lambda content: 400 if content == "bad" else 200
    made = await world.create(["good", "bad"])
    batch = await world.ended(made.id)
    assert batch.status == "completed"
    assert (batch.num_completed, batch.num_failed) == (1, 1)
    (failed,) = world.answers(batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("bad", 400)


async def test_input_is_checked_as_a_whole_before_anything_runs(world: BatchWorld) -> None:
    file_id = await world.upload([request_line("a"), request_line("b", url="/v1/other")])
    made = await world.service.create(
        key_id=None,
        endpoint=CHAT,
        input_file_id=file_id,
        completion_window="24h",
        window_s=DAY_S,
        metadata=None,
    )
    batch = await world.ended(made.id)
    assert batch.status == "failed"
    assert [(error["line"], error["code"]) for error in batch.errors] == [(2, "invalid_url")]
    assert world.caller.calls == []


async def test_unknown_model_fails_the_batch(world: BatchWorld) -> None:
    world.function.served_names = ("other",)
    batch = await world.ended((await world.create(["a"])).id)
    assert [error["code"] for error in batch.errors] == ["model_not_found"]


async def test_cold_function_is_woken_only_in_time_for_the_deadline(world: BatchWorld) -> None:
    world.function.tier = "parked"
    made = await world.create(["a", "b"], window_s=DAY_S)
    await world.rest()
    assert world.caller.calls == []
    world.clock.advance(DAY_S - 3600)
    await world.rest()
    assert world.caller.calls == []
    world.clock.advance(3600 - 590)
    batch = await world.ended(made.id)
    assert batch.status == "completed"
    assert all(call.may_wake for call in world.caller.calls)


async def test_function_that_comes_up_for_others_serves_the_batch_too(world: BatchWorld) -> None:
    world.function.tier = "stopped"
    made = await world.create(["a", "b"])
    await world.rest()
    world.function.tier = "ready"
    assert (await world.ended(made.id)).status == "completed"
    assert not any(call.may_wake for call in world.caller.calls)


async def test_no_more_run_at_once_than_a_replica_should_carry(world: BatchWorld) -> None:
    target = world.function.spec.scaling.target_concurrency
    made = await world.create([f"q{number}" for number in range(3 * target)])
    other = await world.create([f"r{number}" for number in range(3 * target)])
    await world.ended(made.id)
    await world.ended(other.id)
    assert 1 < world.caller.most_running <= target


async def test_passing_failures_are_asked_again_and_answered_once(world: BatchWorld) -> None:
    left = Counter({"a": 1, "b": 3})

    def script(content: str) -> int:
        left[content] -= 1
        return 503 if left[content] >= 0 else 200

    world.caller.script = script
    batch = await world.ended((await world.create(["a", "b", "c"])).id, step_s=1.0)
    assert (batch.status, batch.num_completed) == ("completed", 3)
    assert custom_ids(world.answers(batch.output_file_id)) == ["a", "b", "c"]
    assert world.caller.asked == {"a": 2, "b": 4, "c": 1}


async def test_request_that_kills_replicas_is_given_up(world: BatchWorld) -> None:
    world.caller.script = lambda content: 502 if content == "poison" else 200
    batch = await world.ended((await world.create(["a", "poison"])).id, step_s=1.0)
    assert world.caller.asked["poison"] == 3
    (failed,) = world.answers(batch.error_file_id)
    assert failed["response"]["status_code"] == 502


async def test_request_that_cannot_be_read_ends_no_other(
    world: BatchWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = BatchInput.body

    def failing(self: BatchInput, index: int) -> bytes:
        if index == 1:
            raise OSError("bad sector")
        return real(self, index)

    monkeypatch.setattr(BatchInput, "body", failing)
    batch = await world.ended((await world.create(["a", "b", "c"])).id, step_s=1.0)
    assert (batch.status, batch.num_completed) == ("completed", 2)
    (failed,) = world.answers(batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("b", 500)


async def test_what_is_left_at_the_deadline_is_told_so(world: BatchWorld) -> None:
    never = asyncio.Event()
    world.caller.script = lambda content: never if content == "slow" else 200
    made = await world.create(["fast", "slow"], window_s=100)
    await world.until(made.id, lambda batch: batch.num_completed == 1)
    world.clock.advance(100)
    batch = await world.ended(made.id)
    assert batch.status == "expired"
    assert (batch.num_completed, batch.num_failed) == (1, 1)
    (failed,) = world.answers(batch.error_file_id)
    assert (failed["custom_id"], failed["response"]) == ("slow", None)
    assert failed["error"]["code"] == "batch_expired"
    assert world.caller.num_running == 0


async def test_cancelled_batch_keeps_its_answers(world: BatchWorld) -> None:
    never = asyncio.Event()
    world.caller.script = lambda content: never if content == "slow" else 200
    made = await world.create(["fast", "slow"])
    await world.until(made.id, lambda batch: batch.num_completed == 1)
    assert (await world.service.cancel(made.id, key_id=None)).status == "cancelling"
    batch = await world.ended(made.id)
    assert batch.status == "cancelled"
    assert custom_ids(world.answers(batch.output_file_id)) == ["fast"]
    assert batch.error_file_id is None
    assert world.caller.num_running == 0
    with pytest.raises(Conflict, match="cancelled"):
        await world.service.cancel(made.id, key_id=None)


async def test_deleted_function_may_come_back_in_time(world: BatchWorld) -> None:
    world.function.tier = "parked"
    made = await world.create(["a"])
    await world.until(made.id, lambda batch: batch.status == "in_progress")
    world.registry.functions = ()
    world.clock.advance(DAY_S - 60)
    await world.rest()
    await world.restart()
    await world.rest()
    world.registry.functions = (world.function,)
    assert (await world.ended(made.id)).status == "completed"


@pytest.mark.parametrize("seed", range(6))
async def test_restarts_lose_nothing_and_answer_nothing_twice(world: BatchWorld, seed: int) -> None:
    dice = random.Random(seed)
    contents = [f"q{number}" for number in range(60)]
    world.caller.script = lambda content: dice.choice([200, 200, 200, 503, 400])
    made = await world.create(contents)
    for _ in range(8):
        for _ in range(dice.randrange(12)):
            world.clock.advance(0.5)
            await world.service.look()
            await asyncio.sleep(dice.random() * 0.01)
        await world.restart()
    batch = await world.ended(made.id, step_s=5.0)
    assert batch.status == "completed"
    answered = custom_ids(world.answers(batch.output_file_id))
    refused = custom_ids(world.answers(batch.error_file_id))
    assert sorted(answered + refused) == sorted(contents)
    assert (batch.num_completed, batch.num_failed) == (len(answered), len(refused))
    assert batch.num_total == 60


@pytest.mark.parametrize("stop_after", range(5))
async def test_restart_while_the_outputs_are_put_together(
    world: BatchWorld, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """Die at each of the writes of the end: nothing is lost and no file is there twice."""
    world.caller.script = lambda content: 400 if content == "bad" else 200
    real = BatchRun._persistently
    left = stop_after

    async def dying(self: BatchRun, work: Any) -> None:
        nonlocal left
        if self.batch.status in ("finalizing", "completed"):
            if left == 0:
                await asyncio.Event().wait()
            left -= 1
        await real(self, work)

    monkeypatch.setattr(BatchRun, "_persistently", dying)
    made = await world.create(["good", "bad"])
    await world.until(made.id, lambda batch: batch.status == "finalizing" or left == 0)
    await world.rest()
    monkeypatch.setattr(BatchRun, "_persistently", real)
    await world.restart()
    batch = await world.ended(made.id)
    assert custom_ids(world.answers(batch.output_file_id)) == ["good"]
    assert custom_ids(world.answers(batch.error_file_id)) == ["bad"]
    assert world.caller.asked == {"good": 1, "bad": 1}
    outputs = await world.files.list(
        key_id=None, purpose="batch_output", after=None, limit=9, is_ascending=True
    )
    assert {file.id for file in outputs} == {batch.output_file_id, batch.error_file_id}


async def test_database_that_is_away_is_waited_for(
    world: BatchWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.batches.run.STORE_PAUSE_S", 0.01)
    real, left = world.database.run, 4

    async def sometimes(work: Any, *args: Any) -> Any:
        nonlocal left
        if left and world.caller.calls:
            left -= 1
            raise DatabaseUnavailable("away")
        return await real(work, *args)

    made = await world.create(["a"])
    monkeypatch.setattr(world.database, "run", sometimes)
    assert (await world.ended(made.id)).status == "completed"
    assert left == 0


async def test_interrupted_work_is_taken_up_again(
    world: BatchWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.batches.service.RETRY_S", 0.01)
    real, left = BatchRun._finalize, 2

    async def failing(self: BatchRun) -> None:
        nonlocal left
        if left:
            left -= 1
            raise OSError("No space left on device")
        await real(self)

    monkeypatch.setattr(BatchRun, "_finalize", failing)
    batch = await world.ended((await world.create(["a", "b"])).id)
    assert (batch.status, world.caller.asked) == ("completed", {"a": 1, "b": 1})


async def test_input_in_use_is_kept(world: BatchWorld) -> None:
    world.function.tier = "parked"
    made = await world.create(["a"])
    with pytest.raises(Conflict, match=made.id):
        world.service.check_unused(made.input_file_id)
    await world.service.cancel(made.id, key_id=None)
    await world.ended(made.id)
    world.service.check_unused(made.input_file_id)


async def test_batches_are_their_keys_own(world: BatchWorld) -> None:
    mine = await world.create(["a"], key_id="mine")
    for call in (
        world.service.get(mine.id, key_id="other"),
        world.service.cancel(mine.id, key_id="other"),
        world.service.get(mine.id, key_id=None),
    ):
        with pytest.raises(NotFound):
            await call
    assert await world.service.list(key_id="other", after=None, limit=9) == []
    await world.service.list(key_id="mine", after=None, limit=9)
    with pytest.raises(NotFound):
        await world.service.create(
            key_id="other",
            endpoint=CHAT,
            input_file_id=mine.input_file_id,
            completion_window="24h",
            window_s=1,
            metadata=None,
        )


async def test_output_is_no_input(world: BatchWorld) -> None:
    batch: StoredBatch = await world.ended((await world.create(["a"])).id)
    with pytest.raises(InvalidRequest, match="purpose"):
        await world.service.create(
            key_id=None,
            endpoint=CHAT,
            input_file_id=str(batch.output_file_id),
            completion_window="24h",
            window_s=1,
            metadata=None,
        )


async def test_ended_batches_are_forgotten_in_the_end(world: BatchWorld) -> None:
    old = await world.ended((await world.create(["a"])).id)
    world.function.tier = "parked"
    live = await world.create(["b"], window_s=400 * DAY_S)
    world.clock.advance(100 * DAY_S)
    await world.service.prune(90)
    listed = await world.service.list(key_id=None, after=None, limit=9)
    assert [batch.id for batch in listed] == [live.id]
    assert world.answers(old.output_file_id) != []


async def test_waiting_batch_holds_nothing_open(world: BatchWorld) -> None:
    world.function.tier = "parked"
    made = await world.create([f"q{number}" for number in range(5)])
    await world.until(made.id, lambda batch: batch.status == "in_progress")
    assert not world.files.spool_path(f"{made.id}.output").exists(), "not even begun"
    gate = asyncio.Event()
    world.caller.script = lambda content: gate if content == "q4" else 200
    world.function.tier = "ready"
    await world.until(made.id, lambda batch: batch.num_completed == 4)
    world.function.tier = "parked"
    world.caller.script = lambda content: 503
    await world.service.stop()
    await world.restart()
    assert num_open(world) == 0
    world.caller.script = lambda content: 200
    world.function.tier = "ready"
    world.clock.advance(60)
    assert (await world.ended(made.id, step_s=1.0)).status == "completed"


async def test_batch_that_runs_no_more_closes_its_files(world: BatchWorld) -> None:
    made = await world.create(["a", "b"])
    world.caller.script = lambda content: 200 if content == "a" else 503
    await world.until(made.id, lambda batch: batch.num_completed == 1)
    assert num_open(world) == 2
    world.function.tier = "parked"
    for _ in range(30):
        world.clock.advance(10)
        await world.rest()
        if num_open(world) == 0:
            break
    assert num_open(world) == 0
    world.caller.script = lambda content: 200
    world.function.tier = "ready"
    assert (await world.ended(made.id, step_s=1.0)).status == "completed"
    assert world.caller.asked["a"] == 1


async def test_input_in_use_outlives_its_expiry(world: BatchWorld) -> None:
    world.function.tier = "parked"
    made = await world.create(["a"])
    await world.until(made.id, lambda batch: batch.status == "in_progress")
    file = await world.files.get(made.input_file_id, key_id=None)
    await world.database.run(lambda c: Files(c).delete(file.id))
    await world.database.run(lambda c: Files(c).add(replace(file, expires_us=1)))
    await world.files.sweep(world.service.is_used)
    world.function.tier = "ready"
    assert (await world.ended(made.id)).status == "completed"
    await world.files.sweep(world.service.is_used)
    assert not world.files.path(made.input_file_id).exists()


def num_open(world: BatchWorld) -> int:
    """Return how many files of batches this process has open."""
    spool = str(world.files.spool_path(""))
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(path.readlink()))
    return sum(link.startswith(spool) for link in links)
