import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, create_autospec

import grpc
import grpc.aio
import pytest

from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import (
    Attachment,
    RuntimeClient,
    RuntimeRefused,
    RuntimeRpcError,
    RuntimeTimedOut,
    RuntimeUnavailable,
    SnapshotUnusable,
    StreamOverrun,
)
from tests.runtime.conftest import ENDLESS, TIMEOUT_S, Process, Recorder, submit

SERVICE = "coldspark.runtime.v1.RuntimeService"
TRANSLATIONS = {
    "DEADLINE_EXCEEDED": RuntimeTimedOut,
    "CANCELLED": RuntimeUnavailable,
    "UNKNOWN": RuntimeUnavailable,
    "ABORTED": RuntimeRefused,
    "INTERNAL": RuntimeUnavailable,
    "UNAVAILABLE": RuntimeUnavailable,
    "INVALID_ARGUMENT": RuntimeRefused,
    "NOT_FOUND": SnapshotUnusable,
    "ALREADY_EXISTS": RuntimeRefused,
    "PERMISSION_DENIED": RuntimeRefused,
    "UNAUTHENTICATED": RuntimeRefused,
    "RESOURCE_EXHAUSTED": RuntimeRefused,
    "FAILED_PRECONDITION": RuntimeRefused,
    "OUT_OF_RANGE": RuntimeRefused,
    "UNIMPLEMENTED": RuntimeRefused,
    "DATA_LOSS": SnapshotUnusable,
}


