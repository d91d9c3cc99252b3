"""Fixtures that several parts need: the small real model and its snapshots."""

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says nothing on a machine that is busy. Fixtures last for all examples.
settings.register_profile(
    "untimed",
    settings.default,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("untimed")

# A synchronous test has no event loop, and says so: looptime would otherwise have asyncio create
# one that nobody closes.
asyncio.set_event_loop(None)

# Read when torch is first imported. Threads that spin for each other make a step ten times as
# slow as soon as anything else wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Read when a Triton kernel is defined: without a GPU, kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
SMOLLM2_GGUF = REPOSITORY / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = REPOSITORY / "models" / "minilm"
SNAPSHOT_STORE = REPOSITORY / ".coldspark" / "test-snapshots"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Return the small real model's file."""
    if not SMOLLM2_GGUF.is_file():
        pytest.fail(f"{SMOLLM2_GGUF} is missing: run `make model`", pytrace=False)
    return SMOLLM2_GGUF


@pytest.fixture(scope="session")
def smollm2_snapshot(smollm2_gguf: Path) -> Path:
    """Return the directory of a bfloat16 snapshot of the small real model, kept between runs."""
    return _snapshot(smollm2_gguf, "bfloat16")


@pytest.fixture(scope="session")
def smollm2_snapshot_fp32(smollm2_gguf: Path) -> Path:
    """Return the directory of a float32 snapshot of the small real model, kept between runs."""
    return _snapshot(smollm2_gguf, "float32")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return the directory of the small real embedding model."""
    if not (MINILM / "model.safetensors").is_file():
        pytest.fail(f"{MINILM} is missing: run `make model`", pytrace=False)
    return MINILM


@pytest.fixture(scope="session")
def minilm_snapshot(minilm: Path) -> Path:
    """Return the directory of a snapshot of the embedding model, kept between runs."""
    from snapshots.builder import build  # most tests need no torch
    from snapshots.sources.directory import DirectorySource
    from snapshots.store import SnapshotStore

    return build(DirectorySource(minilm), SnapshotStore(SNAPSHOT_STORE)).snapshot.path


def _snapshot(source: Path, dtype: str) -> Path:
    from snapshots.builder import BuildOptions, build  # most tests need no torch
    from snapshots.sources.gguf import GgufSource
    from snapshots.store import SnapshotStore

    store = SnapshotStore(SNAPSHOT_STORE)
    return build(GgufSource(source), store, BuildOptions(dtype=dtype)).snapshot.path
