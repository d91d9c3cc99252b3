"""Waits for a first token, by how cold the function was."""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.local import Controller


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """One wait for a first token.

    Attributes:
        seconds: By the client's clock.
        explained: Share of it that the timeline of the cold start adds up to; None without one.
        num_tokens: Tokens that had come a second after the first.
    """

    seconds: float
    explained: float | None
    num_tokens: int


MIN_EXPLAINED = 0.98
"""Of a wait, in the median, by the timeline that comes with the answer."""

Waits = dict[str, list[Wait]]
Goals = Mapping[str, float | None]


def measure_tiers(
    controller: Controller,
    name: str,
    num_runs: int,
    tiers: Sequence[str],
    *,
    backend: str = "process",
    max_tokens: int = 4,
    idle_s: float = 0.0,
) -> Waits:
    """Return the client's waits, `num_runs` from each tier, each after it was idle for a while.

    From "stopped" means that nothing runs: the controller must keep no standby then.
    """
    prepare: Mapping[str, Callable[[], object]] = {
        "stopped": lambda: controller.operate(name, "stop"),
        "standby": lambda: _stop_to_standby(controller, name, backend),
        "parked": lambda: _park(controller, name),
        "ready": lambda: None,
    }
    waits: Waits = {tier: [] for tier in tiers}
    with httpx.Client(base_url=controller.url, timeout=900.0) as client:
        client.get("/v1/models")  # what a client does once is not in a wait
        for tier in tiers:
            for _ in range(num_runs):
                prepare[tier]()
                time.sleep(idle_s)
                asked_at = datetime.now(tz=UTC)
                seconds, num_tokens = _first_token(client, name, max_tokens)
                told_s = None if tier == "ready" else _timeline_s(controller, name, asked_at)
                explained = None if told_s is None else told_s / seconds
                waits[tier].append(
                    Wait(seconds=seconds, explained=explained, num_tokens=num_tokens)
                )
    return waits


def missed(waits: Waits, goals: Goals) -> list[str]:
    """Return what is too slow in the median, and what its timeline does not explain."""
    late = []
    for tier, found in waits.items():
        goal_s = goals[tier]
        if goal_s is not None and statistics.median(wait.seconds for wait in found) > goal_s:
            late.append(f"the median from {tier} is over {goal_s:g} s")
        shares = [wait.explained for wait in found if wait.explained is not None]
        if shares and statistics.median(shares) < MIN_EXPLAINED:
            late.append(f"less than {MIN_EXPLAINED:.0%} of a wait from {tier} is explained")
    return late


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that so large a share of all is no greater than."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def print_waits(waits: Waits, goals: Goals) -> None:
    """Print median, 95th percentile and worst of each tier beside its goal.

    Beside them stand the share of a wait that its timeline explains, the median and the least, and
    the median of tokens that had come a second after the first.
    """
    table = Table("from", "runs", "p50 s", "p95 s", "worst s", "goal s", "explained", "tokens")
    for tier, found in waits.items():
        ranked = sorted(wait.seconds for wait in found)
        shares = [wait.explained for wait in found if wait.explained is not None]
        goal = goals[tier]
        figures = (statistics.median(ranked), percentile(ranked, 0.95), ranked[-1])
        table.add_row(
            tier,
            str(len(ranked)),
            *(f"{s:.3f}" for s in figures),
            "" if goal is None else f"{goal:g}",
            f"{100 * statistics.median(shares):.1f} ({100 * min(shares):.1f}) %" if shares else "",
            f"{statistics.median(wait.num_tokens for wait in found):g}",
        )
    Console().print(table)


def _timeline_s(controller: Controller, name: str, since: datetime) -> float:
    """Wait for the record of the cold start since then; return what its phases add up to."""
    for _ in range(100):
        found = controller.get("/api/v1/cold-starts", function=name, limit=1)["cold_starts"]
        if found and datetime.fromisoformat(found[0]["started_at"]) >= since:
            return float(sum(phase["seconds"] for phase in found[0]["phases"]))
        time.sleep(0.1)
    raise RuntimeError(f"no cold start of {name} was recorded since {since}")


def _first_token(client: httpx.Client, model: str, max_tokens: int) -> tuple[float, int]:
    """Return the wait in seconds, and how many tokens had come a second after the first."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    started_at = time.perf_counter()
    first_at, num_tokens = None, 0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            now = time.perf_counter()
            if not line.startswith("data: {"):
                continue
            count = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
            if first_at is None and count:  # its text may be empty, when it is half a character
                first_at = now
            if first_at is None or now < first_at + 1.0:
                num_tokens = max(num_tokens, count)
    if first_at is None:
        raise RuntimeError("the stream ended without a token")
    return first_at - started_at, num_tokens


def _stop_to_standby(controller: Controller, name: str, backend: str) -> None:
    controller.operate(name, "stop")
    controller.wait_for_standby(backend)


def _park(controller: Controller, name: str) -> None:
    controller.operate(name, "warm")
    controller.operate(name, "park")
