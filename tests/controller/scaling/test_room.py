"""Who gives way to whom."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.scaling.lifecycle import ReplicaState
from controller.scaling.room import (
    BETWEEN_CALLS_S,
    LEAVES_WITHIN_S,
    Room,
    Tenant,
    cheapest,
    make_room,
)

S = ReplicaState


def tenant(name: str, **fields: object) -> Tenant:
    known = {
        "state": S.READY,
        "held_bytes": 10,
        "kept_bytes": 1,
        "value_s": 1.0,
        "resident_s": 100.0,
        "idle_s": 10.0,
    }
    return Tenant(replica_id=name, **(known | fields))  # type: ignore[arg-type]  # its fields


def room(*tenants: Tenant, missing: int = 9, waited_s: float = 0.0) -> Room:
    return make_room(tenants, missing, waited_s=waited_s, min_residency_s=1.0, turn_s=30.0)


def test_an_idle_replica_is_parked_for_others() -> None:
    assert room(tenant("a")) == Room(evict=("a",), cost_s=1.0)


def test_the_least_valuable_goes() -> None:
    assert room(tenant("a", value_s=2.0), tenant("b", value_s=0.5)).evict == ("b",)


def test_among_equals_the_longest_idle_goes() -> None:
    assert room(tenant("a", idle_s=5.0), tenant("b", idle_s=50.0)).evict == ("b",)


def test_an_idle_one_is_stopped_if_it_would_hold_too_much_when_parked() -> None:
    assert room(tenant("a"), missing=10) == Room(stop=("a",), cost_s=1.0)
    assert room(tenant("a", is_needed=True), missing=10) == Room(is_enough=False)
    assert room(tenant("a", is_busy=True), missing=10) == Room(is_enough=False, retry_in_s=30.0)


def test_no_more_are_stopped_instead_of_parked_than_need_be() -> None:
    cheap, dear = tenant("cheap", value_s=0.5), tenant("dear", value_s=2.0)
    decided = room(cheap, dear, missing=19)
    assert (decided.stop, decided.evict) == (("cheap",), ("dear",))
    assert room(cheap, dear, missing=18).stop == ()
    assert set(room(cheap, dear, missing=20).stop) == {"cheap", "dear"}


@pytest.mark.parametrize("going", [{"state": S.PARKING}, {"is_busy": True}, {"is_yielding": True}])
def test_one_that_cannot_be_stopped_now_is_stopped_once_it_is_parked(
    going: dict[str, object],
) -> None:
    on_its_way = tenant("a", **going)
    decided = room(on_its_way, missing=10, waited_s=30.0)
    assert (decided.evict, decided.stop, decided.is_enough) == ((), (), True)
    parked = replace(on_its_way, state=S.PARKED, held_bytes=1, is_busy=False)
    assert room(parked, missing=1).evict == ("a",)


def test_one_whose_runtime_has_refused_is_not_asked_to_park_before_its_time() -> None:
    refusing = tenant("a", refuses_s=4.0)
    assert room(refusing) == Room(retry_in_s=4.0)
    assert room(refusing, tenant("b", value_s=5.0)).evict == ("b",)
    assert room(tenant("a", refuses_s=-1.0)).evict == ("a",)


def test_what_a_runtime_refuses_is_to_park_and_not_to_be_stopped() -> None:
    assert room(tenant("a", refuses_s=4.0), missing=10).stop == ("a",)
    assert room(tenant("a", state=S.PARKED, refuses_s=4.0)).evict == ("a",)


def test_as_many_go_as_are_needed_and_no_more() -> None:
    small = tenant("small", held_bytes=3, value_s=0.1)
    assert room(small, tenant("large"), missing=9).evict == ("large",), "the small one is no help"
    assert set(room(small, tenant("large"), missing=10).evict) == {"small", "large"}


def test_what_is_being_given_back_is_waited_for() -> None:
    assert room(tenant("a", state=S.PARKING), tenant("b")) == Room()


@pytest.mark.parametrize("state", [S.DRAINING, S.FAILED])
def test_one_that_is_being_removed_is_waited_for_a_moment(state: ReplicaState) -> None:
    leaving = tenant("a", state=state, resident_s=1.0)
    assert room(leaving, tenant("b")) == Room(retry_in_s=LEAVES_WITHIN_S - 1.0)
    ended_late = replace(leaving, resident_s=200.0, idle_s=2.0)
    assert room(ended_late, tenant("b")) == Room(retry_in_s=LEAVES_WITHIN_S - 2.0)


@pytest.mark.parametrize(
    "obstacle",
    [{"is_busy": True}, {"resident_s": 60.0, "idle_s": 60.0}],
    ids=["its last response goes on", "it resists"],
)
@pytest.mark.parametrize("state", [S.DRAINING, S.FAILED])
def test_one_that_may_not_be_gone_for_long_is_not_waited_for(
    state: ReplicaState, obstacle: dict[str, object]
) -> None:
    leaving = tenant("a", state=state, **({"resident_s": 1.0} | obstacle))
    assert room(leaving, tenant("b")).evict == ("b",)
    assert not room(leaving).is_enough


def test_one_that_yields_is_waited_for() -> None:
    assert room(tenant("a", is_yielding=True, is_busy=True), tenant("b")) == Room(is_soon=False)


def test_room_is_not_there_soon_if_a_response_has_to_end_first() -> None:
    assert not room(tenant("a", is_busy=True), waited_s=30.0).is_soon
    yielding = tenant("a", is_yielding=True, is_busy=True)
    assert not room(yielding, tenant("b"), missing=18).is_soon
    assert room(yielding, tenant("b", state=S.PARKING)).is_soon, "nobody waits for the first"


@pytest.mark.parametrize(
    "obstacle",
    [
        {"is_needed": True},
        {"state": S.LOADING},
        {"state": S.STARTING},
        {"held_bytes": 5},
    ],
)
def test_who_must_stay_stays(obstacle: dict[str, object]) -> None:
    decided = room(tenant("a", **obstacle))
    assert (decided.evict, decided.yielding, decided.is_enough) == ((), (), False)


def test_nobody_goes_when_it_would_not_be_enough() -> None:
    assert room(tenant("a"), tenant("b", is_needed=True), missing=12).evict == ()


def test_one_that_has_just_come_stays_for_a_while() -> None:
    decided = room(tenant("a", resident_s=0.25))
    assert decided == Room(evict=(), is_enough=True, retry_in_s=0.75)


def test_one_between_two_calls_is_not_taken_for_idle() -> None:
    assert room(tenant("a", idle_s=0.0)) == Room(retry_in_s=BETWEEN_CALLS_S)


def test_a_parked_one_that_still_holds_memory_is_stopped() -> None:
    parked = tenant("a", state=S.PARKED, held_bytes=9, resident_s=0.0)
    assert room(parked).evict == ("a",)


@pytest.mark.parametrize("other", [{"resident_s": 0.25}, {"is_busy": True}], ids=["young", "busy"])
def test_no_parked_one_is_stopped_for_what_another_gives_anyway(other: dict[str, object]) -> None:
    parked = tenant("parked", state=S.PARKED, held_bytes=1, value_s=0.0)
    assert room(parked, tenant("other", **other), waited_s=30.0).evict == ()
    assert room(parked, tenant("other", **other), waited_s=30.0, missing=10).evict == ("parked",)


def test_a_busy_one_serves_its_turn_and_then_takes_no_more() -> None:
    busy = tenant("a", is_busy=True, resident_s=100.0)
    assert room(busy, waited_s=10.0) == Room(is_enough=False, retry_in_s=20.0)
    assert room(busy, waited_s=30.0).yielding == ("a",)
    fresh = replace(busy, resident_s=12.0)
    assert room(fresh, waited_s=40.0) == Room(is_enough=False, retry_in_s=18.0)


def test_a_parked_one_whose_callers_wait_is_stopped_and_does_not_yield() -> None:
    parked = tenant("parked", state=S.PARKED, held_bytes=6, is_busy=True, value_s=0.0)
    busy = tenant("busy", is_busy=True, held_bytes=90, kept_bytes=6)
    decided = room(parked, busy, missing=86, waited_s=31.0)
    assert (decided.evict, decided.yielding, decided.is_enough) == (("parked",), ("busy",), True)
    asked_in_vain = replace(parked, is_yielding=True)
    assert room(asked_in_vain, missing=6).evict == ("parked",)


def test_one_that_was_lost_while_it_yielded_counts_once() -> None:
    lost = tenant("a", state=S.FAILED, resident_s=0.0, is_yielding=True)
    assert room(lost, tenant("b"), missing=19).evict == ("b",)


def test_idle_ones_go_before_busy_ones() -> None:
    decided = room(tenant("busy", is_busy=True, value_s=0.0), tenant("idle"), waited_s=99.0)
    assert (decided.evict, decided.yielding) == (("idle",), ())


TENANTS = st.lists(
    st.builds(
        Tenant,
        replica_id=st.uuids().map(str),
        state=st.sampled_from(S),
        held_bytes=st.integers(0, 20),
        kept_bytes=st.integers(0, 3),
        value_s=st.floats(0, 10),
        resident_s=st.floats(0, 100),
        idle_s=st.floats(0, 100),
        is_busy=st.booleans(),
        is_needed=st.booleans(),
        is_yielding=st.booleans(),
    ),
    max_size=8,
)


@given(TENANTS, st.integers(0, 60), st.floats(0, 100))
def test_nobody_is_disturbed_who_must_not_be(
    tenants: list[Tenant], missing: int, waited_s: float
) -> None:
    decided = room(*tenants, missing=missing, waited_s=waited_s)
    by_id = {one.replica_id: one for one in tenants}
    assert not set(decided.evict) & set(decided.stop)
    for one in map(by_id.__getitem__, decided.evict + decided.stop):
        if one.state is not S.PARKED:
            assert one.state is S.READY
            assert one.resident_s >= 1.0
            assert not one.is_busy
            assert not one.is_needed
    for one in map(by_id.__getitem__, decided.yielding):
        assert one.state is S.READY
        assert one.is_busy
        assert not one.is_needed
        assert min(one.resident_s, waited_s) >= 30.0
    if not decided.is_enough:
        assert not decided.evict
        assert not decided.stop
        assert not decided.yielding


@given(TENANTS, st.integers(1, 60))
def test_without_anyone_of_the_chosen_it_would_be_too_little(
    tenants: list[Tenant], missing: int
) -> None:
    chosen = cheapest(tenants, missing)
    freed = sum(one.freed_bytes for one in chosen)
    if freed >= missing:
        assert all(freed - one.freed_bytes < missing for one in chosen)
    else:
        assert sum(one.freed_bytes for one in tenants) < missing
