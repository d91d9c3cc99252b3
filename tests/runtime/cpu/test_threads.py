from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.cpu.threads import TRIAL_INTERVAL, ThreadTuner, thread_choices, usable_cores


def run(tuner: ThreadTuner, num_steps: int, cost: Callable[[int], float]) -> list[int]:
    """Run decode steps of one token; return the threads they used."""
    used = []
    for _ in range(num_steps):
        num_threads = tuner.choose(1)
        tuner.record(1, num_threads, cost(num_threads))
        used.append(num_threads)
    return used


def test_fastest_number_of_threads_is_used_between_trials() -> None:
    used = run(ThreadTuner(4), 10 * TRIAL_INTERVAL, lambda threads: abs(threads - 2) + 1.0)
    assert set(used[:3]) == {1, 2, 4}
    assert used.count(2) > 0.95 * len(used) - 3


def test_change_of_the_machine_is_noticed() -> None:
    tuner = ThreadTuner(2)
    assert run(tuner, 100, lambda threads: 1 / threads)[-1] == 2
    assert run(tuner, 600, lambda threads: float(threads))[-1] == 1


def test_large_steps_use_all_cores() -> None:
    tuner = ThreadTuner(2)
    run(tuner, 100, lambda threads: float(threads))
    assert tuner.choose(17) == 2


def test_sizes_are_tuned_apart() -> None:
    tuner = ThreadTuner(2)
    run(tuner, 100, lambda threads: float(threads))
    for _ in range(2):
        num_threads = tuner.choose(16)
        tuner.record(16, num_threads, 1 / num_threads)
    assert tuner.choose(16) == 2


@pytest.mark.parametrize(
    ("num_cores", "choices"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_choices_are_powers_of_two_and_all_cores(num_cores: int, choices: list[int]) -> None:
    assert thread_choices(num_cores) == choices


@pytest.mark.parametrize(("text", "at_most"), [("100000 100000", 1), ("50000 100000", 1)])
def test_quota_of_the_container_limits_the_cores(tmp_path: Path, text: str, at_most: int) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert usable_cores(tmp_path / "cpu.max") == at_most


@pytest.mark.parametrize("text", ["max 100000", "", None])
def test_without_a_quota_the_affinity_counts(
    tmp_path: Path, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert usable_cores(tmp_path / "cpu.max") == 3
