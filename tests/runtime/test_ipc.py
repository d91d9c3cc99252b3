import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.ipc import (
    HEADER,
    MAX_PAYLOAD_BYTES,
    BadFrame,
    Frame,
    FrameConnection,
    FrameDecoder,
    FrameKind,
    FrameSocket,
    PeerClosed,
    encode,
)

frames = st.lists(
    st.builds(
        Frame,
        kind=st.sampled_from(FrameKind),
        id=st.integers(0, 2**64 - 1),
        payload=st.binary(max_size=40),
    ),
    max_size=8,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@given(frames=frames, sizes=st.lists(st.integers(1, 50), min_size=1))
def test_frames_survive_being_cut_anywhere(frames: list[Frame], sizes: list[int]) -> None:
    data = b"".join(map(encode, frames))
    decoder = FrameDecoder()
    decoded: list[Frame] = []
    start = turn = 0
    while start < len(data):
        end = start + sizes[turn % len(sizes)]
        decoded += decoder.feed(data[start:end])
        start, turn = end, turn + 1
    assert decoded == frames


def test_an_unknown_kind_is_no_frame() -> None:
    with pytest.raises(BadFrame, match="unknown frame kind 200"):
        list(FrameDecoder().feed(HEADER.pack(0, 200, 0)))


def test_a_frame_over_the_limit_is_neither_sent_nor_awaited() -> None:
    with pytest.raises(BadFrame, match="announces"):
        list(FrameDecoder().feed(HEADER.pack(MAX_PAYLOAD_BYTES + 1, FrameKind.STATUS, 0)))
    with pytest.raises(BadFrame, match="over the limit"):
        encode(Frame(FrameKind.STATUS, 0, bytes(MAX_PAYLOAD_BYTES + 1)))


def test_receive_returns_nothing_when_nothing_comes(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    assert FrameSocket(pair[0]).receive(0.0) == []
    assert FrameSocket(pair[0]).receive(0.01) == []


def test_receive_returns_all_that_has_arrived(pair: tuple[socket.socket, socket.socket]) -> None:
    sent = [Frame(FrameKind.PARK, number) for number in range(3)]
    FrameSocket(pair[1]).send(sent)
    assert FrameSocket(pair[0]).receive(0.0) == sent


def test_receive_waits_for_the_rest_of_a_frame(pair: tuple[socket.socket, socket.socket]) -> None:
    frame = Frame(FrameKind.ATTACH_REQUEST, 7, b"x" * 100)
    data = encode(frame)
    pair[1].sendall(data[:50])
    rest = threading.Timer(0.05, pair[1].sendall, [data[50:]])
    rest.start()
    assert FrameSocket(pair[0]).receive(10.0) == [frame]
    rest.join()


def test_the_end_of_the_server_ends_the_engine(pair: tuple[socket.socket, socket.socket]) -> None:
    engine = FrameSocket(pair[0])
    pair[1].close()
    with pytest.raises(PeerClosed):
        engine.receive(10.0)
    with pytest.raises(PeerClosed):
        engine.send([Frame(FrameKind.STATUS, 0)])


async def test_the_server_sees_frames_then_the_end() -> None:
    ours, theirs = socket.socketpair()
    seen: list[Frame] = []
    closed = asyncio.Event()
    connection = FrameConnection(on_frame=seen.append, on_closed=closed.set)
    await connection.connect(ours)
    sent = [Frame(FrameKind.STEP_OUTPUT, number, bytes(number)) for number in range(5)]
    with theirs:
        FrameSocket(theirs).send(sent)
    await asyncio.wait_for(closed.wait(), 10)
    assert seen == sent
    connection.write(Frame(FrameKind.PARK, 1))  # goes nowhere, and says nothing
    await connection.drain()


async def test_bytes_that_are_no_frame_end_the_connection() -> None:
    ours, theirs = socket.socketpair()
    closed = asyncio.Event()
    connection = FrameConnection(on_frame=lambda _: None, on_closed=closed.set)
    await connection.connect(ours)
    with theirs:
        theirs.sendall(HEADER.pack(0, 200, 0))
        await asyncio.wait_for(closed.wait(), 10)


async def test_drain_waits_for_an_engine_that_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    connection = FrameConnection(on_frame=lambda _: None, on_closed=lambda: None)
    await connection.connect(ours)
    frame = Frame(FrameKind.ATTACH_REQUEST, 1, bytes(8 << 20))
    connection.write(frame)
    draining = asyncio.create_task(connection.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    with theirs:
        engine = FrameSocket(theirs)
        assert await asyncio.to_thread(engine.receive, 10.0) == [frame]
        await asyncio.wait_for(draining, 10)
    connection.close()
    await asyncio.sleep(0)
