"""Client-side wait for the first token of the 8B shape on one GPU, by tier, with its phases.

    python -m benchmarks.gpu_cold_start --tokenizer DIR [--runs 10] [--backend docker]
        [--page-cache]

From the request to the first streamed token by the client's clock, one request at a time, the
weights in the host cache, or with --page-cache only there: warm, from parked deep and light, from
standby, and from stopped with no runtime at all. Then how long it takes from an idle timeout to
parked, and what stays on the GPU. DIR holds the tokenizer.json of any small model. Exits with 1 if
a median misses its goal, or if a timeline does not explain its wait.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pynvml
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_serving import NAME, serving_8b
from benchmarks.local import Controller
from benchmarks.waits import measure_tiers, missed, percentile, print_waits

GOALS_S = {
    "ready": None,
    "parked deep": 0.72,
    "parked light": 0.47,
    "standby": 1.0,
    "stopped": 6.0,
}
CONTAINER_GOALS_S = GOALS_S | {"stopped": 8.0}
PARKING_GOAL_S = 0.6
PARTS: Mapping[str, tuple[int, str, Sequence[str]]] = {
    "cold": (0, "deep", ["stopped"]),
    "deep": (1, "deep", ["standby", "parked", "ready"]),
    "light": (0, "light", ["parked"]),
}
"""Measured with controllers of their own: how many standbys they keep, how they park, the tiers."""
HOST_CACHE_BYTES = 20 << 30
MAX_TOKENS = 400
"""More than the GPU generates in the second after the first token."""
IDLE_S = 1.0
"""Before each request. For a third of a second after memory was freed, the driver clears it."""
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="measurements a tier")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--backend", choices=["process", "docker"], default="process")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to measure; all")
    parser.add_argument("--page-cache", action="store_true", help="without the host cache")
    parser.add_argument("--work", type=Path, default=Path("/tmp/coldspark-8b"))
    arguments = parser.parse_args()
    goals = GOALS_S if arguments.backend == "process" else CONTAINER_GOALS_S
    late = []
    for part in arguments.only or PARTS:
        num_standbys, park, tiers = PARTS[part]
        with serving_8b(
            arguments.work,
            arguments.tokenizer,
            arguments.layers,
            backend=arguments.backend,
            num_standbys=num_standbys,
            park=park,
            host_cache_bytes=0 if arguments.page_cache else HOST_CACHE_BYTES,
        ) as controller:
            found = measure_tiers(
                controller,
                NAME,
                arguments.runs,
                tiers,
                backend=arguments.backend,
                max_tokens=MAX_TOKENS,
                idle_s=IDLE_S,
            )
            new = {f"parked {park}" if tier == "parked" else tier: found[tier] for tier in found}
            print_waits(new, goals)
            late += missed(new, goals)
            num_cold = arguments.runs * sum(tier != "ready" for tier in tiers)
            _print_phases(controller, num_cold)
            _print_profile(controller)
            if "parked" in tiers:
                late += _print_parking(controller, park, arguments.runs)
    if late:
        sys.exit("; ".join(late))


def _print_phases(controller: Controller, limit: int) -> None:
    """Print the median of each phase of the last cold starts, in milliseconds, and its rate."""
    found = controller.get("/api/v1/cold-starts", function=NAME, limit=limit)["cold_starts"]
    times: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rates: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cold_start in found:
        for phase in cold_start["phases"]:
            times[cold_start["from_tier"]][phase["name"]].append(1000 * phase["seconds"])
            rates[cold_start["from_tier"]][phase["name"]].append(phase["gb_per_s"])
    for tier, by_name in times.items():
        print(f"{tier}, ms:", _medians(by_name, ".0f"))
        print(f"{tier}, GB/s:", _medians(rates[tier], ".1f"), flush=True)


def _print_profile(controller: Controller) -> None:
    """Print what the last start took from the snapshot's profile."""
    for replica in controller.view(NAME)["replicas"]:
        use = replica["profile"]
        told = "used" if use["is_used"] else f"not used: {use['reason']}"
        print(f"profile {told}, {use['num_compilations']} kernels compiled", flush=True)


def _print_parking(controller: Controller, park: str, num_runs: int) -> list[str]:
    """Print how long parking takes, until the memory is free, and what stays on the GPU.

    What stays is told by the driver twice: for all processes, and in use without its own reserve.

    Returns:
        What is too slow.
    """
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    seconds, kept_mib = [], []
    for _ in range(num_runs):
        controller.operate(NAME, "warm")
        time.sleep(IDLE_S)  # what is parked was idle
        seconds.append(controller.time_operation(NAME, "park"))
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        kept_mib.append(sum(process.usedGpuMemory or 0 for process in processes) / MIB)
    table = Table(f"to parked {park}, runs", "p50 s", "p95 s", "kept MiB", "in use MiB")
    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu, version=pynvml.nvmlMemory_v2)
    median_s = statistics.median(seconds)
    table.add_row(
        str(num_runs),
        f"{median_s:.3f}",
        f"{percentile(seconds, 0.95):.3f}",
        f"{max(kept_mib):.0f}",
        f"{memory.used / MIB:.0f}",
    )
    Console().print(table)
    is_late = median_s > PARKING_GOAL_S
    return [f"parking {park} takes more than {PARKING_GOAL_S} s"] if is_late else []


def _medians(by_name: Mapping[str, list[float]], places: str) -> str:
    """Return the medians of those that are not always 0, for people."""
    found = ((name, values) for name, values in by_name.items() if any(values))
    return ", ".join(f"{name} {statistics.median(values):{places}}" for name, values in found)


if __name__ == "__main__":
    main()
