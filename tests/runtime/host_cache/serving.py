"""A holder that serves from a thread of this process."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from runtime.host_cache.holder import Holder, listen
from runtime.host_cache.protocol import HeldFile, ask_for


def wait_for(store: Path, file: Path) -> HeldFile:
    """Return a file once it is held."""
    deadline = time.monotonic() + 20.0
    while (held := ask_for(store, file)) is None:
        assert time.monotonic() < deadline, "it is not held"
        time.sleep(0.01)
    return held


def num_parts_open() -> int:
    """Return how many descriptors of stand-in memory this process has."""
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            found += "memfd:host-cache" in str(path.readlink())
    return found


@contextlib.contextmanager
def serving(holder: Holder, store: Path, user_id: int) -> Iterator[None]:
    """Serve a user's processes."""
    listener = listen(store)

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            holder.serve(listener, user_ids=frozenset({user_id}))

    thread = threading.Thread(target=serve, name="holder")
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
