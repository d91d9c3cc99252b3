"""Many functions on one device, called at random: every answer checked, every wait measured.

    python -m benchmarks.shared_device --tokenizer DIR [--functions 10] [--seconds 300]
        [--device cuda --layers 32 --host-cache-gib 0] [--plot docs/shared-device.svg]

Makes that many checkpoints of the 8B shape with their own random weights (on the CPU of a small
shape), deploys each as a function that needs the whole device, and calls them one after the other
in random order, with pauses of a second on average. Each function's greedy answer to one prompt is
taken while it is alone, its canary; every later answer must be the same, token for token. The
memory in use is sampled all the while, and what of it the controller takes for other processes'.
Functions of an earlier run in the same working directory are used again. Exits with 1 if an answer
was wrong or missing.
"""

import argparse
import random
import shutil
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pygal
from rich.console import Console
from rich.table import Table

from benchmarks.local import Controller, running_controller
from benchmarks.random_checkpoint import write_checkpoint, write_checkpoint_apart
from benchmarks.shapes import LLAMA_3_1_8B
from functions.spec import FunctionSpec

SMALL = LLAMA_3_1_8B | {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
PROMPT = "The quick brown fox"
NUM_TOKENS = 8
MEAN_PAUSE_S = 1.0
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="of any small model")
    parser.add_argument("--functions", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=32, help="of the 8B shape, on a GPU")
    parser.add_argument("--host-cache-gib", type=int, default=0, help="memory to hold weights in")
    parser.add_argument("--work", type=Path, default=Path("/tmp/coldspark-shared"))
    parser.add_argument("--checkpoints", type=Path, help="where to make them, if not in --work")
    parser.add_argument("--plot", type=Path, help="where to draw the waits, as SVG")
    arguments = parser.parse_args()
    names = [f"f{number}" for number in range(arguments.functions)]
    host_cache_bytes = arguments.host_cache_gib * GIB
    home = arguments.work / "home"
    with running_controller(home, host_cache_bytes=host_cache_bytes) as controller:
        device = _device(controller, arguments.device)
        deployed = {
            function["name"] for function in controller.get("/api/v1/functions")["functions"]
        }
        missing = [name for name in names if name not in deployed]

        def write(name: str) -> Path:
            checkpoint: Path = (arguments.checkpoints or arguments.work) / name
            seed = names.index(name)
            if arguments.device == "cuda":
                write_checkpoint_apart(checkpoint, arguments.tokenizer, arguments.layers, seed)
            else:
                write_checkpoint(checkpoint, SMALL, arguments.tokenizer, "cpu", seed=seed)
            return checkpoint

        for name, checkpoint in zip(missing, _one_ahead(write, missing), strict=True):
            controller.deploy(_spec(name, checkpoint, device))
            shutil.rmtree(checkpoint)  # the snapshot is all that is used from here on
        if host_cache_bytes:
            controller.wait_for_host_cache()
        with _memory_watch(controller, str(device["id"])) as most:
            waits = _call_at_random(controller, names, arguments.seconds)
    _print(waits, most)
    if arguments.plot is not None:
        _plot(waits, arguments.plot)


def _one_ahead(make: Callable[[str], Path], names: Sequence[str]) -> Iterator[Path]:
    """Yield what is made of each name; the next one is made meanwhile."""
    with ThreadPoolExecutor(1) as maker:
        upcoming: deque[Future[Path]] = deque()
        for name in names:
            upcoming.append(maker.submit(make, name))
            if len(upcoming) > 1:
                yield upcoming.popleft().result()
        while upcoming:
            yield upcoming.popleft().result()


def _spec(name: str, checkpoint: Path, device: Mapping[str, object]) -> FunctionSpec:
    is_gpu = device["kind"] == "gpu"
    whole_bytes = int(str(device["memory_bytes"]))
    return FunctionSpec.model_validate(
        {
            "name": name,
            "model": {"source": str(checkpoint), "max_model_len": 2048},
            "engine": {"max_num_seqs": 64},
            # On the CPU a promise of more than half keeps others out, as a GPU's 90 % does.
            "resources": {"gpus": 1} if is_gpu else {"gpus": 0, "memory": int(0.6 * whole_bytes)},
            "scaling": {"max_replicas": 1, "idle_timeout": None},
        }
        | ({} if is_gpu else {"engine": {"max_num_seqs": 8, "kv_cache_memory_bytes": "64Mi"}})
    )


