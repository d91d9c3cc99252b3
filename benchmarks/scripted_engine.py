"""An engine without a model: one token for every sequence, in steps of a given length.

What is left of serving is everything around a model, which `benchmarks.gateway` measures.
"""

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.config import EngineConfig
from runtime.engine.pooling import PoolingRequest
from runtime.engine.sequence import (
    FinishedSequence,
    FinishReason,
    SequenceKey,
    SequenceRequest,
    StepResult,
)
from runtime.engine_api import Measure, NothingCompiled, OnProgress
from runtime.errors import InvalidSequence

STEP_S = "SCRIPTED_STEP_S"  # variable with the seconds between steps
VOCAB = (200, 49000)  # token ids that a small model's tokenizer has, special ones left out


@dataclass(frozen=True, slots=True)
class _Report:
    num_bytes: int = 0
    read_s: float = 0.0
    verify_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Figures:
    num_running: int
    num_output_tokens: int
    num_steps: int
    num_waiting: int = 0
    num_kv_blocks: int = 1
    num_free_kv_blocks: int = 1
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_late_compilations: int = 0


class ScriptedRunner(NothingCompiled):
    """Holds nothing."""

    weights_bytes = 0
    kv_cache_bytes = 0
    kept_reason = ""
    kept_bytes = 0

    def __init__(self, config: EngineConfig) -> None:
        self.max_model_len = config.max_model_len or 2048

    def environment(self) -> dict[str, str]:
        """Depend on nothing."""
        return {}

    def start_loading(self) -> None:
        """Do nothing."""

    def load_weights(self, on_progress: OnProgress | None = None) -> _Report:
        """Load nothing."""
        return _Report()

    def allocate_kv(self) -> int:
        """Allocate nothing."""
        return 1

    def warm_up(self) -> None:
        """Compile nothing."""

    def release(self) -> int:
        """Free nothing."""
        return 0


class ScriptedEngine:
    """Random tokens until max_tokens, one a step; steps begin at least `step_s` apart."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next_step_at = 0.0
        self._left: dict[SequenceKey, int] = {}
        self._requests: dict[SequenceKey, SequenceRequest] = {}
        self._cancelled: list[SequenceKey] = []
        self._new: set[SequenceKey] = set()
        self._num_steps = 0
        self._num_output_tokens = 0
        self._rng = random.Random(0)

    def submit(self, request: SequenceRequest) -> None:
        """Start a sequence."""
        self._left[request.key] = request.sampling.max_tokens
        self._requests[request.key] = request
        self._new.add(request.key)

    def submit_text(self, request: PoolingRequest) -> None:
        """Refuse: the script generates."""
        raise InvalidSequence("the script generates")

    def cancel(self, key: SequenceKey) -> None:
        """End a sequence with the next step."""
        if key in self._left:
            self._cancelled.append(key)

    def cancel_stream(self, stream_id: int) -> None:
        """End a stream's sequences with the next step."""
        self._cancelled += [key for key in self._left if key.stream_id == stream_id]

    def has_work(self) -> bool:
        """Return whether a sequence is live."""
        return bool(self._left)

    def spare_s(self) -> float:
        """Return the time until the next step."""
        return max(0.0, self._next_step_at - time.monotonic())

    def use_idle_time(self) -> bool:
        """Do nothing."""
        return False

    def step(self) -> StepResult:
        """Give every sequence its next token."""
        self._next_step_at = max(self._next_step_at + self._step_s, time.monotonic())
        result = StepResult(tokens=[], finished=[], started=dict.fromkeys(self._new, 0))
        for key in self._cancelled:
            if key in self._left:
                result.finished.append(self._finished(key, FinishReason.CANCELLED))
        self._cancelled.clear()
        self._new.clear()
        for key in list(self._left):
            result.tokens.append((key, self._rng.randrange(*VOCAB)))
            self._left[key] -= 1
            if not self._left[key]:
                result.finished.append(self._finished(key, FinishReason.LENGTH))
        self._num_output_tokens += len(result.tokens)
        self._num_steps += 1
        return result

    def figures(self) -> _Figures:
        """Return the load."""
        return _Figures(
            num_running=len(self._left),
            num_output_tokens=self._num_output_tokens,
            num_steps=self._num_steps,
        )

    def reset_cache(self) -> None:
        """Forget nothing."""

    def _finished(self, key: SequenceKey, reason: FinishReason) -> FinishedSequence:
        request = self._requests.pop(key)
        num_left = self._left.pop(key, 0)
        return FinishedSequence(
            key=key,
            reason=reason,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=0,
            num_output_tokens=request.sampling.max_tokens - num_left,
        )


class ScriptedFactory:
    """Builds scripted engines; implements `runtime.engine_api.EngineFactory`."""

    def prepare(self) -> None:
        """Do nothing."""

    def open_runner(self, snapshot: Path, config: EngineConfig, measure: Measure) -> ScriptedRunner:
        """Open nothing."""
        return ScriptedRunner(config)

    def build_engine(
        self, snapshot: Path, config: EngineConfig, runner: ScriptedRunner
    ) -> ScriptedEngine:
        """Return the engine."""
        return ScriptedEngine(float(os.environ[STEP_S]))
