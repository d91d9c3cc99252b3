"""Random submits, cancels and steps: no block is lost, and no answer is wrong."""

from collections import defaultdict
from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.config import EngineConfig
from runtime.engine.batch import ScheduledBatch
from runtime.engine.block_manager import BlockManager
from runtime.engine.scheduler import Scheduler
from runtime.engine.sequence import FinishReason, Sequence
from tests.fakes.token_runner import TokenRunner, answer
from tests.runtime.engine.sequences import new_sequence

NUM_BLOCKS = 8
BLOCK_SIZE = 2
VOCAB_SIZE = 7
MAX_IN_FLIGHT = 2


class EngineMachine(RuleBasedStateMachine):
    """Scheduler and block manager over a runner that sees every wrong block.

    Few blocks, few tokens and short blocks: preemption, sharing and eviction are the rule.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=True)
        config = EngineConfig(max_num_batched_tokens=8, max_num_seqs=4)
        self.scheduler = Scheduler(config, self.blocks, lambda num_decodes: 1 << 20)
        self.runner = TokenRunner(
            num_kv_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE
        )
        self.sequences: list[Sequence] = []
        self.prompts: dict[int, list[int]] = {}
        self.tokens: defaultdict[int, list[int]] = defaultdict(list)
        self.ends: dict[int, FinishReason] = {}
        self.in_flight: list[tuple[ScheduledBatch, list[int]]] = []

    @rule(
        family=st.integers(0, 2),
        num_shared_tokens=st.integers(0, 4),
        own_tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3),
        num_output_tokens=st.integers(1, 9),
    )
    def submit(
        self, family: int, num_shared_tokens: int, own_tokens: list[int], num_output_tokens: int
    ) -> None:
        prompt = [family] * num_shared_tokens + own_tokens
        sequence = new_sequence(prompt, max_tokens=len(prompt) + num_output_tokens)
        self.sequences.append(sequence)
        self.prompts[sequence.number] = prompt
        self.scheduler.add(sequence)

    @precondition(lambda self: len(self.in_flight) < MAX_IN_FLIGHT)
    @rule()
    def start_step(self) -> None:
        running = set(self.scheduler._running)
        batch = self.scheduler.schedule()
        admitted = [s.number for key, s in self.scheduler._running.items() if key not in running]
        for sequence in self.scheduler._waiting.values():
            if sequence.number < max(admitted, default=0):
                assert self.scheduler._is_held_back(sequence), "else nobody is passed over"
        if batch.sequences:
            self.in_flight.append((batch, list(self.runner.launch(batch).wait().token_ids)))

    @precondition(lambda self: self.in_flight)
    @rule()
    def end_step(self) -> None:
        batch, token_ids = self.in_flight.pop(0)
        result = self.scheduler.commit(batch, token_ids)
        for key, token_id in result.tokens:
            self.tokens[key.sequence_id].append(token_id)
        for finished in result.finished:
            assert finished.key.sequence_id not in self.ends, "reported once"
            self.ends[finished.key.sequence_id] = finished.reason

    @rule(num_steps=st.integers(1, 8))
    def run_pipelined(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if len(self.in_flight) < MAX_IN_FLIGHT:
                self.start_step()
            if len(self.in_flight) == MAX_IN_FLIGHT:
                self.end_step()

    @precondition(lambda self: self.scheduler.live_keys())
    @rule(data=st.data(), is_fault=st.booleans())
    def end_early(self, data: st.DataObject, is_fault: bool) -> None:
        key = data.draw(st.sampled_from(self.scheduler.live_keys()))
        if is_fault:
            live = next(one for one in reversed(self.sequences) if one.key == key)
            self.scheduler.fail(live, "broken")
        else:
            self.scheduler.cancel(key)

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        blocks = self.blocks
        total = blocks.num_free_blocks + blocks.num_used_blocks + blocks.num_cached_blocks
        assert total == NUM_BLOCKS
        used = _distinct(sequence.block_ids for sequence in self.sequences)
        free, cached = set(blocks._free), set(blocks._cached)
        assert not free & cached
        assert not used & (free | cached)
        assert used | free | cached == set(range(NUM_BLOCKS))

    @invariant()
    def only_shared_prefixes_are_in_two_tables(self) -> None:
        tables: defaultdict[int, list[tuple[int, Sequence]]] = defaultdict(list)
        for sequence in self.sequences:
            assert len(set(sequence.block_ids)) == len(sequence.block_ids)
            for index, block_id in enumerate(sequence.block_ids):
                tables[block_id].append((index, sequence))
        for block_id, holders in tables.items():
            assert self.blocks._num_references[block_id] == len(holders)
            prefixes = {
                tuple(sequence.token_ids[: (index + 1) * BLOCK_SIZE]) for index, sequence in holders
            }
            assert len(prefixes) == 1, "equal content"
            if len(holders) > 1:
                assert all(index < s.num_published_blocks for index, s in holders)

    @invariant()
    def queues_are_by_arrival(self) -> None:
        for group in (self.scheduler._running, self.scheduler._waiting):
            numbers = [sequence.number for sequence in group.values()]
            assert numbers == sorted(numbers)

    def teardown(self) -> None:
        num_steps_left = 100 * (1 + len(self.sequences))
        while self.scheduler.has_work() or self.in_flight:
            num_steps_left -= 1
            assert num_steps_left > 0, "no progress"
            if len(self.in_flight) < MAX_IN_FLIGHT:
                self.start_step()
            if not self.in_flight:  # only ends to report
                self.in_flight.append((ScheduledBatch(sequences=()), []))
            self.end_step()
            self.every_block_is_in_one_place()
        assert self.blocks.num_used_blocks == 0
        for sequence in self.sequences:
            self._check_answer(sequence)

    def _check_answer(self, sequence: Sequence) -> None:
        id = sequence.key.sequence_id
        prompt = self.prompts[sequence.number]
        expected = answer(prompt, sequence.max_tokens - len(prompt), VOCAB_SIZE)
        if self.ends[id] is FinishReason.LENGTH:
            assert self.tokens[id] == expected
        else:
            assert self.tokens[id] == expected[: len(self.tokens[id])]


def _distinct(tables: Iterable[list[int]]) -> set[int]:
    return {block_id for table in tables for block_id in table}


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=100, stateful_step_count=40)
