import pytest

from runtime.config import EngineConfig
from runtime.engine.batch import ScheduledBatch
from runtime.engine.block_manager import BlockManager
from runtime.engine.scheduler import Scheduler
from runtime.engine.sequence import FinishReason, SamplingParams, StepResult
from tests.runtime.engine.sequences import new_sequence


class Harness:
    """A scheduler whose batches all sample token 7."""

    def __init__(
        self,
        *,
        budget: int = 64,
        max_num_seqs: int = 8,
        num_blocks: int = 32,
        enable_prefix_caching: bool = True,
    ) -> None:
        config = EngineConfig(max_num_batched_tokens=budget, max_num_seqs=max_num_seqs)
        self.blocks = BlockManager(num_blocks, 4, enable_prefix_caching=enable_prefix_caching)
        self.scheduler = Scheduler(config, self.blocks, lambda num_decodes: 1 << 20)

    def step(self) -> tuple[list[tuple[int, int, int]], StepResult]:
        batch = self.scheduler.schedule()
        return shape(batch), self.commit(batch)

    def commit(self, batch: ScheduledBatch) -> StepResult:
        return self.scheduler.commit(batch, [7] * sum(s.is_sampled for s in batch.sequences))


def shape(batch: ScheduledBatch) -> list[tuple[int, int, int]]:
    """Return (sequence id, start, tokens) of a batch."""
    return [(s.key.sequence_id, s.start, s.num_tokens) for s in batch.sequences]


def test_long_prompt_runs_in_chunks_of_the_budget() -> None:
    harness = Harness(budget=8)
    harness.scheduler.add(new_sequence(range(20), id=1))
    assert [harness.step()[0] for _ in range(4)] == [
        [(1, 0, 8)],
        [(1, 8, 8)],
        [(1, 16, 4)],
        [(1, 20, 1)],
    ]


def test_only_the_last_chunk_yields_a_token() -> None:
    harness = Harness(budget=8)
    harness.scheduler.add(new_sequence(range(20), id=1))
    assert [len(harness.step()[1].tokens) for _ in range(4)] == [0, 0, 1, 1]


def test_decodes_go_first_and_prompts_fill_the_budget() -> None:
    harness = Harness(budget=8)
    harness.scheduler.add(new_sequence(range(3), id=1))
    harness.step()
    harness.scheduler.add(new_sequence(range(100, 120), id=2))
    harness.scheduler.add(new_sequence(range(200, 203), id=3))
    assert harness.step()[0] == [(1, 3, 1), (2, 0, 7)]
    assert harness.step()[0] == [(1, 4, 1), (2, 7, 7)]
    assert harness.step()[0] == [(1, 5, 1), (2, 14, 6), (3, 0, 1)]
    assert harness.step()[0] == [(1, 6, 1), (2, 20, 1), (3, 1, 2)]


@pytest.mark.parametrize(("budget", "max_num_seqs"), [(64, 2), (2, 64)])
def test_batch_never_has_more_sequences_than_allowed(budget: int, max_num_seqs: int) -> None:
    harness = Harness(budget=budget, max_num_seqs=max_num_seqs)
    for id in (1, 2, 3):
        harness.scheduler.add(new_sequence([id], id=id))
    harness.step()
    assert harness.scheduler.num_running == 2
    assert harness.scheduler.num_waiting == 1


def test_latest_arrived_sequence_is_preempted_and_comes_back() -> None:
    harness = Harness(num_blocks=4)
    harness.scheduler.add(new_sequence(range(7), max_tokens=16, id=1))
    harness.scheduler.add(new_sequence(range(100, 103), max_tokens=8, id=2))
    assert harness.step()[0] == [(1, 0, 7), (2, 0, 3)]
    assert harness.step()[0] == [(1, 7, 1), (2, 3, 1)]
    assert harness.step()[0] == [(1, 8, 1)], "the fifth block is not there"
    assert harness.scheduler.num_waiting == 1
    assert harness.scheduler.counters.num_preemptions == 1
    finished = []
    while harness.scheduler.has_work():
        finished += harness.step()[1].finished
    assert [(f.key.sequence_id, f.num_output_tokens) for f in finished] == [(1, 9), (2, 5)]
    assert harness.blocks.num_used_blocks == 0


