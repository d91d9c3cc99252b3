"""The holder in this process: what it hands out, to whom, and what it does with damage."""

import mmap
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.host_cache import pinned as pinned_module
from runtime.host_cache.holder import Holder, answer, listen
from runtime.host_cache.memory import DriverMemory, HostMemoryError
from runtime.host_cache.pinned import pin
from runtime.host_cache.protocol import (
    MAX_PARTS,
    PAGE_BYTES,
    SOCKET_NAME,
    HeldFile,
    ask_for,
    report_damage,
    socket_address,
)
from tests.fakes.host_memory import MemfdMemory
from tests.runtime.host_cache.serving import num_parts_open, serving, wait_for

CONTENT = os.urandom(3 * 4096 + 77)
NAME = Path("model@0123456789ab/rank0")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with one file, which needs several parts; its path is long for a socket."""
    monkeypatch.setattr(pinned_module, "PART_BYTES", 4096)
    store = tmp_path / ("d" * 100)
    (store / NAME).parent.mkdir(parents=True)
    (store / NAME).write_bytes(CONTENT)
    return store


@pytest.fixture
def holder(store: Path) -> Iterator[Holder]:
    """One that serves this user."""
    holder = Holder(store, MemfdMemory)
    with serving(holder, store, os.getuid()):
        yield holder


def content(held: HeldFile) -> bytes:
    read = b""
    for index, descriptor in enumerate(held.descriptors):
        size = min(held.part_bytes, held.num_bytes - index * held.part_bytes)
        with mmap.mmap(descriptor, size) as pages:
            read += pages[:]
    held.close()
    return read


def test_a_file_is_handed_out_in_parts(holder: Holder, store: Path) -> None:
    assert ask_for(store, NAME) is None
    told = holder.hold(str(store / NAME), is_pinned=True)
    assert told["is_pinned"]
    held = ask_for(store, NAME)
    assert held is not None
    assert len(held.descriptors) == 4
    assert content(held) == CONTENT
    again = ask_for(store, NAME)
    assert again is not None
    holder.drop(str(store / NAME))
    assert ask_for(store, NAME) is None
    assert content(again) == CONTENT  # whoever has it keeps it


def test_a_file_found_damaged_is_read_again(holder: Holder, store: Path) -> None:
    holder.hold(str(store / NAME), is_pinned=True)
    damaged = ask_for(store, NAME)
    assert damaged is not None
    with mmap.mmap(damaged.descriptors[0], 4096) as pages:
        pages[:8] = b"\0" * 8
    report_damage(store, NAME)
    while content(wait_for(store, NAME)) != CONTENT:
        pass
    assert content(damaged) != CONTENT


def test_a_damaged_file_that_is_away_is_held_no_more_and_again_when_it_is_back(
    holder: Holder, store: Path
) -> None:
    path, quarantine = store / NAME, store / "quarantine"
    holder.hold(str(path), is_pinned=True)
    path.rename(quarantine)
    report_damage(store, NAME)
    deadline = time.monotonic() + 20.0
    while str(path) in holder._pinned:
        assert time.monotonic() < deadline, "it is said to be held"
        time.sleep(0.01)
    quarantine.rename(path)
    assert holder.hold(str(path), is_pinned=True)["is_pinned"]
    held = ask_for(store, NAME)
    assert held is not None
    assert content(held) == CONTENT


def test_nobody_else_gets_anything(store: Path) -> None:
    holder = Holder(store, MemfdMemory)
    holder.hold(str(store / NAME), is_pinned=True)
    with serving(holder, store, os.getuid() + 1):
        assert ask_for(store, NAME) is None
    holder.drop(str(store / NAME))


def test_without_a_holder_there_is_nothing_to_wait_for(store: Path) -> None:
    assert ask_for(store, NAME) is None
    listen(store).close()  # leaves its socket behind
    assert (store / SOCKET_NAME).is_socket()
    assert ask_for(store, NAME) is None
    report_damage(store, NAME)
    listen(store).close()  # takes its place


@pytest.mark.parametrize("packet", [b"", b"{", b"[]", b"{}", b'{"file": 3}', b"\xff", b"[" * 4096])
def test_nonsense_harms_nobody(holder: Holder, store: Path, packet: bytes) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
        socket_address(store) as address,
    ):
        connection.connect(address)
        connection.send(packet)
        assert connection.recv(100) in (b"", b"{}")
    holder.hold(str(store / NAME), is_pinned=True)
    held = ask_for(store, NAME)
    assert held is not None
    held.close()


def test_a_file_outside_the_store_is_not_held_for_anybody(holder: Holder, store: Path) -> None:
    outside = store.parent / "secret"
    outside.write_bytes(CONTENT)
    assert ask_for(store, Path("../secret")) is None


def test_a_file_of_any_size_fits_one_message(store: Path) -> None:
    size = 3 * MAX_PARTS * 4096 // 2
    with (store / "large").open("wb") as file:
        file.truncate(size)
    held = pin(str(store / "large"), MemfdMemory())
    assert len(held.descriptors) <= MAX_PARTS
    assert held.part_bytes * len(held.descriptors) >= size
    held.close()


def test_what_would_take_the_last_memory_is_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pinned_module, "_meminfo", lambda: [("MemTotal", 100 << 20), ("MemAvailable", 5 << 20)]
    )
    with pytest.raises(HostMemoryError, match="COLDSPARK_HOST_CACHE_BYTES"):
        pin(str(store / NAME), MemfdMemory())


def test_a_file_that_is_gone_is_told(store: Path) -> None:
    request = {"op": "hold", "path": str(store / "gone"), "is_pinned": True}
    told = answer(Holder(store, MemfdMemory), request)
    assert not told["is_held"]
    assert "No such file" in told["reason"]


def test_a_failed_pin_keeps_no_descriptor(store: Path) -> None:
    class OnePart(MemfdMemory):
        num_parts = 0

        def filled(self, num_bytes: int, fill: object) -> int:
            self.num_parts += 1
            if self.num_parts > 1:
                raise HostMemoryError("enough")
            return super().filled(num_bytes, fill)  # type: ignore[arg-type]

    before = num_parts_open()
    with pytest.raises(HostMemoryError):
        pin(str(store / NAME), OnePart())
    assert num_parts_open() == before


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.host_cache.memory.LIBRARY", "libnothing.so")
    with pytest.raises(HostMemoryError, match="no CUDA driver"):
        DriverMemory.open()


def test_parts_are_whole_pages_of_the_driver() -> None:
    assert pinned_module.PART_BYTES % PAGE_BYTES == 0
