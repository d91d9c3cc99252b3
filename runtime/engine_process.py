"""The life of a forked engine process: bind devices, load one snapshot, run the step loop."""

import faulthandler
import os
import socket
import time
from pathlib import Path
from typing import Any

import structlog

from runtime.engine_api import EngineFactory
from runtime.errors import as_fault, encode_fault
from runtime.ipc import Frame, FrameKind, FrameSocket, PeerClosed
from runtime.phases import PhaseLog, bring_up
from runtime.profile import EngineProfile
from runtime.rpc import inference_pb2 as pb
from runtime.step_loop import HEARTBEAT_S, StepLoop
from runtime.translate import engine_config, memory_message

log = structlog.get_logger()


def run_engine(sock: socket.socket, *, factory: EngineFactory[Any], store: Path) -> None:
    """Serve the runtime server over `sock` until it goes away or the load fails.

    Args:
        sock: A connected stream socket; its first and only frame at first is a LOAD.
        factory: Builds runner and engine.
        store: Directory of snapshots.
    """
    faulthandler.enable()
    connection = FrameSocket(sock)
    try:
        frame = _first_frame(connection)
        try:
            loop, response = _load(connection, frame.payload, factory=factory, store=store)
        except PeerClosed:
            raise
        except Exception as error:
            log.exception("load_failed")
            connection.send([Frame(FrameKind.REFUSAL, frame.id, encode_fault(as_fault(error)))])
            return
        connection.send([Frame(FrameKind.REPLY, frame.id, response.SerializeToString())])
        loop.run()
    except PeerClosed:
        log.info("server_gone")


def _first_frame(connection: FrameSocket) -> Frame:
    while not (frames := connection.receive(HEARTBEAT_S)):
        pass
    [frame] = frames
    assert frame.kind is FrameKind.LOAD, frame.kind
    return frame


def _load(
    connection: FrameSocket, payload: bytes, *, factory: EngineFactory[Any], store: Path
) -> tuple[StepLoop, pb.LoadResponse]:
    request = pb.LoadRequest.FromString(payload)
    # An empty value hides every device. This must come before the first call into a driver.
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(request.device_uuids)
    config = engine_config(request)
    phase_log = PhaseLog()
    runner = factory.open_runner(store / request.snapshot, config, phase_log.measure)
    with phase_log.measure("profile"):
        profile = EngineProfile(store / request.snapshot, config, runner)
        profile.apply()
    num_kv_blocks = bring_up(runner, phase_log, _LoadHeartbeat(connection))
    with phase_log.measure("build"):
        engine = factory.build_engine(store / request.snapshot, config, runner)
    memory = memory_message(runner)
    profile.started(memory, num_kv_blocks)
    response = pb.LoadResponse(
        phases=phase_log.phases,
        memory=memory,
        profile=profile.use,
        max_model_len=runner.max_model_len,
        num_kv_blocks=num_kv_blocks,
    )
    log.info("loaded", snapshot=request.snapshot, num_kv_blocks=num_kv_blocks)
    loop = StepLoop(
        connection,
        engine=engine,
        runner=runner,
        profile=profile,
        device_uuids=request.device_uuids,
    )
    return loop, response


class _LoadHeartbeat:
    """Tells the server, while weights are read, that this process is alive."""

    def __init__(self, connection: FrameSocket) -> None:
        self._connection = connection
        self._sent_at = time.monotonic()

    def __call__(self, _done_bytes: int, _total_bytes: int) -> None:
        if time.monotonic() - self._sent_at < HEARTBEAT_S:
            return
        self._sent_at = time.monotonic()
        status = pb.RuntimeStatus().SerializeToString()
        self._connection.send([Frame(FrameKind.STATUS, 0, status)])
