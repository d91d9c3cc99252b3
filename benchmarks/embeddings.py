"""Texts embedded a second: the engine's pooling path beside transformers, same machine, one run.

Transformers is used as sentence-transformers uses it: sorted by length, 32 texts a batch, padded
to the longest, mean pooled.

    python -m benchmarks.embeddings
"""

import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

# As in the runtime: threads that spin take the core another one needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from benchmarks.local import REPOSITORY
from runtime.config import EngineConfig
from runtime.cpu.threads import usable_cores
from runtime.engine.pooling import PoolingRequest
from runtime.engine.sequence import SequenceKey
from runtime.pooling.engine import PoolingEngine
from runtime.pooling.runner import PoolingRunner
from snapshots.builder import build
from snapshots.sources.directory import DirectorySource
from snapshots.store import SnapshotStore

MODEL = REPOSITORY / "models" / "minilm"
NUM_TEXTS = 64
BATCH = 32
ROUNDS = 3


def texts(lengths: Callable[[random.Random], int]) -> list[list[int]]:
    """Return random texts between BERT's two special tokens."""
    dice = random.Random(0)
    return [
        [101, *(dice.randrange(2000, 20_000) for _ in range(lengths(dice))), 102]
        for _ in range(NUM_TEXTS)
    ]


def engine_of(snapshot: Path) -> PoolingEngine:
    config = EngineConfig(task="embed", pooling="mean", normalize=True)
    runner = PoolingRunner.open(snapshot, config)
    runner.load_weights()
    return PoolingEngine(config, runner)


def ours(engine: PoolingEngine, batch: Sequence[Sequence[int]]) -> None:
    """Embed with the engine, all texts of one call."""
    for index, text in enumerate(batch):
        engine.submit_text(PoolingRequest(key=SequenceKey(1, index), token_ids=text))
    while engine.has_work():
        engine.step()


@torch.inference_mode()
def theirs(model: torch.nn.Module, batch: Sequence[Sequence[int]]) -> None:
    """Embed with transformers."""
    ordered = sorted(batch, key=len, reverse=True)
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        longest = len(part[0])
        ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in part])
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in part])
        hidden: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[:, :, None].float()
        F.normalize((hidden * weights).sum(1) / weights.sum(1))


def seconds(work: Callable[[], None]) -> float:
    """Return the best of some rounds, after one that does not count."""
    work()
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    torch.set_num_threads(usable_cores())
    model = AutoModel.from_pretrained(str(MODEL))
    model.train(mode=False)
    with tempfile.TemporaryDirectory() as directory:
        snapshot = build(DirectorySource(MODEL), SnapshotStore(Path(directory))).snapshot
        engine = engine_of(snapshot.path)
        print(
            f"all-MiniLM-L6-v2, fp32, {usable_cores()} cores, {NUM_TEXTS} texts, best of {ROUNDS}"
        )
        print(f"{'texts':>22} {'tokens':>8} {'ours /s':>10} {'theirs /s':>10}")
        for name, lengths in (
            ("short, 4 to 30", lambda dice: dice.randint(4, 30)),
            ("mixed, 4 to 250", lambda dice: dice.randint(4, 250)),
            ("long, 250", lambda dice: 250),
        ):
            batch = texts(lengths)
            num_tokens = sum(map(len, batch))
            rates = [
                NUM_TEXTS / seconds(partial(ours, engine, batch)),
                NUM_TEXTS / seconds(partial(theirs, model, batch)),
            ]
            print(f"{name:>22} {num_tokens:>8} {rates[0]:>10.1f} {rates[1]:>10.1f}")


if __name__ == "__main__":
    main()
