"""The engine against `transformers.generate`: same weights, prompts, lengths, process and cores.

Runs of the two are interleaved and medians are compared, so that a busy machine slows both.
Only tokens somebody asked for count: a static batch of mixed lengths runs until its longest
sequence ends, an engine's batch does not.

    python -m benchmarks.cpu_engine
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# As in the runtime: threads that spin take the core another one needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers import AutoConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from runtime.config import EngineConfig
from runtime.cpu.runner import CpuRunner
from runtime.cpu.threads import usable_cores
from runtime.engine.engine import Engine
from runtime.engine.sequence import SamplingParams, SequenceKey, SequenceRequest
from snapshots.builder import BuildOptions, build
from snapshots.loader import load_rank, open_rank, views
from snapshots.sources.gguf import GgufSource
from snapshots.store import SnapshotStore

REPOSITORY = Path(__file__).resolve().parent.parent
STORE = REPOSITORY / ".coldspark" / "benchmark-snapshots"
MODEL = REPOSITORY / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and how many tokens to answer with, whatever they are."""

    prompt: list[int]
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests, and how many are there at once.

    Attributes:
        target: How many times transformers' throughput the engine has to reach.
    """

    name: str
    requests: list[Request]
    concurrency: int
    target: float

    @property
    def num_output_tokens(self) -> int:
        """Tokens that count."""
        return sum(request.num_output_tokens for request in self.requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Output tokens per second: every run, and the ratio of the medians."""

    workload: str
    transformers: list[float]
    engine: list[float]
    ratio: float
    target: float


def main() -> int:
    options = _parse_arguments()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers is untyped
    build_options = BuildOptions(dtype=options.dtype)
    snapshot = build(GgufSource(options.gguf), SnapshotStore(STORE), build_options).snapshot.path
    reference = load_reference(snapshot)
    runner = CpuRunner.open(snapshot, EngineConfig())
    runner.load_weights()
    runner.allocate_kv()
    vocab_size = reference.config.vocab_size
    if not options.json:
        print_header(options)
    results = []
    for workload in workloads(vocab_size, options.output_tokens):
        results.append(compare(workload, reference, runner, num_rounds=options.rounds))
        if not options.json:
            print_row(results[-1])
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    return 0 if all(result.ratio >= result.target for result in results) else 1


