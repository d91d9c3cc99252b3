"""Which shapes of steps become graphs first. No GPU: nothing is captured here."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from runtime.gpu.device import Device
from runtime.gpu.graphs import StepGraphs, StepShape
from runtime.gpu.limits import BatchLimits

LIMITS = BatchLimits(mixed_sizes=(64, 128, 1536), num_seqs=8, num_blocks_each=4, tile_size=16)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> StepGraphs[int]:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    device = cast(Device, SimpleNamespace(is_gpu=True))
    return StepGraphs(lambda shape: shape.num_tokens, LIMITS, device)


def test_small_steps_come_first_unless_others_are_preferred(graphs: StepGraphs[Any]) -> None:
    assert graphs.next_missing() == StepShape(1, 0)
    usual = graphs.shape_of(64, 1)
    graphs.prefer([usual, StepShape(4, 0), StepShape(4, 0), StepShape(5, 0)])
    order = []
    while (shape := graphs.next_missing()) is not None:
        order.append(shape)
        graphs._graphs[shape] = cast(Any, None)
    assert order[:3] == [usual, StepShape(4, 0), StepShape(1, 0)]
    assert StepShape(5, 0) not in order  # it is padded to 8
    assert max(shape.num_tokens for shape in order) == 128, "larger steps gain nothing"
    assert len(set(order)) == len(order) == 6


def test_steps_are_counted_once_requests_run(
    graphs: StepGraphs[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[StepShape] = []
    monkeypatch.setattr(graphs, "capture", captured.append)
    with graphs.suspended():
        graphs.run(StepShape(8, 0))
    assert graphs.most_used() == []
    for size in (2, 8, 8, 8):
        graphs.run(StepShape(size, 0))
    graphs.run(StepShape(64, 60))  # rare tiles, never a graph
    assert graphs.most_used() == [(StepShape(8, 0), 3), (StepShape(2, 0), 1)]
    assert captured


def test_a_shape_that_cannot_be_captured_runs_without_a_graph(
    graphs: StepGraphs[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Graph:
        num_tried = 0

        def capture_begin(self, **_: object) -> None:
            Graph.num_tried += 1
            raise torch.OutOfMemoryError("no memory for a graph")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    assert [graphs.run(StepShape(8, 0)) for _ in range(4)] == [8] * 4
    assert Graph.num_tried == 1
    assert graphs.num_captured == 0
    graphs.capture(StepShape(1, 0))  # as in idle time
    assert graphs.next_missing() not in (StepShape(1, 0), StepShape(8, 0))
