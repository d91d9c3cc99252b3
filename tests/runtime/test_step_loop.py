"""The loop of an engine process, driven over its socket from another thread."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from runtime.config import EngineConfig
from runtime.engine.sequence import SequenceKey, StepResult
from runtime.ipc import Frame, FrameKind, FrameSocket, PeerClosed
from runtime.profile import EngineProfile
from runtime.rpc import inference_pb2 as pb
from runtime.step_loop import HEARTBEAT_S, IDLE_AFTER_S, SETTLED_AFTER_S, StepLoop
from tests.fakes.engine import FakeEngine, FakeRunner, Script

pytestmark = pytest.mark.timeout(30)


PACE_S = 0.0035


class PatientEngine(FakeEngine):
    """Takes every moment of idle time and wants its steps apart; notes when either came."""

    def __init__(self, runner: FakeRunner) -> None:
        super().__init__(runner)
        self.idle_at: list[float] = []
        self.has_idle_work = True
        self.too_early_s: list[float] = []
        self._next_step_at = 0.0
        self.is_held = False  # as by a grammar that is compiled, until what needs it is cancelled

    def spare_s(self) -> float:
        if self.is_held:
            return PACE_S
        return max(0.0, self._next_step_at - time.monotonic())

    def step(self) -> StepResult:
        self.too_early_s.append(self.spare_s())
        self._next_step_at = time.monotonic() + PACE_S
        return super().step()

    def cancel(self, key: SequenceKey) -> None:
        self.is_held = False
        super().cancel(key)

    def use_idle_time(self) -> bool:
        self.idle_at.append(time.monotonic())
        return self.has_idle_work


@dataclass
class Peer:
    """The server's end of the socket, and the engine at the other."""

    connection: FrameSocket
    engine: PatientEngine
    runner: FakeRunner
    replies: list[Frame] = field(default_factory=list)

    def call(self, kind: FrameKind, payload: bytes = b"") -> float:
        """Make a call; return when its answer came, in monotonic seconds."""
        self.connection.send([Frame(kind, 1, payload)])
        while True:
            for frame in self.connection.receive(5.0):
                if frame.kind is FrameKind.REPLY:
                    return time.monotonic()
                assert frame.kind is FrameKind.STATUS, frame


@pytest.fixture
def peer() -> Iterator[Peer]:
    ours, theirs = socket.socketpair()
    config = EngineConfig(max_model_len=128)
    runner = FakeRunner(Script(), config)
    runner.load_weights()
    runner.allocate_kv()
    engine = PatientEngine(runner)

    def serve() -> None:
        profile = EngineProfile(Path("/nonexistent"), config, runner)
        loop = StepLoop(
            FrameSocket(theirs), engine=engine, runner=runner, profile=profile, device_uuids=()
        )
        with pytest.raises(PeerClosed):
            loop.run()

    thread = threading.Thread(target=serve)
    thread.start()
    yield Peer(FrameSocket(ours), engine, runner)
    ours.close()
    thread.join()
    theirs.close()


def test_who_has_woken_it_hears_of_it_before_idle_time_is_used(peer: Peer) -> None:
    peer.call(FrameKind.PARK, pb.ParkRequest().SerializeToString())
    time.sleep(2 * IDLE_AFTER_S)
    num_before = len(peer.engine.idle_at)
    woken_at = peer.call(FrameKind.WAKE, pb.WakeRequest().SerializeToString())
    assert len(peer.engine.idle_at) == num_before, "the first request is on its way"
    time.sleep(2 * IDLE_AFTER_S)
    assert peer.engine.idle_at[num_before] >= woken_at


def test_idle_time_is_left_alone_while_the_memory_is_away(peer: Peer) -> None:
    time.sleep(2 * IDLE_AFTER_S)
    assert peer.engine.idle_at
    parked_at = peer.call(FrameKind.PARK, pb.ParkRequest().SerializeToString())
    time.sleep(2 * IDLE_AFTER_S)
    assert peer.engine.idle_at[-1] <= parked_at


def test_memory_given_back_is_settled_once_after_a_moment(peer: Peer) -> None:
    light = pb.ParkRequest(mode=pb.PARK_MODE_LIGHT).SerializeToString()
    for num_parks in (1, 2):
        parked_at = peer.call(FrameKind.PARK, light)
        time.sleep(2 * SETTLED_AFTER_S)
        assert len(peer.runner.settled_at) == num_parks
        assert peer.runner.settled_at[-1] >= parked_at + 0.9 * SETTLED_AFTER_S
        peer.call(FrameKind.WAKE, pb.WakeRequest().SerializeToString())


def test_an_engine_about_to_be_taken_off_its_gpus_does_not_touch_them(peer: Peer) -> None:
    peer.call(FrameKind.PARK, pb.ParkRequest(mode=pb.PARK_MODE_DEEP).SerializeToString())
    time.sleep(2 * SETTLED_AFTER_S)
    peer.call(FrameKind.WAKE, pb.WakeRequest().SerializeToString())
    assert not peer.runner.settled_at


def test_idle_time_is_used_again_after_a_step(peer: Peer) -> None:
    peer.engine.has_idle_work = False
    time.sleep(2 * IDLE_AFTER_S)
    num_before = len(peer.engine.idle_at)
    assert num_before
    time.sleep(2 * IDLE_AFTER_S)
    assert len(peer.engine.idle_at) == num_before, "nothing was left to be done"
    request = pb.AttachRequest(
        submit=pb.Submit(
            sequence_id=1, prompt_token_ids=[1], sampling=pb.SamplingParams(max_tokens=1)
        )
    )
    peer.connection.send([Frame(FrameKind.ATTACH_REQUEST, 1, request.SerializeToString())])
    time.sleep(2 * IDLE_AFTER_S)
    assert len(peer.engine.idle_at) > num_before


def test_no_step_begins_before_its_time(peer: Peer) -> None:
    sampling = pb.SamplingParams(max_tokens=8)
    submit = pb.Submit(sequence_id=1, prompt_token_ids=[1], sampling=sampling)
    request = pb.AttachRequest(submit=submit)
    peer.connection.send([Frame(FrameKind.ATTACH_REQUEST, 1, request.SerializeToString())])
    num_tokens = 0
    while num_tokens < 8:
        for frame in peer.connection.receive(5.0):
            if frame.kind is FrameKind.STEP_OUTPUT:
                num_tokens += len(pb.StepOutput.FromString(frame.payload).token_ids)
    assert peer.engine.too_early_s == [0.0] * 8


def test_the_engine_is_alive_and_drained_while_no_step_can_begin(peer: Peer) -> None:
    peer.engine.is_held = True
    submit = pb.Submit(
        sequence_id=1, prompt_token_ids=[1], sampling=pb.SamplingParams(max_tokens=3)
    )
    request = pb.AttachRequest(submit=submit)
    peer.connection.send([Frame(FrameKind.ATTACH_REQUEST, 7, request.SerializeToString())])
    until = time.monotonic() + 2.5 * HEARTBEAT_S
    num_statuses = 0
    while time.monotonic() < until:
        num_statuses += sum(
            frame.kind is FrameKind.STATUS for frame in peer.connection.receive(0.1)
        )
    assert num_statuses >= 2
    drain = pb.DrainRequest(timeout_s=0.1)
    peer.connection.send([Frame(FrameKind.DRAIN, 1, drain.SerializeToString())])
    answers: list[Frame] = []
    while not answers and time.monotonic() < until + 10.0:
        answers = [f for f in peer.connection.receive(1.0) if f.kind is FrameKind.REPLY]
    assert answers
    assert not peer.engine.is_held
