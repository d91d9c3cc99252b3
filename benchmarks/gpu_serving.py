"""Throughput and latency of the 8B shape on one GPU: the engine alone, and the whole product.

    python -m benchmarks.gpu_serving --tokenizer DIR [--work /tmp/coldspark-8b]

The engine alone is driven in a process of its own. The product is a controller, a runtime of the
process backend and streaming calls of /v1/completions over HTTP from this process. DIR holds the
tokenizer.json of any small model; the checkpoint of random weights and its snapshot, 16 GB each,
are made in the working directory and used again. Without --tokenizer only the engine runs. Exits
with 1 if the product has less than 95 % of the engine's throughput.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.local import Controller, running_controller
from benchmarks.openai_load import run_openai
from benchmarks.random_checkpoint import write_checkpoint_apart
from benchmarks.serving_load import (
    WORKLOADS,
    Figures,
    Timeline,
    Workload,
    make_arrivals,
    make_requests,
    scaled,
    summarize,
)
from benchmarks.shapes import LLAMA_3_1_8B, RandomWeights
from functions.spec import FunctionSpec
from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.sequence import SamplingParams, SequenceKey, SequenceRequest
from runtime.gpu.context import ContextInMaking
from runtime.gpu.runner import GpuRunner
from runtime.model.config import ModelConfig

ENGINE: dict[str, Any] = {
    "max_model_len": 8192,
    "max_num_seqs": 256,
    "block_size": 64,
    "enable_prefix_caching": False,  # as the figures to beat were measured
}
NAME = "llama-8b"
MAX_GAP = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run workloads whose name contains this")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the requests to send")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokenizer", type=Path, help="directory with a tokenizer.json")
    parser.add_argument("--work", type=Path, default=Path("/tmp/coldspark-8b"))
    parser.add_argument("--engine", action="store_true", help="run the engine, print JSON lines")
    arguments = parser.parse_args()
    chosen = [workload for workload in WORKLOADS if arguments.only in workload.name]
    workloads = [scaled(workload, arguments.scale) for workload in chosen]
    if arguments.engine:
        measure_engine(workloads, arguments.layers)
        return
    columns = {"engine": run_engine_apart(sys.argv[1:])}
    if arguments.tokenizer:
        with serving_8b(arguments.work, arguments.tokenizer, arguments.layers) as controller:
            columns["product"] = [run_openai(controller.url, NAME, each) for each in workloads]
    print_table(columns)
    if "product" in columns:
        wide = [row for row in zip(*columns.values(), strict=True) if gap(*row) > MAX_GAP]
        if wide:
            sys.exit(f"the product is more than {MAX_GAP:.0%} behind: {wide[0][0].name}")


def gap(engine: Figures, product: Figures) -> float:
    """Return the share of the engine's throughput that is lost on the way to a client."""
    return 1 - product.output_tokens_per_s / engine.output_tokens_per_s


def run_engine_apart(arguments: Sequence[str]) -> list[Figures]:
    """Measure the engine in a process that gives the GPU back at its end."""
    command = [sys.executable, "-m", "benchmarks.gpu_serving", "--engine", *arguments]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(lines, end="", flush=True)
    return [Figures(**json.loads(line)) for line in lines.splitlines() if line.startswith("{")]


def measure_engine(workloads: Sequence[Workload], num_layers: int) -> None:
    """Run workloads on an engine in this process and print a line of JSON for each."""
    engine, runner = start_engine(num_layers)
    for workload in workloads:
        print(json.dumps(asdict(run_engine(engine, workload))), flush=True)
    print(f"{runner.num_graphs} graphs, {runner.num_late_compilations} late compilations")


