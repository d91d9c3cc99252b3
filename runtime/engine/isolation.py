"""A batch whose launch has failed: its sequences run alone, to find the faulty ones."""

from dataclasses import replace
from typing import Protocol

import structlog

from runtime.engine.batch import (
    PendingTokens,
    SampledTokens,
    ScheduledBatch,
    ScheduledSequence,
    TokenMasks,
)
from runtime.engine.sequence import PromptLogprobs, TokenLogprobs

log = structlog.get_logger()


class Launcher(Protocol):
    """What can run a batch again."""

    def launch(self, batch: ScheduledBatch) -> PendingTokens:
        """Run a batch after those launched before."""

    def check_device(self) -> None:
        """Raise if the device can compute nothing any more."""


class IsolatedBatch:
    """Runs each sequence of a batch alone; implements `runtime.engine.batch.PendingTokens`.

    The batches before it are committed by then, so every token is known. That matters: the runner
    may have gone so far in the failed batch that a token it had kept is replaced by the next one.

    Args:
        runner: Running the same tokens again gives the same result.
        batch: The one that failed.
    """

    def __init__(self, runner: Launcher, batch: ScheduledBatch) -> None:
        self._runner = runner
        self._batch = batch
        self._result = SampledTokens(token_ids=(), faults={})

    def choose(self, masks: TokenMasks | None) -> None:
        """Run the sequences, one after the other."""
        token_ids: list[int] = []
        faults: dict[int, str] = {}
        logprobs: dict[int, TokenLogprobs] = {}
        prompt_logprobs: dict[int, PromptLogprobs] = {}
        for index, item in enumerate(self._batch.sequences):
            row = len(token_ids)
            mask = masks.part(row, row + 1) if masks is not None and item.is_sampled else None
            alone = self._run_alone(_with_known_tokens(item), mask)
            token_ids += alone.token_ids
            if alone.faults:
                faults[index] = alone.faults[0]
            if alone.logprobs:
                logprobs[index] = alone.logprobs[0]
            if alone.prompt_logprobs:
                prompt_logprobs[index] = alone.prompt_logprobs[0]
        self._result = SampledTokens(
            token_ids=token_ids,
            faults=faults,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def wait(self) -> SampledTokens:
        """Return what they yielded."""
        return self._result

    def _run_alone(self, item: ScheduledSequence, mask: TokenMasks | None) -> SampledTokens:
        if item.num_pending_tokens:  # it has ended meanwhile, and nobody waits for its token
            return SampledTokens(token_ids=(0,) * item.is_sampled, faults={})
        try:
            pending = self._runner.launch(ScheduledBatch(sequences=(item,)))
            pending.choose(mask)
            return pending.wait()
        except Exception as error:  # whatever is wrong with it, the others go on
            log.exception("sequence_raised", **item.key._asdict())
            self._runner.check_device()
            message = f"the engine could not run this sequence: {type(error).__name__}: {error}"
            return SampledTokens(token_ids=(0,) * item.is_sampled, faults={0: message})


def _with_known_tokens(item: ScheduledSequence) -> ScheduledSequence:
    """Return a sequence that leaves no token to the runner, if its batches were committed."""
    token_ids = tuple(item.all_token_ids[item.start : item.end])
    if len(token_ids) < item.num_tokens:
        return item
    return replace(item, token_ids=token_ids, num_pending_tokens=0)
