"""The step loop's body of a function that embeds: whole texts in, one vector each out. No torch.

There is no KV cache and nothing to preempt: a text is computed in one step, in the order of
arrival, as many in a step as its budgets hold. A text longer than the budget runs alone.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import structlog

from runtime.config import EngineConfig
from runtime.engine.figures import EngineFigures
from runtime.engine.pooling import Pooled, PoolingRequest
from runtime.engine.sequence import SequenceKey, SequenceRequest, StepResult
from runtime.errors import InvalidSequence

log = structlog.get_logger()


class Embedder(Protocol):
    """What the engine needs of a runner, its weights in place."""

    @property
    def max_model_len(self) -> int:
        """The limit in force, in tokens."""

    @property
    def max_step_tokens(self) -> int:
        """Most tokens one step should run."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @property
    def embedding_size(self) -> int:
        """Numbers in a vector."""

    def embed(self, texts: SequenceOf[PoolingRequest]) -> list[Pooled]:
        """Return what became of each text, in order."""


class PoolingEngine:
    """Implements `runtime.engine_api.StepEngine`. Not thread-safe: one loop owns it.

    Args:
        config: Budgets.
        runner: Its weights in place.
    """

    def __init__(self, config: EngineConfig, runner: Embedder) -> None:
        self._runner = runner
        self._max_num_seqs = config.max_num_seqs
        self._budget = min(config.max_num_batched_tokens, runner.max_step_tokens)
        self._waiting: deque[PoolingRequest] = deque()
        self._num_prompt_tokens = 0
        self._num_steps = 0

    def submit(self, request: SequenceRequest) -> None:
        """Refuse: nothing is generated here."""
        raise InvalidSequence("this function embeds and does not generate: ask for embeddings")

    def submit_text(self, request: PoolingRequest) -> None:
        """Queue a text; raise InvalidSequence if it can never be embedded."""
        token_ids, size = request.token_ids, self._runner.embedding_size
        if not token_ids:
            raise InvalidSequence("a text is empty: send at least one token")
        if len(token_ids) > self._runner.max_model_len:
            raise InvalidSequence(
                f"a text has {len(token_ids)} tokens, above max_model_len="
                f"{self._runner.max_model_len}: shorten it"
            )
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < self._runner.vocab_size:
                raise InvalidSequence(
                    f"token id {token_id!r} is not in the vocabulary "
                    f"[0, {self._runner.vocab_size}): was it made with this model's tokenizer?"
                )
        if not 0 <= request.dimensions <= size:
            raise InvalidSequence(f"dimensions is {request.dimensions}: it must be at most {size}")
        self._waiting.append(request)

    def cancel(self, key: SequenceKey) -> None:
        """Forget a text; nothing is reported."""
        self._keep(lambda request: request.key != key)

    def cancel_stream(self, stream_id: int) -> None:
        """Forget all texts of a call."""
        self._keep(lambda request: request.key.stream_id != stream_id)

    def has_work(self) -> bool:
        """Return whether a text waits."""
        return bool(self._waiting)

    def spare_s(self) -> float:
        """Return 0: a step waits for nothing."""
        return 0.0

    def use_idle_time(self) -> bool:
        """Do nothing; return whether anything was done."""
        return False

    def step(self) -> StepResult:
        """Embed the next texts."""
        batch = self._next_batch()
        self._num_steps += 1
        self._num_prompt_tokens += sum(len(request.token_ids) for request in batch)
        return StepResult(tokens=[], finished=[], pooled=self._embed(batch))

    def figures(self) -> EngineFigures:
        """Return load and counts."""
        return EngineFigures(
            num_running=0,
            num_waiting=len(self._waiting),
            num_kv_blocks=0,
            num_free_kv_blocks=0,
            num_preemptions=0,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_prompt_tokens=0,
            num_output_tokens=0,
            num_steps=self._num_steps,
            num_late_compilations=0,
        )

    def reset_cache(self) -> None:
        """Do nothing: there is no cache."""

    def _next_batch(self) -> list[PoolingRequest]:
        batch: list[PoolingRequest] = []
        num_tokens = 0
        while self._waiting and len(batch) < self._max_num_seqs:
            num_tokens += len(self._waiting[0].token_ids)
            if batch and num_tokens > self._budget:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _embed(self, batch: list[PoolingRequest]) -> list[Pooled]:
        """Embed a batch; when that raises, embed its texts alone to find the faulty ones."""
        try:
            return self._runner.embed(batch)
        except Exception:
            log.exception("batch_failed", num_sequences=len(batch))
        return [pooled for request in batch for pooled in self._embed_alone(request)]

    def _embed_alone(self, request: PoolingRequest) -> list[Pooled]:
        try:
            return self._runner.embed([request])
        except Exception as error:
            log.exception("text_raised", **request.key._asdict())
            message = f"the engine could not run this text: {type(error).__name__}: {error}"
            return [Pooled(key=request.key, embedding=b"", error=message)]

    def _keep(self, is_kept: Callable[[PoolingRequest], bool]) -> None:
        self._waiting = deque(request for request in self._waiting if is_kept(request))
