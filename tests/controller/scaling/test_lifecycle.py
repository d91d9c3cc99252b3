"""The replica state machine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.scaling.lifecycle import HISTORY_LENGTH, IllegalTransition, Lifecycle, ReplicaState

S = ReplicaState


def walk(*states: ReplicaState) -> Lifecycle:
    lifecycle = Lifecycle(at=0.0, reason="requests wait")
    for at, state in enumerate(states, start=1):
        lifecycle.move(state, at=float(at), reason="test")
    return lifecycle


def test_the_whole_life_from_start_over_parking_to_stop() -> None:
    lifecycle = walk(S.LOADING, S.READY, S.PARKING, S.PARKED, S.LOADING, S.READY, S.DRAINING)
    lifecycle.move(S.STOPPED, at=9.0, reason="runtime removed")
    assert lifecycle.state is S.STOPPED
    assert lifecycle.since == 9.0
    assert [move.target for move in lifecycle.history][:3] == [S.STARTING, S.LOADING, S.READY]


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ([], S.READY),
        ([S.LOADING, S.READY], S.PARKED),
        ([S.LOADING, S.READY, S.PARKING, S.PARKED], S.READY),
        ([S.LOADING, S.READY, S.DRAINING], S.READY),
        ([S.FAILED], S.LOADING),
        ([S.FAILED, S.STOPPED], S.STARTING),
    ],
)
def test_an_illegal_move_is_refused_with_its_history(
    path: list[ReplicaState], target: ReplicaState
) -> None:
    lifecycle = walk(*path)
    before = lifecycle.state
    with pytest.raises(IllegalTransition, match="cannot become") as caught:
        lifecycle.move(target, at=99.0, reason="test")
    assert lifecycle.state is before
    assert caught.value.history == lifecycle.history


@given(st.lists(st.sampled_from(list(ReplicaState)), max_size=60))
def test_whatever_is_asked_the_end_is_final_and_history_is_bounded(
    targets: list[ReplicaState],
) -> None:
    lifecycle = Lifecycle(at=0.0, reason="requests wait")
    for at, target in enumerate(targets, start=1):
        was = lifecycle.state
        try:
            lifecycle.move(target, at=float(at), reason="test")
        except IllegalTransition:
            assert lifecycle.state is was
        else:
            assert was is not S.STOPPED
            assert lifecycle.state is target
    assert len(lifecycle.history) <= HISTORY_LENGTH


def test_a_move_can_be_undone_as_if_it_had_not_been() -> None:
    lifecycle = Lifecycle(at=1.0, reason="adopted", state=ReplicaState.PARKED)
    before = lifecycle.history
    move = lifecycle.move(ReplicaState.LOADING, at=5.0, reason="requests wait")
    assert lifecycle.undo() == move
    assert (lifecycle.history, lifecycle.since) == (before, 1.0)
