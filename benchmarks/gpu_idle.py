"""Share of the time in which a GPU that serves the 8B shape runs nothing.

    python -m benchmarks.gpu_idle [--tokenizer DIR] [--concurrency 256] [--steps 400]

By a trace of all kernels and copies of so many steps of the engine alone, in the middle of a run
with that many requests at once; the same run without the trace tells what tracing costs. With
--tokenizer, which `benchmarks.gpu_serving` explains, through the whole product too, by the driver's
own counter: of every sixth of a second, how much of it something ran. Exits with 1 if the engine
leaves the GPU idle for 3 % of the time.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pynvml
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_serving import NAME, run_engine, serving_8b, start_engine
from benchmarks.openai_load import run_openai
from benchmarks.serving_load import WORKLOADS, Workload

MAX_IDLE_SHARE = 0.03
BETWEEN_STEPS_US = 20.0
"""A pause that is longer is not one between two kernels of a step."""
GPU_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
NUM_SHOWN = 12
SAMPLE_S = 1 / 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokenizer", type=Path, help="directory with a tokenizer.json")
    parser.add_argument("--work", type=Path, default=Path("/tmp/coldspark-8b"))
    arguments = parser.parse_args()
    workload = replace(
        WORKLOADS[0],
        num_requests=3 * arguments.concurrency,
        concurrency=arguments.concurrency,
    )
    if arguments.tokenizer:
        watch_product(workload, arguments.work, arguments.tokenizer, arguments.layers)
    idle_share = trace_engine(workload, arguments.steps, arguments.layers)
    if idle_share >= MAX_IDLE_SHARE:
        sys.exit(f"the GPU is idle for more than {MAX_IDLE_SHARE:.0%} of the time")


def trace_engine(workload: Workload, num_steps: int, num_layers: int) -> float:
    """Print what the engine alone lets the GPU do; return the share of the time it does nothing."""
    engine, _ = start_engine(num_layers)
    plain = run_engine(engine, workload)
    trace = profile(activities=[ProfilerActivity.CUDA])
    step = 0

    def count() -> None:
        nonlocal step
        step += 1
        if step == num_steps:
            trace.start()
        elif step == 2 * num_steps:
            trace.stop()

    traced = run_engine(engine, workload, after_step=count)
    if step < 2 * num_steps:
        sys.exit(f"the run had {step} steps, fewer than twice --steps")
    print(f"out tok/s: {plain.output_tokens_per_s}, traced {traced.output_tokens_per_s}")
    spans = gpu_spans(trace)
    by_name: defaultdict[str, float] = defaultdict(float)
    for name, start, end in spans:
        by_name[name] += end - start
    pauses = list(idle_spans(spans))
    whole = max(end for *_, end in spans) - min(start for _, start, _ in spans)
    idle = sum(pauses)
    between = sum(pause for pause in pauses if pause > BETWEEN_STEPS_US)
    print(f"{num_steps} steps in {whole / 1e6:.2f} s, {len(spans)} kernels and copies")
    print(f"idle {idle / whole:.2%}, of it {between / whole:.2%} between steps")
    for name, microseconds in sorted(by_name.items(), key=lambda item: -item[1])[:NUM_SHOWN]:
        print(f"{microseconds / whole:7.2%} {name[:90]}")
    return idle / whole


def gpu_spans(trace: profile) -> Sequence[tuple[str, float, float]]:
    """Return name, begin and end in microseconds of all that ran on the GPU, by their begin."""
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    spans = [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in GPU_CATEGORIES
    ]
    return sorted(spans, key=lambda span: span[1])


def idle_spans(spans: Sequence[tuple[str, float, float]]) -> Iterator[float]:
    """Yield the microseconds of each pause in which nothing of any stream ran."""
    busy_until = spans[0][1]
    for _, start, end in spans:
        if start > busy_until:
            yield start - busy_until
        busy_until = max(busy_until, end)


def watch_product(workload: Workload, work: Path, tokenizer: Path, num_layers: int) -> None:
    """Print what the driver says of the GPU's use while the whole product is asked."""
    with serving_8b(work, tokenizer, num_layers) as controller:
        with utilization() as samples:
            figures = run_openai(controller.url, NAME, workload)
        middle = samples[len(samples) // 4 : -len(samples) // 4]
        print(
            f"product: {figures.output_tokens_per_s} out tok/s, GPU in use for "
            f"{statistics.mean(middle):.1f} % of the time ({len(middle)} samples, least "
            f"{min(middle)} %)",
            flush=True,
        )


@contextmanager
def utilization() -> Iterator[list[int]]:
    """Collect how many percent of the time something runs on the first GPU."""
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    samples: list[int] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(SAMPLE_S):
            samples.append(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield samples
    finally:
        is_over.set()
        watching.join()


if __name__ == "__main__":
    main()