def _call_at_random(
    controller: Controller, names: Sequence[str], seconds: float
) -> Mapping[str, Sequence[float]]:
    """Return the waits for a first token by the tier the call met."""
    client, chance = controller.client(), random.Random(0)
    canaries = {name: _ask(client, name)[1] for name in names}
    if len(set(canaries.values())) < len(names):
        sys.exit("two functions gave the same canary: it proves nothing")
    waits: defaultdict[str, list[float]] = defaultdict(list)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        name = chance.choice(names)
        tier, answer, wait_s = _ask(client, name)
        if answer != canaries[name]:
            sys.exit(f"{name} answered the tokens {answer} instead of {canaries[name]}")
        waits[tier].append(wait_s)
        time.sleep(chance.expovariate(1 / MEAN_PAUSE_S))
    return waits


def _ask(client: openai.OpenAI, name: str) -> tuple[str, tuple[int, ...], float]:
    """Return the tier the call met, the answer's token ids, and the wait for its first token.

    Ids, since texts can hide a difference: every broken character looks alike.
    """
    began = time.perf_counter()
    response = client.completions.with_raw_response.create(
        model=name,
        prompt=PROMPT,
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True},
    )
    first_at, token_ids = None, list[int]()
    for chunk in response.parse():
        first_at = first_at or time.perf_counter()
        for choice in chunk.choices:
            token_ids += (choice.model_extra or {})["token_ids"]
    if first_at is None or not token_ids:
        sys.exit(f"{name} answered nothing")
    return response.headers["x-coldspark-tier"], tuple(token_ids), first_at - began


def _device(controller: Controller, kind: str) -> Mapping[str, object]:
    wanted = "gpu" if kind == "cuda" else "cpu"
    devices = controller.get("/api/v1/status")["devices"]
    found: Mapping[str, object] = next(one for one in devices if one["kind"] == wanted)
    return found


@contextmanager
def _memory_watch(controller: Controller, device_id: str) -> Iterator[Counter[str]]:
    """Keep the most bytes of a device that were in use, and that were foreign, by field."""
    most, is_over = Counter[str](), threading.Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            devices = controller.get("/api/v1/status")["devices"]
            device = next(one for one in devices if one["id"] == device_id)
            for field in ("used_bytes", "foreign_bytes"):
                most[field] = max(most[field], device[field] or 0)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield most
    finally:
        is_over.set()
        watching.join()


def _print(waits: Mapping[str, Sequence[float]], most: Mapping[str, int]) -> None:
    table = Table("met", "calls", "p50 s", "p95 s", "worst s")
    for tier, found in sorted(waits.items()):
        ranked = sorted(found)
        p95 = ranked[min(round(0.95 * len(ranked)), len(ranked) - 1)]
        figures = (statistics.median(ranked), p95, ranked[-1])
        table.add_row(tier, str(len(ranked)), *(f"{seconds:.3f}" for seconds in figures))
    Console().print(table)
    num_calls = sum(map(len, waits.values()))
    print(
        f"{num_calls} calls, each with its canary; most memory in use "
        f"{most['used_bytes'] / GIB:.2f} GiB, foreign {most['foreign_bytes'] / GIB:.2f} GiB"
    )


def _plot(waits: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw the share of calls that waited no longer than so many seconds."""
    chart = pygal.XY(
        stroke=True,
        show_dots=False,
        x_title="seconds to the first token",
        y_title="share of calls, %",
        title="Functions that share one device, called at random",
    )
    for tier, found in sorted(waits.items()):
        ranked = sorted(found)
        chart.add(tier, [(s, 100 * (i + 1) / len(ranked)) for i, s in enumerate(ranked)])
    chart.render_to_file(str(path))


if __name__ == "__main__":
    main()
