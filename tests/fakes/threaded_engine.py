"""A fake engine whose import starts a thread, as a careless native library does."""

import threading

from tests.fakes.engine import FakeEngineFactory

threading.Thread(target=threading.Event().wait, daemon=True).start()

__all__ = ["FakeEngineFactory"]
