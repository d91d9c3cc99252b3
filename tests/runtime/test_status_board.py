import pytest

from runtime.rpc import inference_pb2 as pb
from runtime.status_board import REPEAT_S, StatusBoard

pytestmark = pytest.mark.looptime


@pytest.fixture
def board() -> StatusBoard:
    return StatusBoard(runtime_id="test", build="1")


async def test_a_follower_gets_the_present_status_first(board: StatusBoard) -> None:
    followed = board.follow()
    status = await anext(followed)
    assert (status.state, status.runtime_id, status.build) == (
        pb.RUNTIME_STATE_STARTING,
        "test",
        "1",
    )
    await followed.aclose()


async def test_a_slow_follower_misses_all_but_the_newest(board: StatusBoard) -> None:
    followed = board.follow()
    await anext(followed)
    for pid in range(1, 1000):
        board.update(engine_pid=pid)
    assert (await anext(followed)).engine_pid == 999
    board.update(engine_pid=1000)
    assert (await anext(followed)).engine_pid == 1000
    await followed.aclose()


async def test_followers_do_not_take_changes_from_each_other(board: StatusBoard) -> None:
    followers = [board.follow() for _ in range(3)]
    for follower in followers:
        await anext(follower)
    board.update(error="oops")
    for follower in followers:
        assert (await anext(follower)).error == "oops"
        await follower.aclose()


async def test_silence_repeats_the_status(board: StatusBoard, looptime: float) -> None:
    followed = board.follow()
    await anext(followed)
    await anext(followed)
    assert looptime == REPEAT_S
    await followed.aclose()


async def test_closing_ends_the_followers(board: StatusBoard) -> None:
    followed = board.follow()
    await anext(followed)
    board.close()
    with pytest.raises(StopAsyncIteration):
        await anext(followed)


async def test_an_engine_with_work_was_active_until_it_ended(board: StatusBoard) -> None:
    board.engine_started(4711)
    board.engine_reported(pb.RuntimeStatus(load=pb.LoadFigures(num_waiting=1)))
    assert board.read().last_active_unix_us == 0
    board.engine_gone()
    status = board.read()
    assert status.last_active_unix_us > 0
    assert (status.engine_pid, status.heartbeat_age_s) == (0, 0.0)


async def test_an_idle_engine_was_active_when_it_said(board: StatusBoard) -> None:
    board.engine_reported(pb.RuntimeStatus(last_active_unix_us=17))
    board.engine_gone()
    assert board.read().last_active_unix_us == 17


async def test_what_is_read_is_a_copy(board: StatusBoard) -> None:
    board.read().error = "changed by a reader"
    assert board.read().error == ""
