"""What is held by nobody we know, from measurements and the books."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.scaling.foreign import IGNORED_BYTES, SETTLE_S, ForeignMemory
from controller.scaling.placement import Demand, Device, DeviceKind, MemoryLedger

GIB = 1 << 30
GPU = "GPU-0"
TICK_S = 0.25


class Machine:
    """One GPU of 100 GiB, measured four times a second."""

    def __init__(self) -> None:
        self.memory = MemoryLedger([Device(id=GPU, kind=DeviceKind.GPU, memory_bytes=100 * GIB)])
        self.foreign = ForeignMemory(self.memory)
        self.now = 0.0
        self.resting: set[str] = set()

    def hold(self, replica_id: str, gib: int) -> None:
        self.memory.hold(replica_id, [GPU], Demand(num_gpus=1, memory_bytes=gib * GIB))

    def measure(self, used_gib: float | None, for_s: float = TICK_S) -> float:
        """Measure the same for a while; returns what is foreign in the end, in GiB."""
        until = self.now + for_s
        while self.now < until:
            self.now += TICK_S
            used = None if used_gib is None else int(used_gib * GIB)
            self.foreign.note(GPU, used, resting=self.resting, now=self.now)
        return (self.memory.foreign_bytes(GPU) or 0) / GIB


def test_what_is_used_beyond_every_promise_is_foreign_once_it_lasts() -> None:
    machine = Machine()
    machine.hold("a", 50)
    assert machine.measure(80, for_s=SETTLE_S) == 0
    assert machine.measure(80) == 30
    assert machine.memory.free_bytes(GPU) == 20 * GIB


def test_it_is_free_again_once_it_is_gone_for_good() -> None:
    machine = Machine()
    releases: list[float] = []
    machine.memory.on_release(lambda: releases.append(machine.now))
    assert machine.measure(80, for_s=3.0) == 80
    assert machine.measure(0, for_s=SETTLE_S - TICK_S) == 80
    assert machine.measure(0, for_s=2 * TICK_S) == 0
    assert len(releases) == 1, "somebody may be waiting for it"


def test_a_start_that_has_not_taken_its_memory_yet_hides_nothing() -> None:
    machine = Machine()
    assert machine.measure(30, for_s=3.0) == 30
    machine.hold("a", 60)
    assert machine.measure(30, for_s=10.0) == 30
    assert machine.measure(90, for_s=10.0) == 30


def test_what_leaves_is_seen_beside_a_replica_that_is_ready() -> None:
    machine = Machine()
    machine.hold("a", 60)
    machine.resting.add("a")
    assert machine.measure(90, for_s=3.0) == 30
    assert machine.measure(60, for_s=3.0) == 0


def test_little_may_be_a_parked_replicas() -> None:
    machine = Machine()
    machine.hold("a", 1)
    assert machine.measure(1 + (IGNORED_BYTES - 1) / GIB, for_s=3.0) == 0
    assert machine.measure(3, for_s=3.0) == 2


def test_a_gpu_that_cannot_be_read_is_left_to_the_books() -> None:
    machine = Machine()
    assert machine.memory.foreign_bytes(GPU) is None
    machine.measure(30, for_s=3.0)
    machine.measure(None)
    assert machine.memory.foreign_bytes(GPU) is None
    assert machine.memory.free_bytes(GPU) == 100 * GIB
    assert machine.measure(30, for_s=SETTLE_S) == 0, "what was seen before may be long gone"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["start", "ready", "park", "leave"]),
            st.floats(0, 1),
            st.floats(TICK_S, 1.5),
        ),
        max_size=30,
    )
)
def test_what_our_own_replica_does_is_never_foreign(moves: list[tuple[str, float, float]]) -> None:
    """However much of its promise it has, and although the driver's figures come late."""
    machine = Machine()
    for move, share, for_s in moves:
        used = 90 * share if move == "start" else {"ready": 90.0, "park": 0.0, "leave": 0.0}[move]
        machine.resting = {"a"} if move in ("ready", "park") else set()
        late = {"park": 90.0, "leave": 90.0}.get(move)
        if move == "leave":
            machine.memory.release("a")
        elif move == "park":
            machine.memory.keep("a", [GPU], 8 << 20)
        else:
            machine.hold("a", 90)
        if late is not None and machine.measure(late, for_s=SETTLE_S - TICK_S):
            pytest.fail("late figures of what has been given back")
        assert machine.measure(used, for_s=for_s) == 0


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=30))
def test_the_books_promise_no_more_than_there_is(promises: list[tuple[int, bool]]) -> None:
    """Whatever is placed beside what others hold fits, as soon as that has been seen."""
    machine = Machine()
    machine.measure(30, for_s=3.0)
    for number, (gib, is_ready) in enumerate(promises):
        demand = Demand(num_gpus=1, memory_bytes=gib * GIB)
        if machine.memory.place(f"r{number}", demand) is not None and is_ready:
            machine.resting.add(f"r{number}")
        held = machine.memory.held(GPU)
        taken = sum(held[one] for one in machine.resting if one in held) / GIB
        machine.measure(30 + taken, for_s=3.0)
        assert sum(held.values()) <= 70 * GIB


def test_what_is_there_at_the_start_is_foreign_at_once() -> None:
    machine = Machine()
    machine.hold("adopted", 20)
    machine.foreign.begin(GPU, 90 * GIB)
    assert machine.memory.foreign_bytes(GPU) == 70 * GIB
    assert machine.measure(90) == 70
    machine.foreign.begin(GPU, None)
    machine.resting.add("adopted")
    assert machine.measure(20, for_s=2 * SETTLE_S) == 0
