"""Client-side wait for the first token of SmolLM2 on this machine's CPU, by tier.

`python -m benchmarks.wake_cpu [--runs 10]` starts a controller of its own, and measures from the
request to the first streamed byte of content through the official SDK: warm, from parked, and
from stopped (a new process, torch imported anew). Exits with 1 if a median misses its goal.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import openai
from rich.console import Console
from rich.table import Table

from benchmarks.local import Controller, running_controller, smollm2

GOALS_S = {"ready": None, "parked": 1.0, "stopped": 5.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="measurements a tier")
    parser.add_argument("--home", type=Path, help="home directory, to reuse its snapshot")
    arguments = parser.parse_args()
    home = arguments.home or Path(tempfile.mkdtemp(prefix="coldspark-wake-"))
    spec = smollm2(idle_timeout=None)
    with running_controller(home) as controller:
        controller.deploy(spec)
        waits = {
            "stopped": _measure(
                controller, spec.name, arguments.runs, lambda: _stop(controller, spec.name)
            ),
            "parked": _measure(
                controller, spec.name, arguments.runs, lambda: _park(controller, spec.name)
            ),
            "ready": _measure(controller, spec.name, arguments.runs, lambda: None),
        }
    _print(waits)
    missed = _missed(waits)
    if missed:
        sys.exit(f"the median misses its goal from {', '.join(missed)}")


def _measure(
    controller: Controller, name: str, num_runs: int, prepare: Callable[[], None]
) -> list[float]:
    client = controller.client()
    waits = []
    for _ in range(num_runs):
        prepare()
        waits.append(_first_token_s(client, name))
    return waits


def _first_token_s(client: openai.OpenAI, model: str) -> float:
    started_at = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=4,
        temperature=0,
        stream=True,
    )
    first_at = None
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            first_at = first_at or time.perf_counter()
    if first_at is None:
        raise RuntimeError("the stream ended without a token")
    return first_at - started_at


def _park(controller: Controller, name: str) -> None:
    controller.operate(name, "warm")
    controller.operate(name, "park")


def _stop(controller: Controller, name: str) -> None:
    controller.operate(name, "stop")


def _missed(waits: dict[str, list[float]]) -> list[str]:
    """Return the tiers whose median is over their goal."""
    medians = {tier: statistics.median(seconds) for tier, seconds in waits.items()}
    return [
        tier for tier, goal_s in GOALS_S.items() if goal_s is not None and medians[tier] > goal_s
    ]


def _print(waits: dict[str, list[float]]) -> None:
    table = Table("from", "runs", "p50 s", "p95 s", "worst s", "goal s")
    for tier, seconds in waits.items():
        ranked = sorted(seconds)
        p95 = ranked[min(round(0.95 * len(ranked)), len(ranked) - 1)]
        goal = GOALS_S[tier]
        figures = (statistics.median(ranked), p95, ranked[-1])
        table.add_row(
            tier,
            str(len(ranked)),
            *(f"{s:.3f}" for s in figures),
            "" if goal is None else f"{goal:g}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
