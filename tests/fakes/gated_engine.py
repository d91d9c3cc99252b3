"""A fake engine whose import waits: opening the FIFO in $TEST_GATE for writing lets it go on."""

import os
from pathlib import Path

from tests.fakes.engine import FakeEngineFactory

with Path(os.environ["TEST_GATE"]).open() as gate:
    gate.read()

__all__ = ["FakeEngineFactory"]
