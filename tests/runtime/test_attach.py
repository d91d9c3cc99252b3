import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeAlias

import grpc.aio
import pytest

from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import (
    Attachment,
    RuntimeClient,
    RuntimeRefused,
    RuntimeUnavailable,
)
from tests.fakes.engine import CONFUSING_TOKEN, FAILING_TOKEN, Script
from tests.runtime.conftest import ENDLESS, TIMEOUT_S, Process, Recorder, submit

ATTACH = "/coldspark.runtime.v1.RuntimeService/Attach"
RawCall: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"


@asynccontextmanager
async def raw_attachment(server: Process) -> AsyncIterator[RawCall]:
    """An Attach stream of bytes, past its first message."""
    async with grpc.aio.insecure_channel(f"unix:{server.socket}") as channel:
        attach = channel.stream_stream(
            ATTACH, request_serializer=bytes, response_deserializer=bytes
        )
        call = attach()  # type: ignore[call-arg]  # requests come by call.write
        assert await anext(aiter(call)) == b"", "the first message says that the stream is open"
        yield call
        call.cancel()


async def read_all(call: RawCall) -> None:
    async for _ in call:
        pass


def raw_submit(sequence_id: int, prompt: list[int]) -> bytes:
    sampling = pb.SamplingParams(max_tokens=ENDLESS)
    submit = pb.Submit(sequence_id=sequence_id, prompt_token_ids=prompt, sampling=sampling)
    return pb.AttachRequest(submit=submit).SerializeToString()


@pytest.fixture
async def attachment(server: Process) -> Attachment:
    """A stream to a loaded engine; ends with its client."""
    await server.load()
    return await server.client.attach()


async def test_sequences_of_one_stream_do_not_mix(attachment: Attachment) -> None:
    sinks = [submit(attachment, 1000 * number, max_tokens=20) for number in range(1, 30)]
    for number, sink in enumerate(sinks, start=1):
        await sink.end()
        assert sink.tokens == [1000 * number + offset for offset in range(1, 21)]


async def test_sequences_of_two_streams_do_not_mix(server: Process, attachment: Attachment) -> None:
    other = await server.client.attach()
    sinks = [submit(attachment, 1000), submit(other, 2000)]
    for first, sink in zip((1000, 2000), sinks, strict=True):
        await sink.end()
        assert sink.tokens == [first + 1, first + 2, first + 3]
    assert sinks[0].sequence_id == sinks[1].sequence_id, "ids are unique within a stream only"


async def test_a_step_is_one_message(server: Process) -> None:
    await server.load()
    async with raw_attachment(server) as call:
        for number in (1, 2, 3):
            await call.write(raw_submit(number, [10 * number]))
        output = pb.StepOutput()
        while len(output.sequence_ids) < 3:
            output = pb.StepOutput.FromString(await anext(aiter(call)))
        assert sorted(output.sequence_ids) == [1, 2, 3]


async def test_an_invalid_sequence_fails_alone(attachment: Attachment) -> None:
    running = submit(attachment, 1, max_tokens=ENDLESS)
    sink = Recorder()
    attachment.submit([], pb.SamplingParams(max_tokens=1), sink)
    finished = await sink.end()
    assert finished.reason == pb.FINISH_REASON_REFUSED
    assert finished.error == "the prompt is empty"
    seen = len(running.tokens)
    await running.until(lambda sink: len(sink.tokens) > seen)
    assert not attachment.is_broken


async def test_a_request_that_confuses_the_engine_fails_alone(attachment: Attachment) -> None:
    finished = await submit(attachment, CONFUSING_TOKEN).end()
    assert finished.reason == pb.FINISH_REASON_ERROR
    assert "confused" in finished.error
    assert (await submit(attachment, 1).end()).reason == pb.FINISH_REASON_LENGTH


async def test_a_sequence_that_fails_while_it_runs_fails_alone(attachment: Attachment) -> None:
    failing, fine = submit(attachment, FAILING_TOKEN), submit(attachment, 1)
    assert (await failing.end()).error == "told to fail"
    assert (await fine.end()).reason == pb.FINISH_REASON_LENGTH


async def test_a_token_id_that_does_not_fit_the_wire_is_refused(attachment: Attachment) -> None:
    with pytest.raises(RuntimeRefused, match="token id"):
        attachment.submit([-1], pb.SamplingParams(max_tokens=1), Recorder())
    assert (await submit(attachment, 1).end()).reason == pb.FINISH_REASON_LENGTH