def start_engine(num_layers: int) -> tuple[Engine, GpuRunner]:
    """Return an engine with random weights, warm, its graphs captured."""
    ContextInMaking().wait()
    config = EngineConfig(**ENGINE)
    shape = ModelConfig.from_hf(LLAMA_3_1_8B | {"num_hidden_layers": num_layers})
    runner = GpuRunner(shape, config, RandomWeights(shape))
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
    engine = Engine(config, runner, frozenset())
    warm = time.perf_counter()
    while engine.use_idle_time():  # as a server does before the first request, or between two
        pass
    print(f"{runner.num_graphs} graphs in {time.perf_counter() - warm:.1f} s", flush=True)
    return engine, runner


def run_engine(
    engine: Engine, workload: Workload, after_step: Callable[[], None] | None = None
) -> Figures:
    """Drive an idle engine through a workload in this thread.

    Args:
        engine: It has no work yet.
        workload: What to ask of it.
        after_step: Called after each step.
    """
    requests, arrivals = make_requests(workload), make_arrivals(workload)
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
            timelines[id] = Timeline(arrivals[id] if workload.rate else now, [])
            live += 1
            upcoming = next(waiting, None)
        if not engine.has_work() or engine.spare_s() > 0.0:
            continue
        result = engine.step()
        now = time.perf_counter() - began
        for (_, id), _ in result.tokens:
            timelines[id].event_times.append(now)
        for finished in result.finished:
            timelines[finished.key.sequence_id].num_output_tokens = finished.num_output_tokens
        live -= len(result.finished)
        if after_step is not None:
            after_step()
    return summarize(workload, requests, list(timelines.values()), time.perf_counter() - began)


@contextmanager
def serving_8b(
    work: Path,
    tokenizer: Path,
    num_layers: int = 32,
    *,
    backend: str = "process",
    num_standbys: int = 0,
    park: str = "deep",
    host_cache_bytes: int = 0,
) -> Iterator[Controller]:
    """Run a controller with the 8B shape deployed, ready, and its start's profile recorded.

    With a host cache the weights are in it.
    """
    checkpoint = work / f"checkpoint-{num_layers}"
    if not checkpoint.exists():
        write_checkpoint_apart(checkpoint, tokenizer, num_layers)
    spec = FunctionSpec.model_validate(
        {
            "name": NAME,
            "model": {"source": str(checkpoint), "max_model_len": ENGINE["max_model_len"]},
            "engine": {key: value for key, value in ENGINE.items() if key != "max_model_len"},
            "resources": {"gpus": 1},
            "scaling": {
                "max_replicas": 1,
                "target_concurrency": 256,
                "idle_timeout": None,
                "park": park,
            },
        }
    )
    with running_controller(
        work / "home", num_standbys=num_standbys, host_cache_bytes=host_cache_bytes
    ) as controller:
        began = time.perf_counter()
        controller.deploy(spec, backend)
        deployed = time.perf_counter()
        controller.operate(NAME, "warm")
        print(
            f"snapshot {deployed - began:.1f} s, from stopped to ready "
            f"{time.perf_counter() - deployed:.1f} s",
            flush=True,
        )
        controller.operate(NAME, "profile")  # as a first quiet second would
        if host_cache_bytes:
            controller.wait_for_host_cache()
        yield controller


def print_table(columns: dict[str, list[Figures]]) -> None:
    """Print each workload's figures, a line for each column."""
    names = [name for name in asdict(columns["engine"][0]) if name not in ("name", "goal")]
    print(f"{'':30}{'':9}" + "".join(f"{name.removesuffix('_tokens_per_s'):>12}" for name in names))
    for row in zip(*columns.values(), strict=True):
        print(f"{row[0].name}, to reach {row[0].goal}")
        for column, figures in zip(columns, row, strict=True):
            values = asdict(figures)
            print(f"{'':30}{column:9}" + "".join(f"{values[name]:>12}" for name in names))
        if len(row) > 1:
            first_token = f"{row[1].ttft_p50 - row[0].ttft_p50:+.1f} ms to the first token"
            print(f"{'':30}{'gap':9}{gap(*row):>12.1%}  {first_token}")


if __name__ == "__main__":
    main()