def workloads(vocab_size: int, num_output_tokens: int) -> list[Workload]:
    """Return one request at a time, eight alike, and sixteen of mixed lengths."""
    random_source = random.Random(0)

    def request(num_prompt_tokens: int, num_tokens: int) -> Request:
        prompt = [random_source.randrange(100, vocab_size) for _ in range(num_prompt_tokens)]
        return Request(prompt=prompt, num_output_tokens=num_tokens)

    alike = [request(32, num_output_tokens) for _ in range(8)]
    mixed = [
        request(random_source.randint(8, 96), num_output_tokens * quarter // 4)
        for quarter in (1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 6, 10)
    ]
    return [
        Workload(name="1 at a time", requests=alike[:2], concurrency=1, target=1.0),
        Workload(name="8 at once", requests=alike, concurrency=8, target=1.3),
        Workload(name="16 of mixed lengths", requests=mixed, concurrency=16, target=2.0),
    ]


def compare(
    workload: Workload, reference: LlamaForCausalLM, runner: CpuRunner, *, num_rounds: int
) -> Result:
    """Run both by turns, after one turn that does not count."""
    speeds: dict[str, list[float]] = {"transformers": [], "engine": []}
    turns: dict[str, Callable[[Sequence[Request]], None]] = {
        "transformers": lambda requests: run_transformers(reference, requests),
        "engine": lambda requests: run_engine(runner, requests),
    }
    for _ in range(num_rounds + 1):
        for name, run in turns.items():
            torch.set_num_threads(usable_cores())
            started = time.perf_counter()
            for first in range(0, len(workload.requests), workload.concurrency):
                run(workload.requests[first : first + workload.concurrency])
            elapsed_s = time.perf_counter() - started
            speeds[name].append(workload.num_output_tokens / elapsed_s)
    transformers, engine = speeds["transformers"][1:], speeds["engine"][1:]
    return Result(
        workload=workload.name,
        transformers=transformers,
        engine=engine,
        ratio=statistics.median(engine) / statistics.median(transformers),
        target=workload.target,
    )


def run_transformers(model: LlamaForCausalLM, requests: Sequence[Request]) -> None:
    """Generate in one static batch, padded on the left, until the longest answer ends."""
    longest = max(len(request.prompt) for request in requests)
    padding = [longest - len(request.prompt) for request in requests]
    token_ids = [[0] * pad + request.prompt for pad, request in zip(padding, requests, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    num_tokens = max(request.num_output_tokens for request in requests)
    output = model.generate(  # type: ignore[misc]  # transformers is untyped
        torch.tensor(token_ids),
        attention_mask=torch.tensor(mask),
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    assert isinstance(output, torch.Tensor)
    assert output.shape == (len(requests), longest + num_tokens)


def run_engine(runner: CpuRunner, requests: Sequence[Request]) -> None:
    """Generate in one engine; no prefix of an earlier run is reused."""
    config = EngineConfig(enable_prefix_caching=False)
    engine = Engine(config, runner, runner.eos_token_ids)
    for index, request in enumerate(requests):
        engine.submit(
            SequenceRequest(
                key=SequenceKey(0, index),
                prompt_token_ids=request.prompt,
                sampling=SamplingParams(
                    temperature=0.0, max_tokens=request.num_output_tokens, ignore_eos=True
                ),
            )
        )
    num_tokens = 0
    while engine.has_work():
        num_tokens += len(engine.step().tokens)
    assert num_tokens == sum(request.num_output_tokens for request in requests)


def load_reference(snapshot: Path) -> LlamaForCausalLM:
    """Return transformers' model with the very weights the engine reads."""
    rank = open_rank(snapshot)
    slab = torch.empty(rank.data_bytes, dtype=torch.uint8)
    load_rank(rank, slab)
    tensors = views(rank, slab)
    config = AutoConfig.from_pretrained(snapshot)
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, tensors["embed_tokens.weight"].dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_rows(tensors, name.removeprefix("model."), parameter.shape))
    model.train(mode=False)
    return model


def _rows(tensors: dict[str, torch.Tensor], name: str, shape: torch.Size) -> torch.Tensor:
    """Return the rows of an engine tensor that are transformers' parameter `name`."""
    for fused, parts in FUSED.items():
        part = next((part for part in parts if part in name), None)
        if part is not None:
            tensor = tensors[name.replace(part, fused)]
            # Key and value rows come last and are of one size, as gate and up are.
            start = len(tensor) - (len(parts) - parts.index(part)) * shape[0]
            return tensor[max(start, 0) : max(start, 0) + shape[0]]
    return tensors[name][: shape[0]]


def print_header(options: argparse.Namespace) -> None:
    print(f"{options.gguf.name} in {options.dtype}, {usable_cores()} cores of {_processor()}")
    print(f"torch {torch.__version__}; medians of {options.rounds} interleaved runs; output tok/s")
    print(f"{'':<22}{'transformers':>14}{'coldspark':>12}{'ratio':>8}{'target':>8}", flush=True)


def print_row(result: Result) -> None:
    print(
        f"{result.workload:<22}{statistics.median(result.transformers):>14.1f}"
        f"{statistics.median(result.engine):>12.1f}{result.ratio:>8.2f}{result.target:>8.1f}",
        flush=True,
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gguf", type=Path, default=MODEL, help="a Llama in a GGUF file")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5, help="runs that count")
    parser.add_argument("--output-tokens", type=int, default=64, help="per answer, or on average")
    parser.add_argument("--json", action="store_true", help="print every run")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
