"""The step loop's body: join scheduler and runner, keep one sequence's fault from the others."""

import secrets
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

import structlog

from runtime.config import EngineConfig
from runtime.engine.batch import PendingTokens, ScheduledBatch
from runtime.engine.block_manager import BlockManager
from runtime.engine.constraints import MaskMaker
from runtime.engine.figures import EngineFigures
from runtime.engine.grammars import GrammarCompiler
from runtime.engine.isolation import IsolatedBatch
from runtime.engine.pacing import Pacing
from runtime.engine.pooling import PoolingRequest
from runtime.engine.preparation import Preparation
from runtime.engine.scheduler import Scheduler
from runtime.engine.sequence import Sequence, SequenceKey, SequenceRequest, StepResult
from runtime.engine.validation import check_request
from runtime.errors import InvalidSequence

PREPARATION_POLL_S = 0.001

log = structlog.get_logger()

FoundT = TypeVar("FoundT")

PREEMPTIONS_PERIOD_S = 1.0
"""How often preemptions are logged at most: under pressure every step has some."""


class StepRunner(Protocol):
    """What the engine needs of a model runner, its memory in place."""

    @property
    def num_kv_blocks(self) -> int:
        """Blocks in the KV cache."""

    @property
    def max_model_len(self) -> int:
        """The limit in force, in tokens."""

    @property
    def max_step_tokens(self) -> int:
        """Most tokens one step can run."""

    def max_prefill_tokens(self, num_decodes: int) -> int:
        """Return how many tokens of prompts a step should run at most beside so many decodes."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @property
    def max_in_flight(self) -> int:
        """Batches to launch before the first is waited for; 2 prepares one while one runs."""

    @property
    def num_late_compilations(self) -> int:
        """Kernels compiled since the engine was ready; more than 0 is a defect."""

    def launch(self, batch: ScheduledBatch) -> PendingTokens:
        """Run a batch after those launched before, waiting for none.

        Running the same batch again gives the same result.
        """

    def check_device(self) -> None:
        """Raise if the device can compute nothing any more; waits for what was launched."""

    def use_idle_time(self) -> bool:
        """Do a little that makes later steps faster; return whether anything was done."""


class Engine:
    """Sequences in, tokens out, one batch a step. Not thread-safe: one loop owns it.

    Args:
        config: Budgets and block size.
        runner: Its weights and KV cache in place.
        eos_token_ids: Tokens that end a sequence unless it ignores them.
        grammars: Compiles what outputs must match; without it such requests are refused.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: StepRunner,
        eos_token_ids: frozenset[int],
        grammars: GrammarCompiler | None = None,
    ) -> None:
        budget = min(config.max_num_batched_tokens, runner.max_step_tokens)
        self._config = replace(config, max_num_batched_tokens=budget)
        self._runner = runner
        # A configuration may name tokens that the model has not: they are never sampled.
        self._eos_token_ids = frozenset(id for id in eos_token_ids if 0 <= id < runner.vocab_size)
        self._num_submitted = 0
        self._in_flight: deque[tuple[ScheduledBatch, PendingTokens]] = deque()
        self._pacing = Pacing()
        self._num_told_preemptions = 0
        self._preemptions_told_at = -PREEMPTIONS_PERIOD_S
        self._preparation = Preparation(grammars, runner.vocab_size)
        self._mask_maker = MaskMaker(runner.vocab_size)
        self._blocks = self._new_blocks()
        self._scheduler = Scheduler(self._config, self._blocks, runner.max_prefill_tokens)

    def submit(self, request: SequenceRequest) -> None:
        """Queue a sequence; raise InvalidSequence if it can never run."""
        max_model_len = self._runner.max_model_len
        check_request(request, vocab_size=self._runner.vocab_size, max_model_len=max_model_len)
        if request.key in self._live_keys():
            raise InvalidSequence(f"sequence {request.key!r} is live already: number it anew")
        sampling = request.sampling
        num_prompt_tokens = len(request.prompt_token_ids)
        max_tokens = min(num_prompt_tokens + sampling.max_tokens, max_model_len)
        # The last token is sampled, never run, and needs no place in the cache.
        if not self._blocks.fits(max_tokens - 1):
            raise InvalidSequence(
                f"{num_prompt_tokens} prompt tokens and {max_tokens - num_prompt_tokens} output "
                f"tokens do not fit the KV cache of {self._blocks.num_blocks} blocks of "
                f"{self._blocks.block_size} tokens: ask for fewer or give the engine more memory"
            )
        eos_token_ids = frozenset() if sampling.ignore_eos else self._eos_token_ids
        self._num_submitted += 1
        self._preparation.add(
            Sequence(
                key=request.key,
                number=self._num_submitted,
                sampling=sampling,
                seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
                max_tokens=max_tokens,
                stop_token_ids=sampling.stop_token_ids | eos_token_ids,
                token_ids=list(request.prompt_token_ids),
                priority=request.priority,
                cache_salt=request.cache_salt,
            )
        )
        self._start_prepared()

    def submit_text(self, request: PoolingRequest) -> None:
        """Refuse: nothing is embedded here."""
        raise InvalidSequence("this function generates and does not embed: ask for text")

    def cancel(self, key: SequenceKey) -> None:
        """End a sequence and free its blocks now; the next step reports it."""
        self._preparation.give_up(key)
        self._start_prepared()
        self._scheduler.cancel(key)

    def cancel_stream(self, stream_id: int) -> None:
        """End all sequences of a stream."""
        for key in self._live_keys():
            if key.stream_id == stream_id:
                self.cancel(key)

    def has_work(self) -> bool:
        """Return whether a step would compute or report anything."""
        return bool(self._in_flight or self._preparation) or self._scheduler.has_work()

    def spare_s(self) -> float:
        """Return how long the next step may wait for requests without the runner running dry.

        A batch that is launched early makes a request that comes just after wait for it.
        """
        if not (self._in_flight or self._scheduler.has_work() or self._preparation.has_prepared):
            return PREPARATION_POLL_S
        if len(self._in_flight) != self._runner.max_in_flight - 1 or not self._in_flight:
            return 0.0
        batch, _ = self._in_flight[0]
        return self._pacing.spare_s(batch, time.monotonic())

    def use_idle_time(self) -> bool:
        """Do a little that makes later steps faster; return whether anything was done."""
        return not self.has_work() and self._runner.use_idle_time()

    def step(self) -> StepResult:
        """Keep the runner busy, take over its oldest batch, report tokens and ends."""
        self._start_prepared()
        while len(self._in_flight) < self._runner.max_in_flight:
            began = time.monotonic()
            batch = self._scheduler.schedule()
            if not batch.sequences:
                break
            pending = self._launch(batch)
            is_next = not self._in_flight
            self._in_flight.append((batch, pending))
            if is_next:
                self._choose_next()
            self._pacing.launched(began, time.monotonic(), is_next=is_next)
        self._tell_preemptions()
        if not self._in_flight:
            return self._scheduler.commit(ScheduledBatch(sequences=()), ())
        batch, pending = self._in_flight.popleft()
        sampled = pending.wait()
        self._pacing.finished(batch, time.monotonic())
        for index, error in sampled.faults.items():
            item = batch.sequences[index]
            log.error("sequence_failed", **item.key._asdict(), error=error)
            self._scheduler.fail(item, error)
        logprobs = self._of_live(batch, sampled.logprobs)
        prompt_logprobs = self._of_live(batch, sampled.prompt_logprobs)
        result = self._scheduler.commit(batch, sampled.token_ids)
        if self._in_flight:
            self._choose_next()
        if not (logprobs or prompt_logprobs):
            return result
        return replace(result, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def figures(self) -> EngineFigures:
        """Return load and counts."""
        counters = self._scheduler.counters
        return EngineFigures(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + len(self._preparation),
            num_kv_blocks=self._blocks.num_blocks,
            num_free_kv_blocks=self._blocks.num_available_blocks,
            num_preemptions=counters.num_preemptions,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_cached_prompt_tokens=counters.num_cached_prompt_tokens,
            num_output_tokens=counters.num_output_tokens,
            num_steps=counters.num_steps,
            num_late_compilations=self._runner.num_late_compilations,
        )

    def reset_cache(self) -> None:
        """Forget cached prefixes: the KV cache's memory is gone, and comes back with anything."""
        assert not self._in_flight, "launched batches would write to the new cache"
        self._blocks = self._new_blocks()
        self._scheduler.replace_blocks(self._blocks)

    def _new_blocks(self) -> BlockManager:
        return BlockManager(
            self._runner.num_kv_blocks,
            self._config.block_size,
            enable_prefix_caching=self._config.enable_prefix_caching,
        )

    def _tell_preemptions(self) -> None:
        num_preemptions, now = self._scheduler.counters.num_preemptions, time.monotonic()
        num_new = num_preemptions - self._num_told_preemptions
        if num_new and now >= self._preemptions_told_at + PREEMPTIONS_PERIOD_S:
            self._num_told_preemptions, self._preemptions_told_at = num_preemptions, now
            log.warning(
                "preempted",
                num_times=num_new,
                num_running=self._scheduler.num_running,
                num_waiting=self._scheduler.num_waiting,
                num_kv_blocks=self._blocks.num_blocks,
            )

    def _of_live(
        self, batch: ScheduledBatch, found: Mapping[int, FoundT]
    ) -> dict[SequenceKey, FoundT]:
        """Return by key what was found of sequences that have neither ended nor failed since."""
        items = ((batch.sequences[index], one) for index, one in found.items())
        return {item.key: one for item, one in items if self._scheduler.is_live(item)}

    def _live_keys(self) -> list[SequenceKey]:
        return [*self._scheduler.live_keys(), *self._preparation.keys()]

    def _start_prepared(self) -> None:
        """Queue the sequences whose constraints are there."""
        for sequence, error in self._preparation.take_prepared():
            self._scheduler.add(sequence)
            if isinstance(error, InvalidSequence):
                self._scheduler.refuse(sequence, str(error))
            elif error is not None:
                reason = f"its output cannot be constrained: {type(error).__name__}: {error}"
                self._scheduler.fail(sequence, reason)

    def _launch(self, batch: ScheduledBatch) -> PendingTokens:
        try:
            return self._runner.launch(batch)
        except Exception:  # the fault of one sequence, or of few
            log.exception("batch_failed", num_sequences=len(batch.sequences))
            self._runner.check_device()  # else this process must end, to be replaced
            return IsolatedBatch(self._runner, batch)

    def _choose_next(self) -> None:
        """Have the oldest batch's tokens chosen; those before it are committed."""
        batch, pending = self._in_flight[0]
        masks, errors = self._mask_maker.masks(batch)
        for item in batch.sequences:
            if item.key in errors:
                self._scheduler.refuse(item, errors[item.key])
        try:
            pending.choose(masks)
        except Exception:
            log.exception("choice_failed", num_sequences=len(batch.sequences))
            self._runner.check_device()
            isolated = IsolatedBatch(self._runner, batch)
            isolated.choose(masks)
            self._in_flight[0] = (batch, isolated)