def test_recomputed_sequence_finds_its_own_blocks() -> None:
    harness = Harness(num_blocks=8)
    sequence = new_sequence(range(9), id=1)
    harness.scheduler.add(sequence)
    harness.step()
    harness.scheduler._preempt(sequence)
    assert harness.step()[0] == [(1, 8, 2)]


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    harness = Harness(num_blocks=4)
    harness.scheduler.add(new_sequence(range(8), id=1))
    harness.scheduler.add(new_sequence(range(100, 108), id=2))
    assert harness.step()[0] == [(1, 0, 8)]
    assert harness.scheduler.num_waiting == 1


def test_shared_prefix_is_not_computed_again() -> None:
    harness = Harness()
    harness.scheduler.add(new_sequence(range(10), id=1, max_tokens=11))
    harness.step()
    harness.scheduler.add(new_sequence(range(10), id=2, max_tokens=11))
    batch, result = harness.step()
    assert batch == [(2, 8, 2)]
    assert result.finished[0].num_cached_tokens == 8
    assert harness.scheduler.counters.num_cached_prompt_tokens == 8


def test_cancelled_sequence_frees_its_blocks_at_once_and_is_reported_once() -> None:
    harness = Harness()
    sequence = new_sequence(range(5), id=1)
    harness.scheduler.add(sequence)
    harness.step()
    harness.scheduler.cancel(sequence.key)
    assert harness.blocks.num_used_blocks == 0
    assert harness.scheduler.has_work()
    batch, result = harness.step()
    assert batch == []
    assert [f.reason for f in result.finished] == [FinishReason.CANCELLED]
    assert not harness.scheduler.has_work()


def test_cancelling_what_is_not_live_is_ignored() -> None:
    harness = Harness()
    harness.scheduler.cancel(new_sequence([1]).key)
    assert not harness.scheduler.has_work()


def test_token_of_a_sequence_cancelled_in_flight_is_dropped() -> None:
    harness = Harness()
    sequence = new_sequence(range(5), id=1)
    harness.scheduler.add(sequence)
    batch = harness.scheduler.schedule()
    harness.scheduler.cancel(sequence.key)
    harness.scheduler.add(new_sequence(range(9), id=1))
    result = harness.commit(batch)
    assert result.tokens == []
    assert harness.step()[0] == [(1, 0, 9)], "the new owner of the key starts from scratch"


def test_failed_sequence_leaves_nothing_to_share() -> None:
    harness = Harness()
    sequence = new_sequence(range(9), id=1)
    harness.scheduler.add(sequence)
    harness.step()
    harness.scheduler.fail(sequence, "broken")
    assert harness.blocks.num_cached_blocks == 0
    [finished] = harness.step()[1].finished
    assert (finished.reason, finished.error) == (FinishReason.ERROR, "broken")


def test_a_fault_or_refusal_of_an_ended_sequence_spares_the_new_owner_of_its_key() -> None:
    harness = Harness()
    old = new_sequence(range(9), id=1)
    harness.scheduler.add(old)
    batch = harness.scheduler.schedule()
    harness.scheduler.cancel(old.key)
    harness.scheduler.add(new_sequence(range(9), id=1))
    harness.scheduler.fail(batch.sequences[0], "broken")
    harness.scheduler.refuse(batch.sequences[0], "no token is left")
    assert not harness.scheduler.is_live(batch.sequences[0])
    [finished] = harness.commit(batch).finished
    assert finished.reason is FinishReason.CANCELLED
    assert harness.scheduler.live_keys() == [old.key]


def test_next_step_can_be_scheduled_before_the_last_is_committed() -> None:
    harness = Harness()
    harness.scheduler.add(new_sequence(range(3), id=1, max_tokens=5))
    first = harness.scheduler.schedule()
    second = harness.scheduler.schedule()
    [item] = second.sequences
    assert (item.start, item.token_ids, item.num_pending_tokens) == (3, (), 1)
    assert harness.scheduler.schedule().sequences == (), "both tokens it may have are under way"
    assert harness.commit(first).finished == []
    [finished] = harness.commit(second).finished
    assert finished.reason is FinishReason.LENGTH


