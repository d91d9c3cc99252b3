"""Time of the matrix products of the 8B shape's layers in a GPU that has become as hot as it gets.

    python -m benchmarks.gpu_products [--tokens 512,640,768,1024,4096] [--seconds 1]

A GPU that multiplies for longer than a moment is limited by its power, and then by what an
operation takes of it. So each line is of seconds without a pause: all products of 8 different
layers again and again, with the gate in a kernel behind its products and with the gate in theirs.
Both are run twice, in turn.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from runtime.kernels.activation import silu_mul
from runtime.kernels.hopper_gated_product import gated_product

HIDDEN, QKV, INTERMEDIATE = 4096, 6144, 14336
LAYERS, MODEL_LAYERS = 8, 32  # so many that no weight stays in a cache

Gate = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="512,640,768,1024,4096")
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    shapes = ((QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    weights = [[_random(*shape) * 0.02 for shape in shapes] for _ in range(LAYERS)]
    print(f"{'tokens':>6}  {'gate':10} {'ms, 32 layers':>14} {'TFLOP/s':>8} {'W':>5} {'MHz':>6}")
    for num_tokens in map(int, arguments.tokens.split(",")):
        graphs = {
            "behind": record(weights, num_tokens, gate_behind),
            "fused": record(weights, num_tokens, gate_fused),
        }
        flops = 2.0 * num_tokens * sum(rows * columns for rows, columns in shapes) * MODEL_LAYERS
        for name, graph in list(graphs.items()) * 2:
            repeat(graph, arguments.seconds / 2)
            seconds, watts, megahertz = repeat(graph, arguments.seconds)
            seconds *= MODEL_LAYERS / LAYERS
            print(
                f"{num_tokens:6}  {name:10} {1e3 * seconds:14.2f} {flops / seconds / 1e12:8.0f} "
                f"{watts:5.0f} {megahertz:6.0f}",
                flush=True,
            )


def gate_behind(x: Tensor, weight: Tensor, gate_up: Tensor, out: Tensor) -> None:
    torch.mm(x, weight.t(), out=gate_up)
    silu_mul(gate_up, out)


def gate_fused(x: Tensor, weight: Tensor, _gate_up: Tensor, out: Tensor) -> None:
    gated_product(x, weight, out)


def record(weights: list[list[Tensor]], num_tokens: int, gate: Gate) -> torch.cuda.CUDAGraph:
    """Return a graph of all layers' products."""
    x, qkv = _random(num_tokens, HIDDEN), _random(num_tokens, QKV)
    hidden, gated = _random(num_tokens, HIDDEN), _random(num_tokens, INTERMEDIATE)
    gate_up = _random(num_tokens, 2 * INTERMEDIATE)

    def run() -> None:
        for into_qkv, output, into_mlp, down in weights:
            torch.mm(x, into_qkv.t(), out=qkv)
            hidden.addmm_(x, output.t(), beta=0)
            gate(x, into_mlp, gate_up, gated)
            hidden.addmm_(gated, down.t(), beta=0)

    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run()
    return graph


def repeat(graph: torch.cuda.CUDAGraph, seconds: float) -> tuple[float, float, float]:
    """Replay for some time; return seconds a replay, watts and megahertz at the end."""
    began, count = time.perf_counter(), 0
    watts = megahertz = 0.0
    while time.perf_counter() - began < seconds:
        graph.replay()
        graph.replay()
        watts, megahertz = torch.cuda.power_draw() / 1e3, torch.cuda.clock_rate()
        torch.cuda.synchronize()
        count += 2
    return (time.perf_counter() - began) / count, watts, megahertz


def _random(num_rows: int, num_columns: int) -> Tensor:
    return torch.randn(num_rows, num_columns, device="cuda", dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
