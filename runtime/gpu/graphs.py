"""CUDA graphs of whole steps, for a handful of shapes.

A shape is captured when it was needed twice, or when the engine is idle, so a start captures
nothing and a burst what it uses. Until then its kernels are launched one by one, which takes the
host longer than some steps take the GPU.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Generic, NamedTuple, TypeVar

import structlog
import torch

from runtime.gpu.device import Device
from runtime.gpu.limits import BatchLimits

CAPTURE_AFTER = 2
DECODE_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
MAX_CAPTURED_TOKENS = 1024  # more takes the GPU longer than the host takes to launch it
SPARE_TILES = 16  # each chunk of a prompt has one that is not full

log = structlog.get_logger()

Result = TypeVar("Result")
"""What a step leaves on the device."""


class StepShape(NamedTuple):
    """Sizes of everything a step launches.

    Attributes:
        num_tokens: Padding included.
        num_tiles: Of chunks of prompts; 0 if every sequence decodes.
    """

    num_tokens: int
    num_tiles: int


class StepGraphs(Generic[Result]):
    """Runs steps, with shapes rounded up to those that are captured.

    Args:
        run: Launches a step of a shape, the batch being on the device; returns its result.
        limits: Of the batches.
        device: On the CPU there are no graphs, only shapes.
    """

    def __init__(
        self, run: Callable[[StepShape], Result], limits: BatchLimits, device: Device
    ) -> None:
        self._run = run
        self._limits = limits
        self._device = device
        self._decode_sizes = [size for size in DECODE_SIZES if size < limits.num_seqs]
        self._decode_sizes.append(limits.num_seqs)
        self._usual = self._usual_shapes()
        self._uses: Counter[StepShape] = Counter()
        self._served: Counter[StepShape] = Counter()
        self._is_serving = True
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Result]] = {}
        self._refused: set[StepShape] = set()
        self._pool = torch.cuda.graph_pool_handle() if device.is_gpu else None
        self._may_capture = device.is_gpu

    @property
    def num_captured(self) -> int:
        """Shapes that have a graph."""
        return len(self._graphs)

    def shape_of(self, num_tokens: int, num_tiles: int) -> StepShape:
        """Return the shape at which to run a batch; no tiles if every sequence decodes."""
        if num_tiles == 0:
            return StepShape(self._decode_sizes[bisect_left(self._decode_sizes, num_tokens)], 0)
        sizes = self._limits.mixed_sizes
        padded = sizes[bisect_left(sizes, num_tokens)]
        return StepShape(padded, max(num_tiles, self._usual_tiles(padded)))

    def prefer(self, shapes: Iterable[StepShape]) -> None:
        """Find these shapes the most useful, the first one most; those that never occur do not."""
        known = set(self._usual)
        preferred = [shape for shape in dict.fromkeys(shapes) if shape in known]
        self._usual = tuple(dict.fromkeys((*preferred, *self._usual)))

    def most_used(self) -> list[tuple[StepShape, int]]:
        """Return the usual shapes that served, with how often they did, most used first."""
        usual = set(self._usual)
        return [(shape, n) for shape, n in self._served.most_common() if n and shape in usual]

    def next_missing(self) -> StepShape | None:
        """Return the most useful shape without a graph; None if all have one."""
        if not self._device.is_gpu:
            return None
        done = self._graphs.keys() | self._refused
        return next((shape for shape in self._usual if shape not in done), None)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Launch everything that runs inside one by one; capture nothing, and count nothing."""
        before, self._may_capture = self._may_capture, False
        self._is_serving = False
        try:
            yield
        finally:
            self._may_capture = before
            self._is_serving = True

    def run(self, shape: StepShape) -> Result:
        """Run the batch on the device; return its result, valid until the next run."""
        self._served[shape] += self._is_serving
        if shape in self._graphs:
            graph, result = self._graphs[shape]
            graph.replay()
            return result
        result = self._run(shape)
        self._uses[shape] += shape in self._usual
        is_due = self._uses[shape] >= CAPTURE_AFTER and shape not in self._refused
        if self._may_capture and is_due:
            self.capture(shape)
        return result

    def capture(self, shape: StepShape) -> None:
        """Record what a shape launches, which must have run once; nothing is computed.

        A shape that cannot be recorded, for want of memory, say, is launched one by one for good.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = self._run(shape)
            finally:
                graph.capture_end()
        except Exception:  # whatever it is, steps run without
            log.exception("not_captured", **shape._asdict())
            self._refused.add(shape)
            return
        self._graphs[shape] = graph, result

    def _usual_tiles(self, num_tokens: int) -> int:
        return num_tokens // self._limits.tile_size + SPARE_TILES

    def _usual_shapes(self) -> tuple[StepShape, ...]:
        """Return the shapes worth a graph, small ones first: they wait for the host most."""
        decodes = [StepShape(size, 0) for size in self._decode_sizes]
        mixed = [
            StepShape(num_tokens, self._usual_tiles(num_tokens))
            for num_tokens in self._limits.mixed_sizes
            if num_tokens <= MAX_CAPTURED_TOKENS
        ]
        return tuple(shape for shape in chain(*zip_longest(decodes, mixed)) if shape is not None)
