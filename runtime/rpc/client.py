"""All a controller sees of a runtime: calls, a status stream, and streams of sequences.

RuntimeRpcError
├── RuntimeUnavailable  gone, unreachable, or dying; another replica may do it
├── RuntimeRefused      invalid, not possible now, or does not fit; the same call fails again
│   ├── SnapshotUnusable  missing or damaged
│   └── StreamOverrun   we read a stream too slowly; its sequences are over, it goes on
└── RuntimeTimedOut     no answer in time
"""

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Sequence,
)
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import grpc
import grpc.aio
import structlog

from runtime.rpc import inference_pb2 as pb
from runtime.rpc.inference_pb2_grpc import RuntimeServiceStub

MAX_MESSAGE_BYTES = 64 << 20
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A runtime that is starting has no socket yet; gRPC's own first retry comes after a second.
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 100),
    # Channels to the same socket must not share a connection's back-off.
    ("grpc.use_local_subchannel_pool", 1),
)

ANSWER_MARGIN_S = 10.0

log = structlog.get_logger()


class RuntimeRpcError(Exception):
    """A call to a runtime failed.

    Args:
        message: What the runtime, or gRPC, said.
    """


class RuntimeUnavailable(RuntimeRpcError):
    """The runtime is gone, cannot be reached, or lost its engine."""


class RuntimeRefused(RuntimeRpcError):
    """The runtime will not do this; the same call would be refused again."""


class SnapshotUnusable(RuntimeRefused):
    """The runtime found a snapshot missing or damaged: no other runtime can load it either."""


class StreamOverrun(RuntimeRefused):
    """A stream was read too slowly, so its sequences were cancelled; the runtime is well."""


class RuntimeTimedOut(RuntimeRpcError):
    """No answer came in time; the runtime may still be at it."""


