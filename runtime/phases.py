"""Timings of the parts of a load or a wake, in the order they happened."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.engine_api import OnProgress, Runner
from runtime.rpc import inference_pb2 as pb


class PhaseLog:
    """Named, finished parts of an operation."""

    def __init__(self) -> None:
        self.phases: list[pb.Phase] = []

    def add(self, name: str, seconds: float, *, gb_per_s: float = 0.0) -> None:
        """Append a phase that was measured elsewhere.

        Args:
            name: What it is called.
            seconds: What it took, beside no other phase.
            gb_per_s: How fast bytes moved, over all the time they did; 0 if none moved.
        """
        self.phases.append(pb.Phase(name=name, seconds=seconds, gb_per_s=gb_per_s))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Append what runs inside as a phase, unless it raises."""
        started = time.monotonic()
        yield
        self.add(name, time.monotonic() - started)


def bring_up(runner: Runner, phase_log: PhaseLog, on_progress: OnProgress) -> int:
    """Load weights and allocate the KV cache; return its number of blocks.

    Weights are on their way from the first phase on; the time for reading them is what was left of
    it after the others.
    """
    with phase_log.measure("weights_map"):
        runner.start_loading()
    with phase_log.measure("kv_alloc"):
        num_kv_blocks = runner.allocate_kv()
    with phase_log.measure("warm_up"):
        runner.warm_up()
    waited_from = time.monotonic()
    report = runner.load_weights(on_progress)
    waited_s = time.monotonic() - waited_from
    left_s = max(0.0, waited_s - report.verify_s)
    phase_log.add("weights_read", left_s, gb_per_s=_rate(report.num_bytes, report.read_s))
    rate = _rate(report.num_bytes, report.verify_s)
    phase_log.add("weights_verify", report.verify_s, gb_per_s=rate)
    return num_kv_blocks


def _rate(num_bytes: int, seconds: float) -> float:
    """Return GB/s; 0 if it took no time."""
    return num_bytes / 1e9 / seconds if seconds else 0.0