class Refuser(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not generic at run time
    """Ends every call with one status."""

    def __init__(self) -> None:
        self.status = grpc.StatusCode.OK

    def service(self, details: Any) -> Any:
        if details.method.endswith(("Watch", "Attach")):
            return grpc.stream_stream_rpc_method_handler(self._end)
        return grpc.unary_unary_rpc_method_handler(self._end)

    async def _end(self, _request: object, context: Any) -> bytes:
        if self.status is not grpc.StatusCode.OK:
            await context.abort(self.status, "because")
        return b""


@pytest.fixture
async def refuser(home: Path) -> AsyncIterator[Refuser]:
    handler = Refuser()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{home / 'socket'}")
    await server.start()
    yield handler
    await server.stop(None)


@pytest.fixture
async def client(home: Path) -> AsyncIterator[RuntimeClient]:
    client = RuntimeClient(f"unix:{home / 'socket'}")
    yield client
    await client.close()


def test_the_table_knows_every_status() -> None:
    assert set(TRANSLATIONS) == set(grpc.StatusCode.__members__) - {"OK"}


async def first(statuses: AsyncIterator[pb.RuntimeStatus]) -> None:
    await anext(statuses)


CALLS: list[Callable[[RuntimeClient], Any]] = [
    lambda client: client.wait_reachable(TIMEOUT_S),
    lambda client: client.load(pb.LoadRequest(), timeout_s=TIMEOUT_S),
    lambda client: client.embed(pb.EmbedRequest(), timeout_s=TIMEOUT_S),
    lambda client: client.park(timeout_s=TIMEOUT_S),
    lambda client: client.wake([], timeout_s=TIMEOUT_S),
    lambda client: client.drain(TIMEOUT_S),
    lambda client: client.health(timeout_s=TIMEOUT_S),
    lambda client: first(client.watch()),
    lambda client: client.attach(),
]


@pytest.mark.parametrize("status", TRANSLATIONS)
async def test_every_status_becomes_one_error_in_every_call(
    refuser: Refuser, client: RuntimeClient, status: str
) -> None:
    refuser.status = grpc.StatusCode[status]
    for call in CALLS:
        with pytest.raises(RuntimeRpcError, match=f"{status}: because") as caught:
            await call(client)
        assert type(caught.value) is TRANSLATIONS[status]


async def test_a_stream_that_ends_at_once_is_unavailable(
    refuser: Refuser, client: RuntimeClient
) -> None:
    with pytest.raises(RuntimeUnavailable):
        await client.attach()
    with pytest.raises(RuntimeUnavailable, match="ended its status stream"):
        async for _ in client.watch():
            pass


async def test_nobody_there_is_unavailable(client: RuntimeClient) -> None:
    with pytest.raises(RuntimeUnavailable):
        await client.health(timeout_s=TIMEOUT_S)
    with pytest.raises(RuntimeTimedOut):
        await client.wait_reachable(0.2)


class Overrunner(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not generic at run time
    """Answers every sequence with one token; to that of the first stream it adds an overrun."""

    def __init__(self) -> None:
        self.num_streams = 0
        self.submitted: list[int] = []
        self.may_open = asyncio.Event()
        self.may_open.set()

    def service(self, details: Any) -> Any:
        assert details.method.endswith("Attach")
        return grpc.stream_stream_rpc_method_handler(
            self._attach,
            request_deserializer=pb.AttachRequest.FromString,
            response_serializer=pb.StepOutput.SerializeToString,
        )

    async def _attach(self, requests: Any, context: Any) -> AsyncIterator[pb.StepOutput]:
        self.num_streams += 1
        is_first = self.num_streams == 1
        await self.may_open.wait()
        yield pb.StepOutput()
        async for request in requests:
            sequence_id = request.submit.sequence_id
            self.submitted.append(sequence_id)
            yield pb.StepOutput(sequence_ids=[sequence_id], token_ids=[7])
            if is_first:
                self.may_open.clear()
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "read faster")
            finished = pb.Finished(sequence_id=sequence_id, reason=pb.FINISH_REASON_LENGTH)
            yield pb.StepOutput(finished=[finished])


@pytest.fixture
async def overrunner(home: Path) -> AsyncIterator[Overrunner]:
    handler = Overrunner()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{home / 'socket'}")
    await server.start()
    yield handler
    await server.stop(None)


async def test_a_stream_that_was_read_too_slowly_is_opened_anew(
    overrunner: Overrunner, client: RuntimeClient
) -> None:
    attachment = await client.attach()
    lost = submit(attachment, 1)
    assert isinstance(await lost.breakage(), StreamOverrun)
    assert lost.tokens == [7]
    assert not attachment.is_broken
    waiting = submit(attachment, 2)  # before the new stream is open
    overrunner.may_open.set()
    await waiting.end()
    assert waiting.tokens == [7]
    assert overrunner.submitted == [lost.sequence_id, waiting.sequence_id]
    assert overrunner.num_streams == 2
    await attachment.close()


async def test_a_stream_can_be_closed_while_it_is_opened_anew(
    overrunner: Overrunner, client: RuntimeClient
) -> None:
    attachment = await client.attach()
    await submit(attachment, 1).breakage()
    waiting = submit(attachment, 2)
    await attachment.close()
    assert isinstance(await waiting.breakage(), RuntimeUnavailable)
    assert attachment.is_broken


class OrderedSink(Recorder):
    """Keeps when it was told, among others."""

    def __init__(self, name: str, heard: list[str]) -> None:
        super().__init__()
        self._name = name
        self._heard = heard

    def on_token(self, token_id: int) -> None:
        self._heard.append(f"{self._name} {token_id}")
        super().on_token(token_id)


async def test_of_each_step_the_newest_sequence_hears_first() -> None:
    async def outputs() -> AsyncIterator[pb.StepOutput]:
        for token_ids in [1, 2], [3, 4]:
            ids = [old.sequence_id, new.sequence_id]
            yield pb.StepOutput(sequence_ids=ids, token_ids=token_ids)

    heard: list[str] = []
    old, new = (OrderedSink(name, heard) for name in ("old", "new"))
    call = create_autospec(grpc.aio.StreamStreamCall, instance=True)
    attachment = Attachment(call, outputs(), reopen=AsyncMock())
    for sink in (old, new):
        sink.sequence_id = attachment.submit([1], pb.SamplingParams(), sink)
    await old.breakage()
    assert heard == ["new 2", "old 1", "new 4", "old 3"]


class FaultySink(Recorder):
    """Raises where it is told to."""

    def __init__(self, fails_in: str) -> None:
        super().__init__()
        self._fails_in = fails_in

    def on_token(self, token_id: int) -> None:
        super().on_token(token_id)
        if self._fails_in == "on_token":
            raise ValueError("a defect of the caller")

    def on_finished(self, finished: pb.Finished) -> None:
        super().on_finished(finished)
        if self._fails_in == "on_finished":
            raise ValueError("a defect of the caller")

    def on_broken(self, error: RuntimeRpcError) -> None:
        super().on_broken(error)
        if self._fails_in == "on_broken":
            raise ValueError("a defect of the caller")


@pytest.mark.parametrize("method", ["on_token", "on_finished", "on_broken"])
async def test_a_sink_that_raises_harms_nobody_else(server: Process, method: str) -> None:
    await server.load()
    attachment = await server.client.attach()
    faulty = FaultySink(method)
    max_tokens = 3 if method == "on_finished" else ENDLESS
    attachment.submit([1], pb.SamplingParams(max_tokens=max_tokens), faulty)
    other = submit(attachment, 100, max_tokens=ENDLESS)
    await faulty.until(lambda sink: len(sink.tokens) > 0)
    if method != "on_broken":
        await server.until(lambda status: status.load.num_running == 1)
    if method == "on_token":
        assert len(faulty.tokens) == 1, "it is not asked twice, and its sequence is cancelled"
    assert (await submit(attachment, 5).end()).reason == pb.FINISH_REASON_LENGTH
    await attachment.close()
    assert isinstance(await other.breakage(), RuntimeUnavailable)
