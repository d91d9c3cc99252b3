"""Client-side wait for the first token of SmolLM2 on this machine's CPU, by tier.

`python -m benchmarks.wake_cpu [--runs 10]` starts a controller of its own, and measures from the
request to the first streamed token by the client's clock: warm, from parked, from standby, and
from stopped (a new process, torch imported anew). Exits with 1 if a median misses its goal.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.local import running_controller, smollm2
from benchmarks.waits import measure_tiers, missed, print_waits

GOALS_S = {"ready": None, "parked": 1.0, "standby": None, "stopped": 5.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="measurements a tier")
    parser.add_argument("--home", type=Path, help="home directory, to reuse its snapshot")
    arguments = parser.parse_args()
    home = arguments.home or Path(tempfile.mkdtemp(prefix="coldspark-wake-"))
    spec = smollm2(idle_timeout=None)
    with running_controller(home, num_standbys=0) as controller:
        controller.deploy(spec)
        waits = measure_tiers(controller, spec.name, arguments.runs, ["stopped"])
    with running_controller(home) as controller:
        warmer = ["standby", "parked", "ready"]
        waits |= measure_tiers(controller, spec.name, arguments.runs, warmer)
    print_waits(waits, GOALS_S)
    late = missed(waits, GOALS_S)
    if late:
        sys.exit("; ".join(late))


if __name__ == "__main__":
    main()
