"""Client-side wait for the first token of the 8B shape on one GPU, by tier, with its phases.

    python -m benchmarks.gpu_cold_start --tokenizer DIR [--runs 10] [--work /tmp/coldspark-8b]

From the request to the first streamed text through the official SDK, one request at a time, the
snapshot in the page cache: warm, from parked, from standby, and from stopped with no runtime at
all (process backend). DIR holds the
tokenizer.json of any small model. Exits with 1 if a median misses its goal.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.gpu_serving import NAME, serving_8b
from benchmarks.local import Controller
from benchmarks.waits import Waits, measure_tiers, missed, print_waits

GOALS_S = {"ready": None, "parked": 0.47, "standby": 1.0, "stopped": 6.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="measurements a tier")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/coldspark-8b"))
    arguments = parser.parse_args()
    waits: Waits = {}
    for num_standbys, tiers in ((0, ["stopped"]), (1, ["standby", "parked", "ready"])):
        with serving_8b(
            arguments.work, arguments.tokenizer, arguments.layers, num_standbys=num_standbys
        ) as controller:
            waits |= measure_tiers(controller, NAME, arguments.runs, tiers)
            _print_phases(controller, 2 * arguments.runs)
    print_waits(waits, GOALS_S)
    late = missed(waits, GOALS_S)
    if late:
        sys.exit(f"the median misses its goal from {', '.join(late)}")


def _print_phases(controller: Controller, limit: int) -> None:
    """Print the median of each phase, in milliseconds."""
    found = controller.get("/api/v1/cold-starts", function=NAME, limit=limit)["cold_starts"]
    phases: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cold_start in found:
        for phase in cold_start["phases"]:
            phases[cold_start["from_tier"]][phase["name"]].append(phase["seconds"])
    for tier, by_name in phases.items():
        medians = {name: 1000 * statistics.median(seconds) for name, seconds in by_name.items()}
        print(tier, ", ".join(f"{name} {ms:.0f}" for name, ms in medians.items()), "ms")


if __name__ == "__main__":
    main()