async def test_a_cancelled_sequence_ends_and_counts_its_tokens(attachment: Attachment) -> None:
    sink = submit(attachment, 1, max_tokens=ENDLESS)
    await sink.until(lambda sink: len(sink.tokens) > 3)
    attachment.cancel(sink.sequence_id)
    finished = await sink.end()
    assert finished.reason == pb.FINISH_REASON_CANCELLED
    assert finished.num_output_tokens == len(sink.tokens)
    attachment.cancel(sink.sequence_id)  # over: no error
    attachment.cancel(4711)  # never was: no error
    assert (await submit(attachment, 1).end()).reason == pb.FINISH_REASON_LENGTH


async def test_closing_a_stream_cancels_its_sequences_alone(
    server: Process, attachment: Attachment
) -> None:
    other = await server.client.attach()
    left, kept = submit(attachment, 1, ENDLESS), submit(other, 2, ENDLESS)
    for sink in (left, kept):
        await sink.until(lambda sink: len(sink.tokens) > 0)
    await attachment.close()
    assert isinstance(await left.breakage(), RuntimeUnavailable)
    assert attachment.is_broken
    with pytest.raises(RuntimeUnavailable, match="broken"):
        submit(attachment, 1)
    status = await server.until(lambda status: status.last_active_unix_us > 0)
    assert status.load.num_running == 1
    seen = len(kept.tokens)
    await kept.until(lambda sink: len(sink.tokens) > seen)


async def test_closing_the_channel_breaks_its_streams(server: Process) -> None:
    await server.load()
    client = RuntimeClient(f"unix:{server.socket}")
    sink = submit(await client.attach(), 1, max_tokens=ENDLESS)
    await sink.until(lambda sink: len(sink.tokens) > 0)
    await client.close()
    assert isinstance(await sink.breakage(), RuntimeUnavailable)
    await server.until(lambda status: status.load.num_running == 0)


async def test_a_prompt_over_grpcs_default_limit_passes(attachment: Attachment) -> None:
    prompt = [(1 << 31) - 100] * (1 << 20)  # 5 MiB on the wire; gRPC's own limit is 4
    sink = Recorder()
    attachment.submit(prompt, pb.SamplingParams(max_tokens=1), sink)
    finished = await sink.end()
    assert finished.num_prompt_tokens == 1 << 20
    assert sink.tokens == [prompt[0] + 1]


@pytest.mark.parametrize(
    ("message", "reason"), [(b"\xff\xff\xff", "not an AttachRequest"), (b"", "neither submit nor")]
)
async def test_a_malformed_message_ends_its_stream_alone(
    server: Process, attachment: Attachment, message: bytes, reason: str
) -> None:
    running = submit(attachment, 1, max_tokens=ENDLESS)
    async with raw_attachment(server) as call:
        await call.write(message)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert reason in (await call.details() or "")
    seen = len(running.tokens)
    await running.until(lambda sink: len(sink.tokens) > seen)


async def test_a_reader_that_stops_reading_loses_its_stream_alone(server: Process) -> None:
    await server.load(Script(step_s=0.0))
    attachment = await server.client.attach()
    reading = submit(attachment, 1, max_tokens=ENDLESS)
    async with raw_attachment(server) as stuck:
        for number in range(200):
            await stuck.write(raw_submit((1 << 63) + number, [1 << 30]))
        status = await server.until(lambda status: status.last_active_unix_us > 0)
        assert status.state == pb.RUNTIME_STATE_READY
        assert status.load.num_running == 1
        with pytest.raises(grpc.aio.AioRpcError, match="read faster") as caught:
            await asyncio.wait_for(read_all(stuck), TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    seen = len(reading.tokens)
    await reading.until(lambda sink: len(sink.tokens) > seen)


async def test_logs_name_sequences_and_never_tokens(
    server: Process, attachment: Attachment
) -> None:
    secret = 987654321
    await submit(attachment, secret).end()
    sink = Recorder()
    attachment.submit([], pb.SamplingParams(max_tokens=secret), sink)
    await sink.end()
    server.popen.terminate()
    await server.exited()
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert {line["runtime_id"] for line in lines} == {"test-1"}
    [refusal] = [line for line in lines if line["event"] == "sequence_refused"]
    assert refusal["sequence_id"] == 2
    assert "98765" not in server.log
