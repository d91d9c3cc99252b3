"""CUDA graphs of the decode step, for a handful of batch sizes.

A size is captured when it was needed twice, so a start captures nothing and a burst captures what
it uses. Until then, and for batches with chunks of prompts, kernels are launched one by one.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from runtime.gpu.device import Device

CAPTURE_AFTER = 2
SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


class DecodeGraphs:
    """Runs decode steps, of sizes rounded up.

    Args:
        run: Runs a decode batch of a size; returns its logits.
        max_num_seqs: Largest batch.
        device: On the CPU there are no graphs, only sizes.
    """

    def __init__(self, run: Callable[[int], Tensor], max_num_seqs: int, device: Device) -> None:
        self._run = run
        self._device = device
        self._sizes = [size for size in SIZES if size < max_num_seqs] + [max_num_seqs]
        self._uses: Counter[int] = Counter()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.is_gpu else None

    @property
    def num_captured(self) -> int:
        """Sizes that have a graph."""
        return len(self._graphs)

    def padded(self, num_seqs: int) -> int:
        """Return the size at which a batch runs."""
        return self._sizes[bisect_left(self._sizes, num_seqs)]

    def run(self, size: int) -> Tensor:
        """Run a decode batch of that size; return its logits, valid until the next run."""
        if size in self._graphs:
            graph, logits = self._graphs[size]
            graph.replay()
            return logits
        logits = self._run(size)
        self._uses[size] += 1
        if self._device.is_gpu and self._uses[size] >= CAPTURE_AFTER:
            self._capture(size)
        return logits

    def _capture(self, size: int) -> None:
        """Record what `run` launches; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            logits = self._run(size)
        finally:
            graph.capture_end()
        self._graphs[size] = graph, logits
