"""The loop of an engine process: requests in, engine steps, tokens and status out.

One thread. It sleeps on the socket while no sequence is live and drains it between steps while
one is. It schedules nothing and touches no tensor; those are the engine's and the runner's.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from google.protobuf.message import DecodeError, Message

from runtime.engine.sequence import SequenceKey, StepResult
from runtime.engine_api import Runner, StepEngine
from runtime.errors import (
    InvalidRequest,
    InvalidSequence,
    RuntimeFault,
    WrongState,
    as_fault,
    encode_fault,
)
from runtime.ipc import Frame, FrameKind, FrameSocket
from runtime.phases import PhaseLog, bring_up
from runtime.rpc import inference_pb2 as pb
from runtime.translate import finished_message, load_figures, memory_message, sequence_request

HEARTBEAT_S = 1.0
BUSY_REPORT_S = 0.1  # figures change with every step; more would only load the watchers

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drain:
    """A drain under way; a monotonic deadline."""

    call_id: int
    deadline: float


class StepLoop:
    """Runs one engine until the server goes away.

    A fault of the engine itself is not caught: the process ends, and the server reports why.

    Args:
        connection: The socket to the runtime server.
        engine: Weights and KV cache in place.
        runner: The engine's runner, for parking.
        device_uuids: The devices this process is bound to.
    """

    def __init__(
        self,
        connection: FrameSocket,
        *,
        engine: StepEngine,
        runner: Runner,
        device_uuids: Sequence[str],
    ) -> None:
        self._connection = connection
        self._engine = engine
        self._runner = runner
        self._device_uuids = list(device_uuids)
        self._live: set[SequenceKey] = set()
        self._outbox: list[Frame] = []
        self._is_parked = False
        self._is_draining = False
        self._drains: list[_Drain] = []
        self._num_drained = 0
        self._last_active_unix_us = 0
        self._reported_at = 0.0
        self._reported_busy = False

    def run(self) -> None:
        """Serve until the connection ends, which raises PeerClosed."""
        self._report()
        while True:
            self._flush()
            for frame in self._connection.receive(self._patience_s()):
                self._handle(frame)
            if self._engine.has_work():
                self._emit(self._engine.step())
            if self._drains:
                self._advance_drains()
            self._report_if_due()

    def _patience_s(self) -> float:
        if self._engine.has_work():
            return 0.0
        return max(0.0, self._reported_at + HEARTBEAT_S - time.monotonic())

    def _handle(self, frame: Frame) -> None:
        match frame.kind:
            case FrameKind.ATTACH_REQUEST:
                self._attach_request(frame)
            case FrameKind.CLOSE_STREAM:
                self._engine.cancel_stream(frame.id)
            case FrameKind.PARK:
                self._answer(frame, self._park)
            case FrameKind.WAKE:
                self._answer(frame, self._wake)
            case FrameKind.DRAIN:
                self._start_drain(frame)
            case _:
                raise AssertionError(f"{frame.kind!r} is never sent to a loaded engine")

    # Sequences

    def _attach_request(self, frame: Frame) -> None:
        try:
            request = pb.AttachRequest.FromString(frame.payload)
        except DecodeError as error:
            self._refuse_stream(frame.id, InvalidRequest(f"not an AttachRequest: {error}"))
            return
        match request.WhichOneof("kind"):
            case "submit":
                self._submit(frame.id, request.submit)
            case "cancel_sequence_id":
                self._engine.cancel(SequenceKey(frame.id, request.cancel_sequence_id))
            case _:
                self._refuse_stream(frame.id, InvalidRequest("neither submit nor cancel is set"))

    def _submit(self, stream_id: int, submit: pb.Submit) -> None:
        key = SequenceKey(stream_id, submit.sequence_id)
        try:
            self._check_accepts(key)
            self._engine.submit(sequence_request(key, submit))
            self._live.add(key)
        except RuntimeFault as fault:
            self._reject(key, submit, fault)
        except Exception as error:  # one request must not end the others
            log.exception("submit_failed", stream_id=stream_id, sequence_id=submit.sequence_id)
            self._reject(key, submit, as_fault(error))

    def _check_accepts(self, key: SequenceKey) -> None:
        if self._is_parked:
            raise WrongState("the engine is parked: wake it first")
        if self._is_draining:
            raise WrongState("the runtime is draining and takes no new sequence")
        if key in self._live:
            raise InvalidSequence(f"sequence {key.sequence_id} is already running on this stream")

    def _reject(self, key: SequenceKey, submit: pb.Submit, fault: RuntimeFault) -> None:
        log.info("sequence_refused", **key._asdict(), fault=type(fault).__name__)
        finished = pb.Finished(
            sequence_id=key.sequence_id,
            reason=pb.FINISH_REASON_ERROR,
            num_prompt_tokens=len(submit.prompt_token_ids),
            error=str(fault),
        )
        output = pb.StepOutput(finished=[finished])
        self._send(FrameKind.STEP_OUTPUT, key.stream_id, output.SerializeToString())

    def _refuse_stream(self, stream_id: int, fault: RuntimeFault) -> None:
        log.warning("stream_refused", stream_id=stream_id, reason=str(fault))
        self._engine.cancel_stream(stream_id)
        self._send(FrameKind.STREAM_REFUSAL, stream_id, encode_fault(fault))

    def _emit(self, result: StepResult) -> None:
        """Send one message to each stream the step concerns."""
        outputs: defaultdict[int, pb.StepOutput] = defaultdict(pb.StepOutput)
        for (stream_id, sequence_id), token_id in result.tokens:
            output = outputs[stream_id]
            output.sequence_ids.append(sequence_id)
            output.token_ids.append(token_id)
        for finished in result.finished:
            outputs[finished.key.stream_id].finished.append(finished_message(finished))
            self._live.discard(finished.key)
            self._last_active_unix_us = time.time_ns() // 1000
        for stream_id, output in outputs.items():
            self._send(FrameKind.STEP_OUTPUT, stream_id, output.SerializeToString())

    # Operations

    def _answer(self, frame: Frame, operation: Callable[[bytes], Message]) -> None:
        try:
            response = operation(frame.payload)
        except RuntimeFault as fault:
            log.warning("refused", operation=frame.kind.name, reason=str(fault))
            self._send(FrameKind.REFUSAL, frame.id, encode_fault(fault))
        else:
            self._report()
            self._send(FrameKind.REPLY, frame.id, response.SerializeToString())

    def _park(self, _payload: bytes) -> pb.ParkResponse:
        if self._is_parked:
            raise WrongState("the engine is parked already")
        if self._engine.has_work():
            raise WrongState(f"{len(self._live)} sequences are in flight: drain or cancel first")
        phase_log = PhaseLog()
        with phase_log.measure("release"):
            freed_bytes = self._runner.release()
        self._is_parked = True
        log.info("parked", freed_bytes=freed_bytes)
        memory = memory_message(self._runner)
        return pb.ParkResponse(freed_bytes=freed_bytes, phases=phase_log.phases, memory=memory)

    def _wake(self, payload: bytes) -> pb.WakeResponse:
        device_uuids = pb.WakeRequest.FromString(payload).device_uuids
        if not self._is_parked:
            raise WrongState("the engine is not parked")
        if device_uuids and list(device_uuids) != self._device_uuids:
            raise WrongState(
                f"this engine is bound to devices {self._device_uuids}, not {list(device_uuids)}: "
                "load the snapshot in another runtime"
            )
        phase_log = PhaseLog()
        try:
            bring_up(self._runner, phase_log, self._report_progress)
        except Exception as error:
            log.exception("wake_failed")
            self._runner.release()
            raise as_fault(error) from error
        self._engine.reset_cache()
        self._is_parked = False
        log.info("woken")
        return pb.WakeResponse(phases=phase_log.phases, memory=memory_message(self._runner))

    def _start_drain(self, frame: Frame) -> None:
        timeout_s = pb.DrainRequest.FromString(frame.payload).timeout_s
        self._is_draining = True
        self._drains.append(_Drain(call_id=frame.id, deadline=time.monotonic() + timeout_s))

    def _advance_drains(self) -> None:
        """Cancel what is left when a drain is out of time; answer all when nothing is left."""
        now = time.monotonic()
        if not self._engine.has_work():
            response = pb.DrainResponse(num_cancelled=self._num_drained).SerializeToString()
            for drain in self._drains:
                self._send(FrameKind.REPLY, drain.call_id, response)
            self._drains.clear()
        elif self._num_drained == 0 and any(now >= drain.deadline for drain in self._drains):
            self._num_drained = len(self._live)
            for key in self._live:
                self._engine.cancel(key)

    # Status

    def _report_if_due(self) -> None:
        silence_s = time.monotonic() - self._reported_at
        is_busy = bool(self._live)
        if (
            silence_s >= HEARTBEAT_S
            or is_busy != self._reported_busy
            or (is_busy and silence_s >= BUSY_REPORT_S)
        ):
            self._report()

    def _report(self) -> None:
        self._reported_at = time.monotonic()
        self._reported_busy = bool(self._live)
        status = pb.RuntimeStatus(
            memory=memory_message(self._runner),
            load=load_figures(self._engine.figures()),
            last_active_unix_us=self._last_active_unix_us,
        )
        self._send(FrameKind.STATUS, 0, status.SerializeToString())

    def _report_progress(self, _done_bytes: int, _total_bytes: int) -> None:
        if time.monotonic() - self._reported_at >= HEARTBEAT_S:
            self._report()
            self._flush()

    def _send(self, kind: FrameKind, id_: int, payload: bytes) -> None:
        self._outbox.append(Frame(kind, id_, payload))

    def _flush(self) -> None:
        if self._outbox:
            self._connection.send(self._outbox)
            self._outbox.clear()
