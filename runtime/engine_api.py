"""What an engine process needs of an engine: the seam between the process and the tensors.

`runtime.engine` implements it with torch; tests implement it with a script.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from runtime.config import EngineConfig
from runtime.engine.pooling import PoolingRequest
from runtime.engine.sequence import SequenceKey, SequenceRequest, StepResult
from snapshots.profiles import KernelFile, StepSize

OnProgress = Callable[[int, int], None]  # bytes done, bytes in all
Measure = Callable[[str], AbstractContextManager[None]]  # times what runs inside, as a phase


class LoadReport(Protocol):
    """How the reading of weights went."""

    @property
    def num_bytes(self) -> int:
        """What was read."""

    @property
    def read_s(self) -> float:
        """Seconds until the last byte was read."""

    @property
    def verify_s(self) -> float:
        """Seconds spent on checksums after that."""


class Kernels(Protocol):
    """Compiled kernels, kept over processes."""

    @property
    def num_compilations(self) -> int:
        """Kernels that this process had to compile."""

    def seed(self, files: Iterable[KernelFile], read: Callable[[KernelFile], bytes]) -> None:
        """Take what an earlier process has compiled, or raise ProfileUnusable."""

    def collect(self) -> dict[str, bytes]:
        """Return what this process has used, by path."""


class Runner(Protocol):
    """Memory in, memory out, and what makes a start fast; nothing else of a model runner."""

    @property
    def weights_bytes(self) -> int:
        """Device memory held for weights, now."""

    @property
    def kv_cache_bytes(self) -> int:
        """Device memory held for KV blocks, now."""

    @property
    def kept_reason(self) -> str:
        """What is still held, and why, while the memory is given back; empty if nothing is."""

    @property
    def kept_bytes(self) -> int:
        """Device memory still held while the memory is given back, as far as it is known."""

    @property
    def max_model_len(self) -> int:
        """The limit in force, in tokens."""

    @property
    def kernels(self) -> Kernels | None:
        """Its compiled kernels; None if nothing is compiled."""

    def environment(self) -> Mapping[str, str]:
        """Return what of machine and software its profile depends on."""

    def prefer_steps(self, steps: Sequence[StepSize]) -> None:
        """Prepare these shapes of steps first, in this order, when there is time."""

    def used_steps(self) -> Sequence[StepSize]:
        """Return the shapes of steps that were run, most used first."""

    def start_loading(self) -> None:
        """Begin to load weights beside what comes next, where that is possible."""

    def load_weights(self, on_progress: OnProgress | None = None) -> LoadReport:
        """Allocate, read and verify weights, or what is left of that to be done."""

    def allocate_kv(self) -> int:
        """Allocate the KV cache; return its number of blocks."""

    def warm_up(self) -> None:
        """Compile what is compiled; the first request is then as fast as the next."""

    def release(self) -> int:
        """Give weights and KV memory back; return the bytes freed."""

    def settle(self) -> None:
        """Once, a while after `release`: do now what taking memory back would wait for."""


class NothingCompiled:
    """The part of a Runner whose steps need no preparation, and whose memory none either."""

    kernels: Kernels | None = None

    def used_steps(self) -> Sequence[StepSize]:
        """Return nothing."""
        return ()

    def prefer_steps(self, steps: Sequence[StepSize]) -> None:
        """Ignore which steps others have used."""

    def settle(self) -> None:
        """Do nothing."""


class StepEngine(Protocol):
    """Sequences in, tokens out, one batch a step."""

    def submit(self, request: SequenceRequest) -> None:
        """Queue a sequence, or raise InvalidSequence."""

    def submit_text(self, request: PoolingRequest) -> None:
        """Queue a text to embed, or raise InvalidSequence."""

    def cancel(self, key: SequenceKey) -> None:
        """End a sequence; the next step reports it. An unknown key is ignored."""

    def cancel_stream(self, stream_id: int) -> None:
        """End all sequences of a stream."""

    def has_work(self) -> bool:
        """Return whether a step would compute or report anything."""

    def spare_s(self) -> float:
        """Return how long the next step may wait for requests without loss."""

    def use_idle_time(self) -> bool:
        """Do a little that makes later steps faster; return whether anything was done."""

    def step(self) -> StepResult:
        """Run one batch."""

    def figures(self) -> object:
        """Return an object with the fields of the wire's LoadFigures."""

    def reset_cache(self) -> None:
        """Forget cached prefixes, once the runner has given its KV cache back."""


RunnerT = TypeVar("RunnerT", bound=Runner)


class EngineFactory(Protocol[RunnerT]):
    """Builds an engine in the forked process; importing its module is the zygote's work."""

    def prepare(self) -> None:
        """Do what makes every later start faster, in the zygote, once it has a moment."""

    def open_runner(self, snapshot: Path, config: EngineConfig, measure: Measure) -> RunnerT:
        """Read a snapshot's configuration and set devices up; weights come later."""

    def build_engine(self, snapshot: Path, config: EngineConfig, runner: RunnerT) -> StepEngine:
        """Join a snapshot's runner, its weights and KV cache in place, with a scheduler."""
