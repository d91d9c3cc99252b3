"""How an engine gets weights that the host holds in pinned memory. Standard library only.

The holder listens on a socket in the snapshot store, which every runtime sees, containers included.
An engine connects, names a file and gets descriptors of memory with the file's bytes: parts of
equal size, in order, the last one shorter. The memory lives as long as anybody has a descriptor or
has mapped it. An engine that finds other bytes than the file should have says so, once.

Messages are JSON, one each way, in packets that carry the descriptors.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOCKET_NAME = ".host-cache"
MAX_PARTS = 200
"""The kernel passes at most 253 descriptors at once."""
PAGE_BYTES = 2 << 20
"""The driver maps whole pages of this size, so memory ends with one."""
MAX_MESSAGE_BYTES = 4096
ANSWER_TIMEOUT_S = 0.25
"""The holder answers in a millisecond; who waits longer had better read the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldFile:
    """A file in pinned memory.

    Attributes:
        num_bytes: Its size.
        part_bytes: Size of every part but the last.
        descriptors: One a part, in the order of the file; whoever has this object closes them.
    """

    num_bytes: int
    part_bytes: int
    descriptors: tuple[int, ...]

    def close(self) -> None:
        """Close the descriptors; what is mapped stays."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def ask_for(store: Path, file: Path) -> HeldFile | None:
    """Return a file of the store as the holder has it; None if there is no holder or it has not.

    Args:
        store: Directory of snapshots.
        file: The file, relative to it.
    """
    try:
        with _connected(store) as connection:
            connection.send(encode({"file": str(file)}))
            packet, descriptors, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, MAX_PARTS)
    except OSError:
        return None
    answer = json.loads(packet) if packet else {}
    if not descriptors:
        return None
    return HeldFile(
        num_bytes=answer["num_bytes"],
        part_bytes=answer["part_bytes"],
        descriptors=tuple(descriptors),
    )


def report_damage(store: Path, file: Path) -> None:
    """Tell the holder that the bytes it has are wrong, so that it reads the file again."""
    try:
        with _connected(store) as connection:
            connection.send(encode({"file": str(file), "is_damaged": True}))
    except OSError:
        pass  # it is gone, and the bytes with it


def padded(num_bytes: int) -> int:
    """Return the size of the memory in which a part lies."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def encode(message: dict[str, Any]) -> bytes:
    """Return a packet's bytes."""
    return json.dumps(message).encode()


@contextmanager
def socket_address(store: Path) -> Iterator[str]:
    """Give the socket a short address: that of a path may have 107 bytes at most."""
    directory = os.open(store, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{SOCKET_NAME}"
    finally:
        os.close(directory)


@contextmanager
def _connected(store: Path) -> Iterator[socket.socket]:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
        socket_address(store) as address,
    ):
        connection.settimeout(ANSWER_TIMEOUT_S)
        connection.connect(address)
        yield connection
