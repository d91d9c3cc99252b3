"""Picks the next batch under a token budget and the blocks there are. No torch.

Continuous batching (Orca, section 3) with chunked prefill (Sarathi-Serve, section 4): every step
first takes one token of each sequence that decodes, then fills the budget with pieces of
prompts. When blocks run out, the latest arrived sequence gives up its own and is recomputed
later, mostly from the prefix cache. A prompt that begins like one that is being computed waits,
so that choices of one request compute their prompt once.

A step is `schedule` -> run the batch -> `commit`. `schedule` may be called again before the
commit, so that a runner can prepare step N + 1 while step N runs; commits come in order.
"""

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import islice

from runtime.config import EngineConfig
from runtime.engine.batch import ScheduledBatch, ScheduledSequence
from runtime.engine.block_manager import BlockManager
from runtime.engine.sequence import (
    FinishedSequence,
    FinishReason,
    Sequence,
    SequenceKey,
    StepResult,
)


@dataclass(slots=True, kw_only=True)
class SchedulerCounters:
    """What has happened since the start; only ever grows."""

    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_steps: int = 0


class Scheduler:
    """Owns the live sequences: running ones hold blocks, waiting ones none, both by rank.

    Args:
        config: Token budget and size of a batch.
        blocks: Where sequences keep their keys and values.
        max_prefill_tokens: How many tokens of prompts to run beside a number of decodes; within
            the budget.
    """

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        max_prefill_tokens: Callable[[int], int],
    ) -> None:
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._max_prefill_tokens = max_prefill_tokens
        self._blocks = blocks
        self._waiting: OrderedDict[SequenceKey, Sequence] = OrderedDict()
        self._running: OrderedDict[SequenceKey, Sequence] = OrderedDict()
        self._finished: list[FinishedSequence] = []
        self._retired: list[int] = []
        self.counters = SchedulerCounters()

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with blocks."""
        return len(self._running)

    def has_work(self) -> bool:
        """Return whether a step would compute or report anything."""
        return bool(self._running or self._waiting or self._finished)

    def live_keys(self) -> list[SequenceKey]:
        """Return the keys of all live sequences."""
        return [*self._running, *self._waiting]

    def is_live(self, item: ScheduledSequence) -> bool:
        """Return whether a scheduled sequence has not ended since."""
        return self._find_same(item) is not None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that could fit the KV cache, alone if need be."""
        _insert(self._waiting, sequence)

    def cancel(self, key: SequenceKey) -> None:
        """End a sequence and free its blocks now; the next commit reports it."""
        sequence = self._find(key)
        if sequence is not None:
            self._finish(sequence, FinishReason.CANCELLED)

    def fail(self, item: Sequence | ScheduledSequence, error: str) -> None:
        """End a sequence whose content cannot be trusted; the next commit reports it."""
        sequence = self._find_same(item)
        if sequence is not None:
            self._blocks.release(sequence, keep_content=False)
            self._finish(sequence, FinishReason.ERROR, error)

    def refuse(self, item: Sequence | ScheduledSequence, error: str) -> None:
        """End a sequence that asks for what cannot be; the next commit reports it."""
        sequence = self._find_same(item)
        if sequence is not None:
            self._finish(sequence, FinishReason.REFUSED, error)

    def replace_blocks(self, blocks: BlockManager) -> None:
        """Start over with another KV cache; nothing may be live."""
        assert not self._running, "running sequences would lose their blocks"
        self._blocks = blocks

    def schedule(self) -> ScheduledBatch:
        """Return the next batch; empty when nothing can run before a commit."""
        num_preemptions = self.counters.num_preemptions
        batch = self._schedule_decodes()
        budget = self._max_num_batched_tokens - len(batch)
        budget = min(budget, self._max_prefill_tokens(len(batch)))
        for sequence in self._running.values():
            if budget > 0 and sequence.num_uncomputed_tokens > 1:
                batch.append(self._advance(sequence, budget))
                budget -= batch[-1].num_tokens
        held_back: list[Sequence] = []
        # Whoever was preempted just now would take back the blocks it gave up.
        while budget > 0 and num_preemptions == self.counters.num_preemptions:
            admitted = self._admit(held_back)
            if admitted is None:
                break
            batch.append(self._advance(admitted, budget))
            budget -= batch[-1].num_tokens
        if not batch:
            return ScheduledBatch(sequences=())
        self.counters.num_steps += 1
        retired, self._retired = self._retired, []
        return ScheduledBatch(sequences=tuple(batch), retired=tuple(retired))

    def commit(self, batch: ScheduledBatch, token_ids: SequenceOf[int]) -> StepResult:
        """Take over what a batch has computed.

        Args:
            batch: The oldest scheduled batch that is not committed.
            token_ids: One for each sequence with `is_sampled`, in batch order. What belongs to a
                sequence that has ended since is ignored.
        """
        sampled = iter(token_ids)
        tokens: list[tuple[SequenceKey, int]] = []
        started: dict[SequenceKey, int] = {}
        for item in batch.sequences:
            token_id = next(sampled) if item.is_sampled else None
            sequence = self._find_same(item)
            if sequence is None:
                continue
            if sequence.num_preemptions == item.num_preemptions:
                self._blocks.publish(sequence, item.end)
            if token_id is not None:
                tokens.append((item.key, token_id))
                if sequence.num_output_tokens == 0:
                    started[item.key] = sequence.num_cached_tokens
                self._append(sequence, token_id)
        finished, self._finished = self._finished, []
        return StepResult(tokens=tokens, finished=finished, started=started)

    def _schedule_decodes(self) -> list[ScheduledSequence]:
        batch = []
        for sequence in list(self._running.values()):
            is_decode = sequence.num_uncomputed_tokens == 1 and not sequence.is_complete
            if is_decode and self._make_room(sequence):
                batch.append(self._advance(sequence, 1))
        return batch

    def _make_room(self, sequence: Sequence) -> bool:
        """Get a running sequence the blocks it needs; return False if it had to give up its own.

        Sequences are asked by rank and the last is the first to give, so no sequence of this batch
        is preempted, and the first always advances.
        """
        if sequence.key not in self._running:
            return False
        while not self._blocks.can_grow(sequence, sequence.num_tokens):
            victim = next(reversed(self._running.values()))
            self._preempt(victim)
            if victim is sequence:
                return False
        self._blocks.grow(sequence, sequence.num_tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.key]
        self._blocks.release(sequence)
        self._retired.append(sequence.number)
        sequence.num_preemptions += 1
        self.counters.num_preemptions += 1
        _insert(self._waiting, sequence)

    def _admit(self, held_back: list[Sequence]) -> Sequence | None:
        """Start the first waiting sequence that is not held back, if it can start now.

        Args:
            held_back: The waiting sequences before it; whoever is found held back is appended.
        """
        for sequence in islice(self._waiting.values(), len(held_back), None):
            if len(self._running) + len(held_back) >= self._max_num_seqs:
                return None
            if sequence.num_pending_tokens > 0:  # preempted in flight; they come with a commit
                return None
            if not self._is_held_back(sequence):
                return self._start(sequence, held_back)
            held_back.append(sequence)
        return None

    def _is_held_back(self, sequence: Sequence) -> bool:
        """Return whether a sequence that goes before it is computing what it would compute too.

        That one publishes it, ends or is preempted, so nobody is held back forever.
        """
        return sequence.sampling.num_prompt_logprobs is None and any(
            running.rank < sequence.rank and self._blocks.can_share_next(sequence, running)
            for running in self._running.values()
        )

    def _start(self, sequence: Sequence, held_back: SequenceOf[Sequence]) -> Sequence | None:
        """Move a waiting sequence to the running ones, if there are blocks for all its tokens.

        It leaves one for each running sequence, else it would soon be preempted, and to those held
        back what they need.
        """
        if sequence.sampling.num_prompt_logprobs is None:  # else all of it is computed
            self._blocks.share_prefix(sequence)
        num_reserved_tokens = len(self._running) * self._blocks.block_size
        num_reserved_tokens += sum(other.num_tokens for other in held_back)
        if not self._blocks.can_grow(sequence, sequence.num_tokens + num_reserved_tokens):
            self._blocks.release(sequence)
            return None
        self._blocks.grow(sequence, sequence.num_tokens)
        _insert(self._running, self._waiting.pop(sequence.key))
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.counters.num_prompt_tokens += sequence.num_prompt_tokens
            self.counters.num_cached_prompt_tokens += sequence.num_cached_tokens
        return sequence

    def _advance(self, sequence: Sequence, budget: int) -> ScheduledSequence:
        """Schedule as many of a sequence's tokens as the budget allows."""
        start = sequence.num_computed_tokens
        num_tokens = min(sequence.num_uncomputed_tokens, budget)
        token_ids = tuple(sequence.token_ids[start : start + num_tokens])
        sequence.num_computed_tokens += num_tokens
        is_sampled = sequence.num_uncomputed_tokens == 0
        sequence.num_pending_tokens += is_sampled
        return ScheduledSequence(
            key=sequence.key,
            number=sequence.number,
            start=start,
            token_ids=token_ids,
            num_pending_tokens=num_tokens - len(token_ids),
            all_token_ids=sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
            block_ids=tuple(sequence.block_ids),
            is_sampled=is_sampled,
            sampling=sequence.sampling,
            seed=sequence.seed,
            num_preemptions=sequence.num_preemptions,
            constraint=sequence.constraint,
        )

    def _append(self, sequence: Sequence, token_id: int) -> None:
        sequence.num_pending_tokens -= 1
        self.counters.num_output_tokens += 1
        reason = sequence.append(token_id)
        if reason is not None:
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str = "") -> None:
        self._running.pop(sequence.key, None)
        self._waiting.pop(sequence.key, None)
        self._blocks.release(sequence)
        self._retired.append(sequence.number)
        self._finished.append(sequence.finished(reason, error))

    def _find(self, key: SequenceKey) -> Sequence | None:
        return self._running.get(key) or self._waiting.get(key)

    def _find_same(self, item: Sequence | ScheduledSequence) -> Sequence | None:
        """Return a live sequence, not another that has taken the key of one that has ended."""
        sequence = self._find(item.key)
        return sequence if sequence is not None and sequence.number == item.number else None


def _insert(queue: OrderedDict[SequenceKey, Sequence], sequence: Sequence) -> None:
    """Put a sequence into its place by rank, nearly always the first or the last."""
    later = [key for key, other in queue.items() if other.rank > sequence.rank]
    queue[sequence.key] = sequence
    for key in later:
        queue.move_to_end(key)