def test_sequence_that_stops_while_its_next_step_runs_ends_once() -> None:
    harness = Harness()
    sequence = new_sequence(range(3), id=1)
    sequence.stop_token_ids = frozenset({7})
    harness.scheduler.add(sequence)
    first, second = harness.scheduler.schedule(), harness.scheduler.schedule()
    assert [f.reason for f in harness.commit(first).finished] == [FinishReason.STOP]
    assert harness.commit(second) == StepResult(tokens=[], finished=[])


def test_sequence_preempted_in_flight_keeps_its_token_and_publishes_nothing() -> None:
    harness = Harness()
    sequence = new_sequence(range(8), id=1)
    harness.scheduler.add(sequence)
    batch = harness.scheduler.schedule()
    harness.scheduler._preempt(sequence)
    assert harness.scheduler.schedule().sequences == (), "its last token is not known yet"
    assert harness.commit(batch).tokens == [(sequence.key, 7)]
    assert harness.blocks.num_cached_blocks == 0
    assert harness.step()[0] == [(1, 0, 9)]


def test_prompt_beside_many_decodes_still_gets_its_share() -> None:
    config = EngineConfig(max_num_batched_tokens=24, max_num_seqs=16)
    blocks = BlockManager(64, 16, enable_prefix_caching=False)
    budgets: list[int] = []

    def max_prefill_tokens(num_decodes: int) -> int:
        budgets.append(num_decodes)
        return 8 if num_decodes else 20

    scheduler = Scheduler(config, blocks, max_prefill_tokens)
    for _ in range(15):
        scheduler.add(new_sequence([1]))
    scheduler.commit(scheduler.schedule(), [1] * 15)
    scheduler.add(new_sequence([2] * 40))
    batch = scheduler.schedule()
    assert [item.num_tokens for item in batch.sequences] == [*[1] * 15, 8]
    assert budgets == [0, 15]


def test_lower_priorities_start_first_and_are_preempted_last() -> None:
    harness = Harness(num_blocks=4, max_num_seqs=2)
    harness.scheduler.add(new_sequence([1], max_tokens=16, id=1, priority=5))
    harness.scheduler.add(new_sequence([2], max_tokens=16, id=2, priority=5))
    harness.scheduler.add(new_sequence([3], max_tokens=16, id=3, priority=-1))
    harness.scheduler.add(new_sequence([4], max_tokens=16, id=4))
    assert harness.step()[0] == [(3, 0, 1), (4, 0, 1)]
    seen = [{id for id, *_ in harness.step()[0]} for _ in range(60)]
    first_seen = {id: next(i for i, ids in enumerate(seen) if id in ids) for id in (1, 2)}
    assert first_seen[1] <= first_seen[2]
    last_seen = [max(i for i, ids in enumerate(seen) if id in ids) for id in (3, 4, 1, 2)]
    assert last_seen == sorted(last_seen)
    assert harness.scheduler.counters.num_preemptions > 0


def test_a_lower_priority_that_came_later_takes_the_earlier_ones_blocks() -> None:
    harness = Harness(num_blocks=4)
    harness.scheduler.add(new_sequence(range(3), max_tokens=16, id=1, priority=3))
    harness.step()
    harness.scheduler.add(new_sequence(range(50, 53), max_tokens=16, id=2, priority=1))
    seen = [{id for id, *_ in harness.step()[0]} for _ in range(14)]
    assert seen[0] == {1, 2}
    assert {1} not in seen[: seen.index({2})]
    assert harness.scheduler.counters.num_preemptions == 1


def test_equal_prompts_wait_for_the_blocks_of_the_first() -> None:
    harness = Harness(budget=12)
    for id in (1, 2, 3):
        harness.scheduler.add(new_sequence(range(18), id=id, max_tokens=20))
    assert [harness.step()[0] for _ in range(3)] == [
        [(1, 0, 12)],
        [(1, 12, 6)],
        [(1, 18, 1), (2, 16, 2), (3, 16, 2)],
    ]


