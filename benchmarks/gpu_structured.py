"""What a JSON Schema takes from the throughput of the 8B shape on one GPU, 64 requests at once.

    python -m benchmarks.gpu_structured --tokenizer DIR [--rounds 2] [--layers 32]

The whole product, as in `benchmarks.gpu_serving`: the same prompts and numbers of tokens, free and
held to a schema by turns. Exits with 1 if less than 90 % of the throughput is left.
"""

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks.gpu_serving import NAME, serving_8b
from benchmarks.openai_load import run_openai
from benchmarks.serving_load import WORKLOADS, scaled

GOAL = 0.9
WORKLOAD = next(workload for workload in WORKLOADS if workload.concurrency == 64)
# So long that no answer is complete before its last token.
SCHEMA = {
    "type": "array",
    "minItems": 200,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "price": {"type": "number"},
            "in_stock": {"type": "boolean"},
            "category": {"enum": ["book", "film", "game", "tool"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        },
        "required": ["name", "price", "in_stock", "category", "tags"],
        "additionalProperties": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/coldspark-8b"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    kinds = {"free": {}, "with a schema": {"structured_outputs": {"json": SCHEMA}}}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    with serving_8b(arguments.work, arguments.tokenizer, arguments.layers) as controller:
        for fields in kinds.values():
            run_openai(controller.url, NAME, scaled(WORKLOAD, 0.0), fields)
        for _ in range(arguments.rounds):
            for kind, fields in kinds.items():
                figures = run_openai(controller.url, NAME, WORKLOAD, fields)
                rates[kind].append(figures.output_tokens_per_s)
                print(f"{kind:16} {figures.output_tokens_per_s:8.0f} out tok/s", flush=True)
    free, held = (statistics.median(rates[kind]) for kind in kinds)
    print(f"{held / free:.1%} of the throughput is left, to reach {GOAL:.0%}")
    if held < GOAL * free:
        sys.exit(1)


if __name__ == "__main__":
    main()
