"""How many cores a step should use. No torch.

More threads help little when a step is bound by memory, and hurt when another process takes one
of the cores, since every product then waits for the thread that is not running. Which of the two
it is changes while we run, so it is measured.
"""

import os
from collections.abc import Sequence
from pathlib import Path

MAX_TUNED_TOKENS = 16  # larger steps are bound by arithmetic: all cores
TRIAL_INTERVAL = 32  # steps between trials of another number of threads
SMOOTHING = 0.25  # weight of the newest measurement
CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


class ThreadTuner:
    """Picks a number of threads per size of step, by how long such steps took.

    Args:
        num_cores: The most threads worth having.
    """

    def __init__(self, num_cores: int) -> None:
        self._choices = thread_choices(num_cores)
        self._seconds: dict[int, list[float | None]] = {}
        self._num_steps: dict[int, int] = {}

    def choose(self, num_tokens: int) -> int:
        """Return the number of threads for a step of that many tokens."""
        if num_tokens > MAX_TUNED_TOKENS:
            return self._choices[-1]
        size = num_tokens.bit_length()
        seconds = self._seconds.setdefault(size, [None] * len(self._choices))
        step = self._num_steps[size] = self._num_steps.get(size, -1) + 1
        if None in seconds:
            return self._choices[seconds.index(None)]
        trial, is_no_trial = divmod(step, TRIAL_INTERVAL)
        if not is_no_trial:
            return self._choices[trial % len(self._choices)]
        fastest = min(range(len(seconds)), key=lambda index: seconds[index] or 0.0)
        return self._choices[fastest]

    def record(self, num_tokens: int, num_threads: int, elapsed_s: float) -> None:
        """Learn how long a step took."""
        if num_tokens > MAX_TUNED_TOKENS:
            return
        seconds = self._seconds[num_tokens.bit_length()]
        index = self._choices.index(num_threads)
        before = seconds[index]
        change = 0.0 if before is None else (elapsed_s - before) * SMOOTHING
        seconds[index] = elapsed_s if before is None else before + change


def thread_choices(num_cores: int) -> Sequence[int]:
    """Return the powers of two up to the number of cores, and that number."""
    powers = [1 << exponent for exponent in range(num_cores.bit_length())]
    return sorted({*powers, num_cores})


def usable_cores(cpu_max: Path = CGROUP_CPU_MAX) -> int:
    """Return how many cores this process may keep busy: its affinity and its cgroup's quota."""
    num_cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
    except (OSError, ValueError):
        return num_cores
    if quota == "max":
        return num_cores
    return max(1, min(num_cores, int(quota) // int(period)))
