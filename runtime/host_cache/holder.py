"""A process that holds snapshots' files in the host's memory, so that starts need not read the disk.

    python -m runtime.host_cache.holder --store DIR

What engines on GPUs read it holds in pinned memory and hands out over a socket, everything else,
and what cannot be pinned, it locks in the page cache. In a process of its own, because reading a
file takes as long as it takes, and what is held counts as this process's memory. It is told by
lines of JSON what to hold, and answers each with a line; it ends, and what it holds with it, when
nobody can tell it anything more.
"""

import argparse
import contextlib
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.host_cache.locked import LockedFile, lift_limit
from runtime.host_cache.memory import HostMemory, HostMemoryError
from runtime.host_cache.pinned import pin
from runtime.host_cache.protocol import MAX_MESSAGE_BYTES, HeldFile, encode, socket_address
from runtime.named import find_named

REQUEST_TIMEOUT_S = 1.0

OpenMemory = Callable[[], HostMemory]


class Holder:
    """The files that are held. Told by one thread, asked by another.

    Args:
        store: Directory of snapshots; files are asked for by their paths in it.
        open_memory: Opens what pinned memory comes from; called once, when it is first needed.
    """

    def __init__(self, store: Path, open_memory: OpenMemory) -> None:
        self._store = store
        self._open_memory = open_memory
        self._memory: HostMemory | HostMemoryError | None = None
        self._lock = threading.Lock()
        self._pinned: dict[str, HeldFile | None] = {}  # None: it is read again
        self._locked: dict[str, LockedFile] = {}

    def hold(self, path: str, *, is_pinned: bool) -> dict[str, Any]:
        """Bring a file into memory; return what became of it.

        Raises:
            OSError: It cannot be read.
        """
        reason = ""
        if is_pinned and path not in self._pinned:
            try:
                held = pin(path, self._opened_memory())
            except HostMemoryError as error:
                reason = str(error)
            else:
                with self._lock:
                    self._pinned[path] = held
                self._unlock(path)
        is_pinned = path in self._pinned
        if not is_pinned and path not in self._locked:
            try:
                self._locked[path] = LockedFile(path)
            except OSError as error:
                if not os.access(path, os.R_OK):
                    raise
                reason = f"{reason}; {error.strerror}" if reason else str(error.strerror)
        is_held = is_pinned or path in self._locked
        return {"path": path, "is_held": is_held, "is_pinned": is_pinned, "reason": reason}

    def drop(self, path: str) -> None:
        """Hold a file no more; memory that engines have mapped goes when they are done."""
        with self._lock:
            held = self._pinned.pop(path, None)
        if held is not None:
            held.close()
        self._unlock(path)

    def serve(self, listener: socket.socket, *, user_ids: frozenset[int]) -> None:
        """Hand out what is asked for, until the listener is closed.

        Args:
            listener: Of packets.
            user_ids: Whose processes get answers.
        """
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError, ValueError, RecursionError):
                if _user_id(connection) in user_ids:
                    connection.settimeout(REQUEST_TIMEOUT_S)
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        request = json.loads(connection.recv(MAX_MESSAGE_BYTES))
        if not isinstance(request, dict) or not isinstance(request.get("file"), str):
            raise ValueError(f"{request!r} asks for no file")
        path = str(self._store / request["file"])
        if request.get("is_damaged"):
            threading.Thread(target=self._renew, args=(path,), name="renew", daemon=True).start()
            return
        with self._lock:  # keeps the descriptors open
            held = self._pinned.get(path)
            if held is None:
                connection.send(encode({}))
                return
            answer = encode({"num_bytes": held.num_bytes, "part_bytes": held.part_bytes})
            socket.send_fds(connection, [answer], list(held.descriptors))

    def _renew(self, path: str) -> None:
        """Read a file again whose bytes in memory are wrong."""
        with self._lock:
            damaged = self._pinned.get(path)
            if damaged is None:
                return
            self._pinned[path] = None
        damaged.close()
        sys.stderr.write(f"{path} was found damaged in pinned memory: it is read again\n")
        try:
            renewed = pin(path, self._opened_memory())
        except (HostMemoryError, OSError) as error:  # no memory, or its snapshot is built anew
            sys.stderr.write(f"{path} is not held any more: {error}\n")
            renewed = None
        with self._lock:
            if path in self._pinned and self._pinned[path] is None:
                if renewed is None:
                    del self._pinned[path]
                else:
                    self._pinned[path] = renewed
                return
        if renewed is not None:  # dropped meanwhile, and perhaps held anew
            renewed.close()

    def _unlock(self, path: str) -> None:
        locked = self._locked.pop(path, None)
        if locked is not None:
            locked.close()

    def _opened_memory(self) -> HostMemory:
        if self._memory is None:
            try:
                self._memory = self._open_memory()
            except HostMemoryError as error:
                self._memory = error  # it will not change while we live
        if isinstance(self._memory, HostMemoryError):
            raise self._memory
        return self._memory


def answer(holder: Holder, request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what one line asks for; say what became of it."""
    path = request["path"]
    nothing = {"path": path, "is_held": False, "is_pinned": False, "reason": ""}
    try:
        if request["op"] == "drop":
            holder.drop(path)
            return nothing
        return holder.hold(path, is_pinned=request["is_pinned"])
    except OSError as error:
        return nothing | {"reason": f"{path}: {error.strerror or error}"}


def listen(store: Path) -> socket.socket:
    """Return a listening socket in the store, in place of one that a dead holder has left."""
    store.mkdir(parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with socket_address(store) as address:
        Path(address).unlink(missing_ok=True)
        listener.bind(address)
        Path(address).chmod(0o666)  # engines may be other users; who they are is checked
    listener.listen()
    return listener


def main() -> None:
    """Serve standard input until it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--user-id", type=int, action="append", default=[], help="of engines")
    parser.add_argument("--memory", default="runtime.host_cache.memory:DriverMemory.open")
    options = parser.parse_args()
    lift_limit()
    holder = Holder(options.store, find_named(options.memory))
    user_ids = frozenset({os.getuid(), *options.user_id})
    threading.Thread(
        target=holder.serve,
        args=(listen(options.store),),
        kwargs={"user_ids": user_ids},
        name="host cache",
        daemon=True,
    ).start()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(holder, json.loads(line))) + "\n")
        sys.stdout.flush()


def _user_id(connection: socket.socket) -> int:
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    _, user_id, _ = struct.unpack("3i", credentials)
    return int(user_id)


if __name__ == "__main__":
    main()
