"""A snapshot's weights on the GPU: our loader beside safetensors' own, one run.

    python -m benchmarks.loader SNAPSHOT [--device cuda] [--runs 5]

SNAPSHOT is the directory of a built snapshot, `~/.coldspark/snapshots/NAME@DIGEST`. Its file is
read once first, so that both find it in the page cache. Ours maps memory, reads, copies and
verifies every chunk on the device; safetensors' `load_file` reads and copies. Each load begins with
the device's memory free and ends when the last byte is there. Prints GB/s of each phase.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from runtime.gpu.weights import GpuWeights
from snapshots.loader import open_rank
from snapshots.manifest import CHUNK_BYTES

GB = 1e9

Seconds = Mapping[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    rank = open_rank(arguments.snapshot)
    _read(rank.path)
    if arguments.device == "cuda":
        torch.zeros(1, device="cuda")  # the context is nobody's time
    weights = GpuWeights(arguments.snapshot, arguments.device)
    loaders: Mapping[str, Callable[[], Seconds]] = {
        "ours": lambda: _load_ours(weights),
        "safetensors": lambda: _load_theirs(rank.path, arguments.device),
    }
    table = Table("loader", "phase", "p50 s", "worst s", "GB/s")
    for name, load in loaders.items():
        load()  # loads kernels, touches memory
        runs = [load() for _ in range(arguments.runs)]
        for phase in runs[0]:
            seconds = sorted(run[phase] for run in runs)
            median = statistics.median(seconds)
            rate = rank.data_bytes / GB / median
            table.add_row(name, phase, f"{median:.3f}", f"{seconds[-1]:.3f}", f"{rate:.1f}")
    Console().print(table)
    print(f"{rank.data_bytes / GB:.2f} GB, torch {torch.__version__}, {os.cpu_count()} cores")


def _load_ours(weights: GpuWeights) -> Seconds:
    began = time.perf_counter()
    with torch.inference_mode():
        _, report = weights.load(None)
    total_s = time.perf_counter() - began
    weights.release()
    return {"read and copy": report.read_s, "verify": report.verify_s, "all": total_s}


def _load_theirs(path: Path, device: str) -> Seconds:
    began = time.perf_counter()
    tensors = load_file(path, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    total_s = time.perf_counter() - began
    del tensors
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return {"all": total_s}


def _read(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(CHUNK_BYTES):
            pass


if __name__ == "__main__":
    main()
