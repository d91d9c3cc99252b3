"""What is asked of a server in the serving benchmarks, and what is read from its answers.

Random prompts from fixed seeds, greedy answers of given lengths: every server does the same work.
"""

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

VOCAB = range(3, 49000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of one kind.

    Attributes:
        spread: Lengths are uniform in [x * (1 - spread), x * (1 + spread)].
        rate: Requests a second, Poisson; 0 sends as fast as the concurrency allows.
        goal: What must be reached, for people.
    """

    name: str
    num_requests: int
    concurrency: int
    num_input_tokens: int
    num_output_tokens: int
    spread: float = 0.0
    rate: float = 0.0
    goal: str = ""


WORKLOADS = (
    Workload(
        name="256 at once, 512/256",
        num_requests=1024,
        concurrency=256,
        num_input_tokens=512,
        num_output_tokens=256,
        goal="10000 out tok/s",
    ),
    Workload(
        name="64 at once, 512/256",
        num_requests=256,
        concurrency=64,
        num_input_tokens=512,
        num_output_tokens=256,
        goal="6800 out tok/s",
    ),
    Workload(
        name="1 at a time, 128/256",
        num_requests=8,
        concurrency=1,
        num_input_tokens=128,
        num_output_tokens=256,
        goal="225 out tok/s",
    ),
    Workload(
        name="prefill, 32 at once, 4096/1",
        num_requests=128,
        concurrency=32,
        num_input_tokens=4096,
        num_output_tokens=1,
        goal="41500 in tok/s",
    ),
    Workload(
        name="Poisson 20/s, 512/128 +-80 %",
        num_requests=600,
        concurrency=1024,
        num_input_tokens=512,
        num_output_tokens=128,
        spread=0.8,
        rate=20.0,
        goal="TTFT 28/55 ms, ITL p99 14 ms",
    ),
)


@dataclass(slots=True)
class Timeline:
    """When a request was sent, and when anything of its answer came."""

    sent_at: float
    event_times: list[float]
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a run of a workload gave; milliseconds."""

    name: str
    seconds: float
    output_tokens_per_s: float
    input_tokens_per_s: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    goal: str


def scaled(workload: Workload, share: float) -> Workload:
    """Return a workload with a share of the requests."""
    return replace(workload, num_requests=max(4, int(workload.num_requests * share)))


def make_requests(workload: Workload) -> list[tuple[list[int], int]]:
    """Return prompts and answer lengths, always the same ones."""
    rng = random.Random(0)

    def length(mean: int) -> int:
        return max(1, int(mean * rng.uniform(1 - workload.spread, 1 + workload.spread)))

    return [
        (
            [rng.choice(VOCAB) for _ in range(length(workload.num_input_tokens))],
            length(workload.num_output_tokens),
        )
        for _ in range(workload.num_requests)
    ]


def make_arrivals(workload: Workload) -> list[float]:
    """Return when each request is sent, in seconds."""
    if not workload.rate:
        return [0.0] * workload.num_requests
    rng = random.Random(1)
    gaps = (rng.expovariate(workload.rate) for _ in range(workload.num_requests))
    return list(itertools.accumulate(gaps))


def summarize(
    workload: Workload,
    requests: Sequence[tuple[list[int], int]],
    timelines: Sequence[Timeline],
    seconds: float,
) -> Figures:
    """Return a run's figures."""
    ttfts = [timeline.event_times[0] - timeline.sent_at for timeline in timelines]
    gaps = [
        later - earlier
        for timeline in timelines
        for earlier, later in itertools.pairwise(timeline.event_times)
    ] or [0.0]
    num_input_tokens = sum(len(prompt) for prompt, _ in requests)
    num_output_tokens = sum(timeline.num_output_tokens for timeline in timelines)
    return Figures(
        name=workload.name,
        seconds=round(seconds, 2),
        output_tokens_per_s=round(num_output_tokens / seconds, 1),
        input_tokens_per_s=round(num_input_tokens / seconds, 1),
        ttft_p50=_milliseconds(statistics.median(ttfts)),
        ttft_p99=_milliseconds(_percentile(ttfts, 0.99)),
        itl_p50=_milliseconds(statistics.median(gaps)),
        itl_p99=_milliseconds(_percentile(gaps, 0.99)),
        goal=workload.goal,
    )


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 2)
