"""The whole product but for the model, and schemathesis against its own OpenAPI document.

    python -m tests.fuzz.product --examples 100

Every route gets cases from its schema, at its limits, beyond them, and at random. No answer may be
a server error, have a status or a content type that the document does not name, or a body that is
not as its schema says. Prints what schemathesis prints; exits with its status.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.gateway import SERVE, scripted_spec
from benchmarks.local import REPOSITORY, running_controller
from benchmarks.scripted_engine import STEP_S

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
NUM_STREAMS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100, help="random cases an operation")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    done = fuzz(num_examples=arguments.examples, seed=arguments.seed)
    sys.stdout.write(done.stdout)
    sys.exit(done.returncode)


def fuzz(
    *, num_examples: int, seed: int, snapshots: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run schemathesis against a controller of its own; return what became of it.

    Args:
        num_examples: Random cases an operation.
        seed: The same one, the same cases.
        snapshots: A store that may have the model's already.
    """
    os.environ[STEP_S] = "0.001"
    with tempfile.TemporaryDirectory(prefix="cs-fuzz-") as home, ExitStack() as stack:
        if snapshots is not None:
            (Path(home) / "snapshots").symlink_to(snapshots)
        controller = stack.enter_context(
            running_controller(Path(home), command=("-m", "benchmarks.gateway", SERVE))
        )
        spec = scripted_spec(NUM_STREAMS)
        controller.deploy(spec)
        controller.operate(spec.name, "warm")
        return subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run"),
                f"{controller.url}/openapi.json",
                *("--max-examples", str(num_examples), "--seed", str(seed)),
                *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing"),
                *("--request-timeout", "30", "--suppress-health-check", "all"),
                "--continue-on-failure",
            ],
            cwd=home,  # where it keeps what it has found
            env=os.environ
            | {"SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )


if __name__ == "__main__":
    main()
