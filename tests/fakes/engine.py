"""An engine that only pretends: it follows a script and needs no torch.

A snapshot of it is a directory with a `script.json`; see `Script`. Sequence i of a prompt [p, …]
gets the tokens p + 1, p + 2, … more than the script's offset — unless p is one of the tokens that make something go wrong.
"""

import json
import mmap
import os
import struct
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.config import EngineConfig
from runtime.engine.pooling import Pooled, PoolingRequest
from runtime.engine.sequence import (
    FinishedSequence,
    FinishReason,
    SequenceKey,
    SequenceRequest,
    StepResult,
)
from runtime.engine_api import Measure, NothingCompiled, OnProgress
from runtime.errors import InvalidSequence, SnapshotDamaged

VOCAB_SIZE = 1 << 31
CRASHING_TOKEN = 666  # the step that runs it raises
FAILING_TOKEN = 777  # the sequence alone fails, at its first step
CONFUSING_TOKEN = 888  # submit raises what it should not


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """How a fake snapshot behaves."""

    load_error: str = ""
    exit_code: int | None = None  # of a process that dies while loading
    wake_error: str = ""
    load_s: float = 0.0
    weights_bytes: int = 1 << 20
    kv_cache_bytes: int = 1 << 20
    step_s: float = 0.001
    max_model_len: int = 1 << 22
    offset: int = 0
    device: str = "pretended"

    def write(self, snapshot: Path) -> None:
        """Make a directory look like a snapshot."""
        snapshot.mkdir(parents=True)
        (snapshot / "manifest.json").write_text("{}")
        (snapshot / "script.json").write_text(json.dumps(asdict(self)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeLoadReport:
    """How the reading of nothing went."""

    num_bytes: int
    read_s: float
    verify_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeFigures:
    """The names of the wire's LoadFigures."""

    num_running: int
    num_output_tokens: int
    num_steps: int
    num_waiting: int = 0
    num_kv_blocks: int = 64
    num_free_kv_blocks: int = 64
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_late_compilations: int = 0


class FakeRunner(NothingCompiled):
    """Holds real memory, so that giving it back can be seen from outside."""

    def __init__(self, script: Script, config: EngineConfig) -> None:
        self.script = script
        self.max_model_len = config.max_model_len or script.max_model_len
        self.kept_reason = ""
        self.kept_bytes = 0
        self.settled_at: list[float] = []
        self._weights: mmap.mmap | None = None
        self._kv_cache: mmap.mmap | None = None
        self._num_loads = 0

    @property
    def weights_bytes(self) -> int:
        return 0 if self._weights is None else len(self._weights)

    @property
    def kv_cache_bytes(self) -> int:
        return 0 if self._kv_cache is None else len(self._kv_cache)

    def start_loading(self) -> None:
        pass

    def load_weights(self, on_progress: OnProgress | None = None) -> FakeLoadReport:
        self._num_loads += 1
        if self.script.exit_code is not None:
            sys.stderr.write("the script says: die\n")
            sys.stderr.flush()
            os._exit(self.script.exit_code)
        if self.script.load_error:
            raise SnapshotDamaged(self.script.load_error)
        if self._num_loads > 1 and self.script.wake_error:
            raise MemoryError(self.script.wake_error)
        self._weights = _touched(self.script.weights_bytes)
        deadline = time.monotonic() + self.script.load_s
        while (remaining_s := deadline - time.monotonic()) > 0:
            time.sleep(min(0.05, remaining_s))
            if on_progress is not None:
                on_progress(0, self.script.weights_bytes)
        return FakeLoadReport(num_bytes=self.script.weights_bytes, read_s=self.script.load_s)

    def warm_up(self) -> None:
        pass

    def settle(self) -> None:
        self.settled_at.append(time.monotonic())

    def environment(self) -> dict[str, str]:
        return {"device": self.script.device}

    def allocate_kv(self) -> int:
        self._kv_cache = _touched(self.script.kv_cache_bytes)
        return 64

    def release(self) -> int:
        freed_bytes = self.weights_bytes + self.kv_cache_bytes
        for memory in (self._weights, self._kv_cache):
            if memory is not None:
                memory.close()
        self._weights = self._kv_cache = None
        return freed_bytes


@dataclass(slots=True, kw_only=True)
class _Sequence:
    request: SequenceRequest
    num_output_tokens: int = 0


class FakeEngine:
    """One token for every sequence in every step."""

    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner
        self._sequences: dict[SequenceKey, _Sequence] = {}
        self._cancelled: list[FinishedSequence] = []
        self._texts: list[PoolingRequest] = []
        self._num_steps = 0
        self._num_output_tokens = 0

    def submit(self, request: SequenceRequest) -> None:
        if not request.prompt_token_ids:
            raise InvalidSequence("the prompt is empty")
        if len(request.prompt_token_ids) >= self._runner.max_model_len:
            raise InvalidSequence("the prompt is too long")
        if request.prompt_token_ids[0] == CONFUSING_TOKEN:
            raise ValueError("confused")
        self._sequences[request.key] = _Sequence(request=request)

    def submit_text(self, request: PoolingRequest) -> None:
        if not request.token_ids:
            raise InvalidSequence("a text is empty")
        self._texts.append(request)

    def cancel(self, key: SequenceKey) -> None:
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self._cancelled.append(_finished(sequence, FinishReason.CANCELLED))

    def cancel_stream(self, stream_id: int) -> None:
        for key in [key for key in self._sequences if key.stream_id == stream_id]:
            self.cancel(key)
        self._texts = [text for text in self._texts if text.key.stream_id != stream_id]

    def has_work(self) -> bool:
        return bool(self._sequences or self._cancelled or self._texts)

    def spare_s(self) -> float:
        return 0.0

    def use_idle_time(self) -> bool:
        return False

    def step(self) -> StepResult:
        time.sleep(self._runner.script.step_s)
        self._num_steps += 1
        finished, self._cancelled = self._cancelled, []
        tokens: list[tuple[SequenceKey, int]] = []
        for key, sequence in list(self._sequences.items()):
            match sequence.request.prompt_token_ids[0]:
                case 666:
                    raise RuntimeError("the script says: crash")
                case 777:
                    finished.append(_finished(sequence, FinishReason.ERROR, "told to fail"))
                    del self._sequences[key]
                case first:
                    sequence.num_output_tokens += 1
                    self._num_output_tokens += 1
                    offset = first + self._runner.script.offset
                    tokens.append((key, offset + sequence.num_output_tokens))
                    if sequence.num_output_tokens == sequence.request.sampling.max_tokens:
                        finished.append(_finished(sequence, FinishReason.LENGTH))
                        del self._sequences[key]
        pooled = [_pooled(self._texts.pop(0))] if self._texts else []
        return StepResult(tokens=tokens, finished=finished, pooled=pooled)

    def figures(self) -> FakeFigures:
        return FakeFigures(
            num_running=len(self._sequences),
            num_output_tokens=self._num_output_tokens,
            num_steps=self._num_steps,
        )

    def reset_cache(self) -> None:
        assert not self._runner.kv_cache_bytes, "it is forgotten when its memory is gone"


class FakeEngineFactory:
    """What the zygote is told to build engines with."""

    def prepare(self) -> None:
        pass

    def open_runner(self, snapshot: Path, config: EngineConfig, measure: Measure) -> FakeRunner:
        with measure("open"):
            script = Script(**json.loads((snapshot / "script.json").read_text()))
        return FakeRunner(script, config)

    def build_engine(self, snapshot: Path, config: EngineConfig, runner: FakeRunner) -> FakeEngine:
        return FakeEngine(runner)


def _pooled(text: PoolingRequest) -> Pooled:
    if text.token_ids[0] == CRASHING_TOKEN:
        raise RuntimeError("the script says: crash")
    if text.token_ids[0] == FAILING_TOKEN:
        return Pooled(key=text.key, embedding=b"", error="told to fail")
    return Pooled(key=text.key, embedding=struct.pack("<2f", text.token_ids[0], text.dimensions))


def _finished(sequence: _Sequence, reason: FinishReason, error: str = "") -> FinishedSequence:
    return FinishedSequence(
        key=sequence.request.key,
        reason=reason,
        num_prompt_tokens=len(sequence.request.prompt_token_ids),
        num_cached_tokens=0,
        num_output_tokens=sequence.num_output_tokens,
        error=error,
    )


def _touched(num_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE)
    for offset in range(0, num_bytes, mmap.PAGESIZE):
        memory[offset] = 1
    return memory
