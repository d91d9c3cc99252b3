"""The loop of an engine process: requests in, engine steps, tokens and status out.

One thread. It sleeps on the socket while no sequence is live and drains it between steps while
one is. It schedules nothing and touches no tensor; those are the engine's and the runner's.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import structlog
from google.protobuf.message import DecodeError, Message

from runtime.drains import Drains
from runtime.embeds import Embeds
from runtime.engine.pooling import Pooled
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
from runtime.profile import EngineProfile
from runtime.residency import Residency
from runtime.rpc import inference_pb2 as pb
from runtime.translate import (
    finished_message,
    load_figures,
    logprobs_message,
    memory_message,
    prompt_logprobs_message,
    sequence_request,
)

HEARTBEAT_S = 1.0
TICK_S = 0.001  # the shortest time for which a socket can be waited for
IDLE_AFTER_S = 0.1  # the next request of a conversation is seldom sooner
SETTLED_AFTER_S = 0.5  # after parking; until then a GPU clears what it was given back
BUSY_REPORT_S = 0.1  # figures change with every step; more would only load the watchers

log = structlog.get_logger()


class StepLoop:
    """Runs one engine until the server goes away.

    A fault of the engine itself is not caught: the process ends, and the server reports why.

    Args:
        connection: The socket to the runtime server.
        engine: Weights and KV cache in place.
        runner: The engine's runner, for parking.
        profile: What the engine leaves for later starts.
        device_uuids: The devices this process is bound to.
    """

    def __init__(
        self,
        connection: FrameSocket,
        *,
        engine: StepEngine,
        runner: Runner,
        profile: EngineProfile,
        device_uuids: Sequence[str],
    ) -> None:
        self._connection = connection
        self._engine = engine
        self._runner = runner
        self._profile = profile
        self._residency = Residency(engine, runner, device_uuids=device_uuids)
        self._drains = Drains(engine)
        self._embeds = Embeds(engine)
        self._live: set[SequenceKey] = set()
        self._outbox: list[Frame] = []
        self._last_active_unix_us = 0
        self._reported_at = 0.0
        self._reported_busy = False
        self._busy_at = time.monotonic()
        self._has_idle_work = True

    def run(self) -> None:
        """Serve until the connection ends, which raises PeerClosed."""
        self._report()
        while True:
            self._flush()
            for frame in self._connection.receive(self._patience_s()):
                self._handle(frame)
            if self._engine.has_work():
                self._be_busy()
                spare_s = self._engine.spare_s()
                if spare_s <= 0.0:
                    self._emit(self._engine.step())
                    self._flush()  # before anything else that takes time
                elif spare_s < TICK_S:  # a step now would leave out who comes before its time
                    time.sleep(spare_s)
            elif self._has_idle_work and self._quiet_s() >= self._idle_after_s:
                self._has_idle_work = self._use_idle_time()
            for call_id in self._drains.advance(self._live):
                self._reply(call_id, pb.DrainResponse(num_cancelled=self._drains.num_cancelled))
            self._report_if_due()

    def _patience_s(self) -> float:
        if self._engine.has_work():
            return self._engine.spare_s() // TICK_S * TICK_S
        wait_s = self._reported_at + HEARTBEAT_S - time.monotonic()
        if self._has_idle_work:
            wait_s = min(wait_s, self._idle_after_s - self._quiet_s())
        return max(0.0, wait_s)

    @property
    def _idle_after_s(self) -> float:
        return SETTLED_AFTER_S if self._residency.is_parked else IDLE_AFTER_S

    def _be_busy(self) -> None:
        self._busy_at = time.monotonic()
        self._has_idle_work = True

    def _quiet_s(self) -> float:
        return time.monotonic() - self._busy_at

    def _use_idle_time(self) -> bool:
        """Return whether there may be more to do."""
        if not self._residency.is_parked:
            return self._engine.use_idle_time()
        self._runner.settle()
        return False

    def _park(self, frame: Frame) -> None:
        mode = pb.ParkRequest.FromString(frame.payload).mode
        self._answer(frame, self._residency.park)
        if self._residency.is_parked:
            self._busy_at = time.monotonic()
            self._has_idle_work = mode == pb.PARK_MODE_LIGHT  # else it is taken off its GPUs now

    def _wake(self, frame: Frame) -> None:
        request = pb.WakeRequest.FromString(frame.payload)
        self._answer(frame, lambda: self._residency.wake(request, self._report_progress))
        self._be_busy()  # a request is about to come

    def _handle(self, frame: Frame) -> None:
        match frame.kind:
            case FrameKind.ATTACH_REQUEST:
                self._attach_request(frame)
            case FrameKind.CLOSE_STREAM:
                self._engine.cancel_stream(frame.id)
            case FrameKind.EMBED:
                self._embed(frame)
            case FrameKind.CANCEL_CALL:
                self._embeds.cancel(frame.id)
            case FrameKind.PARK:
                self._park(frame)
            case FrameKind.WAKE:
                self._wake(frame)
            case FrameKind.PROFILE:
                wanted = pb.ProfileRequest.FromString(frame.payload)
                self._answer(frame, lambda: self._profile.record(wanted))
            case FrameKind.DRAIN:
                drain = pb.DrainRequest.FromString(frame.payload)
                self._drains.start(frame.id, drain.timeout_s)
            case _:
                raise AssertionError(f"{frame.kind!r} is never sent to a loaded engine")

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
            log.exception("submit_failed", **key._asdict())
            self._reject(key, submit, as_fault(error))

    def _embed(self, frame: Frame) -> None:
        try:
            self._check_serves()
            self._embeds.start(frame.id, pb.EmbedRequest.FromString(frame.payload))
        except RuntimeFault as fault:
            log.info("texts_refused", call_id=frame.id, fault=type(fault).__name__)
            self._send(FrameKind.REFUSAL, frame.id, encode_fault(fault))
        except Exception as error:  # one call must not end the others
            log.exception("embed_failed", call_id=frame.id)
            self._send(FrameKind.REFUSAL, frame.id, encode_fault(as_fault(error)))

    def _check_serves(self) -> None:
        if self._residency.is_parked:
            raise WrongState("the engine is parked: wake it first")
        if self._drains.has_begun:
            raise WrongState("the runtime is draining and takes no new sequence")

    def _check_accepts(self, key: SequenceKey) -> None:
        self._check_serves()
        if key in self._live:
            raise InvalidSequence(f"sequence {key.sequence_id} is already running on this stream")

    def _reject(self, key: SequenceKey, submit: pb.Submit, fault: RuntimeFault) -> None:
        is_invalid = isinstance(fault, InvalidSequence)
        # Not the message: it may name token ids.
        log.info("sequence_refused", **key._asdict(), fault=type(fault).__name__)
        finished = pb.Finished(
            sequence_id=key.sequence_id,
            reason=pb.FINISH_REASON_REFUSED if is_invalid else pb.FINISH_REASON_ERROR,
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
        for (stream_id, sequence_id), num_cached_tokens in result.started.items():
            started = pb.Started(sequence_id=sequence_id, num_cached_tokens=num_cached_tokens)
            outputs[stream_id].started.append(started)
        for (stream_id, sequence_id), logprobs in result.logprobs.items():
            outputs[stream_id].logprobs.append(logprobs_message(sequence_id, logprobs))
        for (stream_id, sequence_id), found in result.prompt_logprobs.items():
            message = prompt_logprobs_message(sequence_id, found)
            outputs[stream_id].prompt_logprobs.append(message)
        for finished in result.finished:
            outputs[finished.key.stream_id].finished.append(finished_message(finished))
            self._live.discard(finished.key)
            self._last_active_unix_us = time.time_ns() // 1000
        if result.pooled:
            self._finish_texts(result.pooled)
        for stream_id, output in outputs.items():
            self._send(FrameKind.STEP_OUTPUT, stream_id, output.SerializeToString())

    def _finish_texts(self, pooled: Sequence[Pooled]) -> None:
        """Answer the calls whose last text this step has embedded."""
        for call_id, answer in self._embeds.take(pooled):
            if isinstance(answer, RuntimeFault):
                self._send(FrameKind.REFUSAL, call_id, encode_fault(answer))
            else:
                self._reply(call_id, answer)
            self._last_active_unix_us = time.time_ns() // 1000

    def _answer(self, frame: Frame, operation: Callable[[], Message]) -> None:
        try:
            response = operation()
        except RuntimeFault as fault:
            log.warning("refused", operation=frame.kind.name, reason=str(fault))
            self._send(FrameKind.REFUSAL, frame.id, encode_fault(fault))
        else:
            self._report()  # first, so that the new state is never seen with the old memory
            self._reply(frame.id, response)

    def _report_if_due(self) -> None:
        silence_s = time.monotonic() - self._reported_at
        is_busy = self._is_busy
        if (
            silence_s >= HEARTBEAT_S
            or is_busy != self._reported_busy
            or (is_busy and silence_s >= BUSY_REPORT_S)
        ):
            self._report()

    @property
    def _is_busy(self) -> bool:
        return bool(self._live) or self._embeds.has_calls

    def _report(self) -> None:
        self._reported_at = time.monotonic()
        self._reported_busy = self._is_busy
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

    def _reply(self, call_id: int, response: Message) -> None:
        self._send(FrameKind.REPLY, call_id, response.SerializeToString())

    def _send(self, kind: FrameKind, id_: int, payload: bytes) -> None:
        self._outbox.append(Frame(kind, id_, payload))

    def _flush(self) -> None:
        if self._outbox:
            self._connection.send(self._outbox)
            self._outbox.clear()