def test_what_a_step_in_flight_computes_is_waited_for() -> None:
    harness = Harness()
    for id in (1, 2):
        harness.scheduler.add(new_sequence(range(10), id=id))
    first, second = harness.scheduler.schedule(), harness.scheduler.schedule()
    assert (shape(first), shape(second)) == ([(1, 0, 10)], [(1, 10, 1)])
    harness.commit(first)
    assert shape(harness.scheduler.schedule()) == [(1, 11, 1), (2, 8, 2)]


def test_only_what_can_be_shared_is_waited_for() -> None:
    harness = Harness()
    harness.scheduler.add(new_sequence(range(9), id=1))
    harness.scheduler.add(new_sequence(range(9), id=2, cache_salt="a"))
    whole = new_sequence(range(9), id=3)
    whole.sampling = SamplingParams(num_prompt_logprobs=0)
    harness.scheduler.add(whole)
    harness.scheduler.add(new_sequence(range(4), id=4))
    harness.scheduler.add(new_sequence(range(1, 9), id=5))
    assert [id for id, *_ in harness.step()[0]] == [1, 2, 3, 4, 5]


def test_without_a_prefix_cache_nobody_waits_for_equal_prompts() -> None:
    harness = Harness(enable_prefix_caching=False)
    for id in (1, 2):
        harness.scheduler.add(new_sequence(range(9), id=id))
    assert harness.step()[0] == [(1, 0, 9), (2, 0, 9)]


@pytest.mark.parametrize("is_fault", [True, False])
def test_who_waits_for_a_sequence_that_ends_goes_on(*, is_fault: bool) -> None:
    harness = Harness()
    first = new_sequence(range(9), id=1)
    harness.scheduler.add(first)
    harness.scheduler.add(new_sequence(range(9), id=2))
    batch = harness.scheduler.schedule()
    if is_fault:
        harness.scheduler.fail(first, "broken")
    else:
        harness.scheduler.cancel(first.key)
    assert shape(batch) == [(1, 0, 9)]
    assert shape(harness.scheduler.schedule()) == [(2, 0, 9)]


def test_who_waits_for_a_preempted_sequence_waits_for_it_again() -> None:
    harness = Harness(budget=8)
    first = new_sequence(range(11), id=1, max_tokens=12)
    harness.scheduler.add(first)
    harness.scheduler.add(new_sequence(range(11), id=2, max_tokens=12))
    batch = harness.scheduler.schedule()
    harness.scheduler._preempt(first)
    again = harness.scheduler.schedule()
    assert shape(batch) == shape(again) == [(1, 0, 8)]
    harness.commit(batch)
    harness.commit(again)
    assert harness.step()[0] == [(1, 8, 3), (2, 8, 3)]


def test_others_pass_whoever_waits_for_blocks_but_leave_it_its_place() -> None:
    harness = Harness(max_num_seqs=3)
    prompts = [range(9), range(9), range(50, 53), range(60, 63)]
    for id, prompt in enumerate(prompts, start=1):
        harness.scheduler.add(new_sequence(prompt, id=id))
    assert harness.step()[0] == [(1, 0, 9), (3, 0, 3)]
    assert harness.step()[0] == [(1, 9, 1), (3, 3, 1), (2, 8, 1)]


def test_others_leave_whoever_waits_for_blocks_those_it_needs() -> None:
    harness = Harness(num_blocks=6)
    for id, prompt in enumerate([range(9), range(9), range(50, 53)], start=1):
        harness.scheduler.add(new_sequence(prompt, id=id))
    assert harness.step()[0] == [(1, 0, 9)]
    assert harness.step()[0] == [(1, 9, 1), (2, 8, 1)]


def test_nobody_waits_for_a_sequence_that_goes_after_it() -> None:
    harness = Harness(budget=4)
    harness.scheduler.add(new_sequence(range(9), id=1, priority=3))
    harness.scheduler.schedule()
    harness.scheduler.add(new_sequence(range(9), id=2, priority=1))
    harness.scheduler._max_num_batched_tokens = 64
    assert shape(harness.scheduler.schedule()) == [(1, 4, 5), (2, 0, 9)]