_ERRORS: dict[grpc.StatusCode, type[RuntimeRpcError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: RuntimeTimedOut,
    grpc.StatusCode.INVALID_ARGUMENT: RuntimeRefused,
    grpc.StatusCode.NOT_FOUND: SnapshotUnusable,
    grpc.StatusCode.FAILED_PRECONDITION: RuntimeRefused,
    grpc.StatusCode.OUT_OF_RANGE: RuntimeRefused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RuntimeRefused,
    grpc.StatusCode.UNIMPLEMENTED: RuntimeRefused,
    grpc.StatusCode.PERMISSION_DENIED: RuntimeRefused,
    grpc.StatusCode.UNAUTHENTICATED: RuntimeRefused,
    grpc.StatusCode.ALREADY_EXISTS: RuntimeRefused,
    grpc.StatusCode.DATA_LOSS: SnapshotUnusable,
    grpc.StatusCode.ABORTED: RuntimeRefused,
}


class SequenceSink(Protocol):
    """Receives one sequence, on the event loop; must not block."""

    def on_token(self, token_id: int) -> None:
        """Take the next token."""

    def on_logprobs(self, logprobs: pb.TokenLogprobs) -> None:
        """Take how likely the next token is, just before it, if that was asked for."""

    def on_prompt_logprobs(self, logprobs: pb.PromptLogprobs) -> None:
        """Take how likely a part of the prompt is, before any token, if that was asked for."""

    def on_started(self, started: pb.Started) -> None:
        """Take what is known with the first token, just before that."""

    def on_finished(self, finished: pb.Finished) -> None:
        """Take the end; nothing comes after it."""

    def on_broken(self, error: RuntimeRpcError) -> None:
        """Take, instead of the end, that the stream died; nothing comes after it."""


Stream: TypeAlias = "grpc.aio.StreamStreamCall[pb.AttachRequest, pb.StepOutput]"
Outputs = AsyncIterator[pb.StepOutput]


class Attachment:
    """One stream of sequences. Made by `RuntimeClient.attach`; used on its event loop only.

    A stream that the runtime has closed because it was read too slowly is opened anew: its
    sequences are over, and those submitted from then on wait for the new one.

    Args:
        call: The open gRPC call.
        outputs: Its messages after the first.
        reopen: Returns another call and its messages.
    """

    def __init__(
        self,
        call: Stream,
        outputs: Outputs,
        reopen: Callable[[], Awaitable[tuple[Stream, Outputs]]],
    ) -> None:
        self._call = call
        self._outputs = outputs
        self._reopen = reopen
        self._is_reopening = False
        self._sinks: dict[int, SequenceSink] = {}
        self._outbox: asyncio.Queue[pb.AttachRequest] = asyncio.Queue()
        self._num_submitted = 0
        self._error: RuntimeRpcError | None = None
        self._reader = asyncio.create_task(self._read(), name="attachment reader")
        self._writer = asyncio.create_task(self._write(), name="attachment writer")

    @property
    def is_broken(self) -> bool:
        """Whether the stream has ended; it does not come back."""
        return self._error is not None

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: pb.SamplingParams,
        sink: SequenceSink,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> int:
        """Queue a sequence and return its id; never waits.

        An invalid sequence ends with FINISH_REASON_REFUSED.

        Raises:
            RuntimeUnavailable: The stream is broken.
            RuntimeRefused: A token id is no unsigned 32-bit number.
        """
        if self._error is not None:
            raise RuntimeUnavailable(f"the stream is broken: {self._error}")
        self._num_submitted += 1
        sequence_id = self._num_submitted
        try:
            submit = pb.Submit(
                sequence_id=sequence_id,
                prompt_token_ids=prompt_token_ids,
                sampling=sampling,
                priority=priority,
                cache_salt=cache_salt,
            )
        except (TypeError, ValueError) as error:
            raise RuntimeRefused(f"a token id does not fit the wire: {error}") from error
        self._sinks[sequence_id] = sink
        self._outbox.put_nowait(pb.AttachRequest(submit=submit))
        return sequence_id

    def cancel(self, sequence_id: int) -> None:
        """Ask for the end of a sequence; its sink hears FINISH_REASON_CANCELLED in time.

        One that is over, or on a broken stream, is left alone.
        """
        if sequence_id in self._sinks:
            self._outbox.put_nowait(pb.AttachRequest(cancel_sequence_id=sequence_id))

    async def close(self) -> None:
        """Close the stream; sequences still running are cancelled and their sinks told."""
        self._call.cancel()
        if self._is_reopening:
            self._reader.cancel()
        await asyncio.wait([self._reader, self._writer])

    async def _read(self) -> None:
        error: RuntimeRpcError = RuntimeUnavailable("the stream was closed")
        try:
            while overrun := await self._read_call():
                await self._begin_anew(overrun)
        except RuntimeRpcError as caught:
            error = caught
        except asyncio.CancelledError:
            if not self._call.cancelled():
                raise
        finally:
            self._break(error)

    async def _read_call(self) -> StreamOverrun | None:
        """Hand out what one call brings; return why it is over if another may follow."""
        try:
            with _translated():
                async for output in self._outputs:
                    self._deliver(output)
        except RuntimeRefused as error:
            cause = error.__cause__
            assert isinstance(cause, grpc.aio.AioRpcError)
            if cause.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                return StreamOverrun(str(error))
            raise
        return None

    async def _begin_anew(self, overrun: StreamOverrun) -> None:
        """End all sequences and open another call for those to come."""
        log.warning("stream_overrun", num_sequences=len(self._sinks), reason=str(overrun))
        self._is_reopening = True
        self._writer.cancel()
        await asyncio.wait([self._writer])
        self._outbox = asyncio.Queue()
        self._end_all(overrun)
        self._call, self._outputs = await self._reopen()
        self._writer = asyncio.create_task(self._write(), name="attachment writer")
        self._is_reopening = False

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outbox.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reader learns why

    def _deliver(self, output: pb.StepOutput) -> None:
        """Hand out one step. The hot path: one look-up and one call per token.

        Newest sequences hear first: somebody waits for their first token. Of the others it is one
        of many, and all of them together take a while to pass on.
        """
        sinks = self._sinks
        for part in output.prompt_logprobs:
            self._tell(part.sequence_id, lambda sink, part=part: sink.on_prompt_logprobs(part))  # type: ignore[misc]  # its default is its type
        for started in output.started:
            self._tell(started.sequence_id, lambda sink, started=started: sink.on_started(started))  # type: ignore[misc]  # its default is its type
        for found in output.logprobs:
            self._tell(found.sequence_id, lambda sink, found=found: sink.on_logprobs(found))  # type: ignore[misc]  # its default is its type
        tokens = zip(reversed(output.sequence_ids), reversed(output.token_ids), strict=True)
        for sequence_id, token_id in tokens:
            if (sink := sinks.get(sequence_id)) is not None:
                try:
                    sink.on_token(token_id)
                except Exception:
                    log.exception("sink_failed", sequence_id=sequence_id)
                    self._drop(sequence_id)
        for finished in output.finished:
            if (sink := sinks.pop(finished.sequence_id, None)) is not None:
                try:
                    sink.on_finished(finished)
                except Exception:
                    log.exception("sink_failed", sequence_id=finished.sequence_id)

    def _tell(self, sequence_id: int, tell: Callable[[SequenceSink], None]) -> None:
        """Call a sink; one that raises loses its sequence."""
        if (sink := self._sinks.get(sequence_id)) is not None:
            try:
                tell(sink)
            except Exception:
                log.exception("sink_failed", sequence_id=sequence_id)
                self._drop(sequence_id)

    def _drop(self, sequence_id: int) -> None:
        """Give up a sequence whose sink raised; the others go on."""
        self.cancel(sequence_id)
        self._sinks.pop(sequence_id, None)

    def _break(self, error: RuntimeRpcError) -> None:
        self._error = error
        self._writer.cancel()
        self._end_all(error)

    def _end_all(self, error: RuntimeRpcError) -> None:
        sinks, self._sinks = self._sinks, {}
        for sequence_id, sink in sinks.items():
            try:
                sink.on_broken(error)
            except Exception:
                log.exception("sink_failed", sequence_id=sequence_id)


class RuntimeClient:
    """Calls to one runtime. Every error is a RuntimeRpcError; cancelling a call is safe.

    Args:
        endpoint: A gRPC target, e.g. unix:///run/coldspark/a/runtime.sock.
    """

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._channel = grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
        self._stub = RuntimeServiceStub(self._channel)

    async def wait_reachable(self, timeout_s: float) -> None:
        """Return when the runtime server answers, which says nothing about its engine.

        Raises:
            RuntimeTimedOut: It did not within `timeout_s` seconds.
        """
        with _translated():
            await self._stub.Health(pb.HealthRequest(), timeout=timeout_s, wait_for_ready=True)

    async def load(self, request: pb.LoadRequest, *, timeout_s: float) -> pb.LoadResponse:
        """Load a snapshot; on a timeout the runtime goes on loading."""
        with _translated():
            return await self._stub.Load(request, timeout=timeout_s)

    async def embed(self, request: pb.EmbedRequest, *, timeout_s: float) -> pb.EmbedResponse:
        """Embed texts; cancelling drops those that have not been computed."""
        with _translated():
            return await self._stub.Embed(request, timeout=timeout_s)

    async def park(
        self, *, timeout_s: float, mode: pb.ParkMode.ValueType = pb.PARK_MODE_UNSPECIFIED
    ) -> pb.ParkResponse:
        """Have the runtime give back weights and KV cache; refused while sequences run."""
        with _translated():
            return await self._stub.Park(pb.ParkRequest(mode=mode), timeout=timeout_s)

    async def wake(self, device_uuids: Sequence[str], *, timeout_s: float) -> pb.WakeResponse:
        """Reverse a park."""
        request = pb.WakeRequest(device_uuids=device_uuids)
        with _translated():
            return await self._stub.Wake(request, timeout=timeout_s)

    async def drain(self, timeout_s: float) -> pb.DrainResponse:
        """Have the runtime refuse new sequences; return when the running ones are over.

        After `timeout_s` seconds the runtime cancels those that are left.
        """
        request = pb.DrainRequest(timeout_s=timeout_s)
        with _translated():
            return await self._stub.Drain(request, timeout=timeout_s + ANSWER_MARGIN_S)

    async def unload(self, *, timeout_s: float) -> None:
        """End the engine; the runtime can load another snapshot then."""
        with _translated():
            await self._stub.Unload(pb.UnloadRequest(), timeout=timeout_s)

    async def profile(self, *, with_kernels: bool, timeout_s: float) -> pb.ProfileResponse:
        """Return what the engine has learned for later starts of its snapshot."""
        request = pb.ProfileRequest(with_kernels=with_kernels)
        with _translated():
            return await self._stub.Profile(request, timeout=timeout_s)

    async def health(self, *, timeout_s: float) -> pb.RuntimeStatus:
        """Return one status."""
        with _translated():
            return await self._stub.Health(pb.HealthRequest(), timeout=timeout_s)

    async def watch(self) -> AsyncGenerator[pb.RuntimeStatus, None]:
        """Yield a status now and after every change; never ends but by RuntimeUnavailable."""
        call = self._stub.Watch(pb.WatchRequest())
        try:
            with _translated():
                async for status in call:
                    yield status
        finally:
            call.cancel()
        raise RuntimeUnavailable("the runtime ended its status stream")

    async def attach(self) -> Attachment:
        """Open a stream for sequences; close it to cancel them.

        Raises:
            RuntimeRefused: No engine is loaded.
        """
        return Attachment(*await self._open_stream(), reopen=self._open_stream)

    async def _open_stream(self) -> tuple[Stream, Outputs]:
        call = self._stub.Attach()  # type: ignore[call-arg]  # requests come by call.write
        outputs = aiter(call)
        try:
            with _translated():
                await anext(outputs)  # the empty one that says: attached
        except StopAsyncIteration:
            raise RuntimeUnavailable("the runtime ended the stream at once") from None
        except BaseException:
            call.cancel()
            raise
        return call, outputs

    async def close(self) -> None:
        """Close the channel; streams still open break."""
        await self._channel.close(None)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        kind = _ERRORS.get(error.code(), RuntimeUnavailable)
        raise kind(f"{error.code().name}: {error.details()}") from error
