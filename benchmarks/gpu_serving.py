"""Throughput and latency of the 8B shape on one GPU, beside what vLLM reaches on it.

    python -m benchmarks.gpu_serving

The engine alone is driven in this process, with the work that an OpenAI-compatible load generator
sends: random prompts, greedy answers of a given length, so many requests at once or at a rate.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.shapes import LLAMA_3_1_8B, RandomWeights
from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.sequence import SamplingParams, SequenceKey, SequenceRequest
from runtime.gpu.runner import GpuRunner
from runtime.model.config import ModelConfig

VOCAB = 49000
CONFIG = EngineConfig(
    max_model_len=8192, max_num_seqs=256, block_size=64, enable_prefix_caching=False
)


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
    """When a request was sent, and when each of its tokens came."""

    sent_at: float
    num_output_tokens: int
    token_times: list[float]


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
    num_steps: int
    goal: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run workloads whose name contains this")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests to send")
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    shape = ModelConfig.from_hf(LLAMA_3_1_8B | {"num_hidden_layers": arguments.layers})
    runner = GpuRunner(shape, CONFIG, RandomWeights(shape))
    began = time.perf_counter()
    runner.load_weights()
    runner.allocate_kv()
    loaded = time.perf_counter()
    runner.warm_up()
    print(
        f"weights {loaded - began:.1f} s, warm-up {time.perf_counter() - loaded:.1f} s, "
        f"{runner.num_kv_blocks} KV blocks, {torch.cuda.get_device_name()}, torch "
        f"{torch.__version__}",
        flush=True,
    )
    engine = Engine(CONFIG, runner, frozenset())
    warm = time.perf_counter()
    while engine.use_idle_time():  # as a server does before the first request, or between two
        pass
    print(f"{runner.num_graphs} graphs in {time.perf_counter() - warm:.1f} s", flush=True)
    for workload in WORKLOADS:
        if arguments.only in workload.name:
            num_requests = max(4, int(workload.num_requests * arguments.scale))
            figures = run_engine(engine, replace(workload, num_requests=num_requests))
            print(json.dumps(asdict(figures)), flush=True)
    print(f"{runner.num_graphs} graphs, {runner.num_late_compilations} late compilations")


def run_engine(engine: Engine, workload: Workload) -> Figures:
    """Drive an idle engine through a workload in this thread."""
    num_steps_before = engine.figures().num_steps
    requests = make_requests(workload)
    arrivals = make_arrivals(workload)
    timelines: dict[int, Timeline] = {}
    live = 0
    waiting = iter(enumerate(requests))
    upcoming = next(waiting, None)
    began = time.perf_counter()
    while upcoming is not None or engine.has_work():
        now = time.perf_counter() - began
        while upcoming and live < workload.concurrency and arrivals[upcoming[0]] <= now:
            id, (prompt, num_output_tokens) = upcoming
            sampling = SamplingParams(
                temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True
            )
            engine.submit(
                SequenceRequest(key=SequenceKey(0, id), prompt_token_ids=prompt, sampling=sampling)
            )
            sent_at = arrivals[id] if workload.rate else now
            timelines[id] = Timeline(sent_at, num_output_tokens, [])
            live += 1
            upcoming = next(waiting, None)
        if not engine.has_work() or engine.spare_s() > 0.0:
            continue
        result = engine.step()
        now = time.perf_counter() - began
        for (_, id), _ in result.tokens:
            timelines[id].token_times.append(now)
        live -= len(result.finished)
    seconds = time.perf_counter() - began
    num_steps = engine.figures().num_steps - num_steps_before
    return summarize(workload, requests, list(timelines.values()), seconds, num_steps)


def make_requests(workload: Workload) -> list[tuple[list[int], int]]:
    """Return prompts and answer lengths, always the same ones."""
    rng = random.Random(0)

    def length(mean: int) -> int:
        return max(1, int(mean * rng.uniform(1 - workload.spread, 1 + workload.spread)))

    return [
        (
            [rng.randrange(3, VOCAB) for _ in range(length(workload.num_input_tokens))],
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
    num_steps: int,
) -> Figures:
    """Return a run's figures; fail if a token is missing."""
    for timeline in timelines:
        assert len(timeline.token_times) == timeline.num_output_tokens, "a token is missing"
    ttfts = [timeline.token_times[0] - timeline.sent_at for timeline in timelines]
    gaps = [
        later - earlier
        for timeline in timelines
        for earlier, later in itertools.pairwise(timeline.token_times)
    ] or [0.0]
    num_input_tokens = sum(len(prompt) for prompt, _ in requests)
    num_output_tokens = sum(len(timeline.token_times) for timeline in timelines)
    return Figures(
        name=workload.name,
        seconds=round(seconds, 2),
        output_tokens_per_s=round(num_output_tokens / seconds, 1),
        input_tokens_per_s=round(num_input_tokens / seconds, 1),
        ttft_p50=_milliseconds(statistics.median(ttfts)),
        ttft_p99=_milliseconds(_percentile(ttfts, 0.99)),
        itl_p50=_milliseconds(statistics.median(gaps)),
        itl_p99=_milliseconds(_percentile(gaps, 0.99)),
        num_steps=num_steps,
        goal=workload.goal,
    )


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 2)


if __name__ == "__main__":
    main()
