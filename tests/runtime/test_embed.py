"""The Embed call through a real runtime server, over a scripted engine and over the real one."""

import asyncio
import re
import struct
from pathlib import Path

import pytest

from runtime.config import EngineConfig
from runtime.embeds import Embeds
from runtime.engine.pooling import Pooled
from runtime.engine.sequence import SequenceKey
from runtime.errors import InvalidSequence
from runtime.ipc import MAX_PAYLOAD_BYTES
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeRefused, RuntimeUnavailable
from tests.fakes.engine import CRASHING_TOKEN, FAILING_TOKEN, FakeEngine, FakeRunner, Script
from tests.runtime.conftest import TIMEOUT_S, Launch, Process, submit

SLOW = Script(step_s=0.05)


def request_of(*texts: list[int], dimensions: int = 0) -> pb.EmbedRequest:
    return pb.EmbedRequest(
        texts=[pb.EmbedRequest.Text(token_ids=text) for text in texts], dimensions=dimensions
    )


async def embed(server: Process, *texts: list[int], dimensions: int = 0) -> list[float]:
    """Return the first number of each vector."""
    request = request_of(*texts, dimensions=dimensions)
    response = await server.client.embed(request, timeout_s=TIMEOUT_S)
    return [struct.unpack_from("<f", one)[0] for one in response.embeddings]


async def test_texts_come_back_in_order(server: Process) -> None:
    await server.load()
    async with asyncio.TaskGroup() as group:
        one = group.create_task(embed(server, [1], [2], [3]))
        other = group.create_task(embed(server, [4], [5]))
    assert (one.result(), other.result()) == ([1, 2, 3], [4, 5])


async def test_embedding_and_generating_share_an_engine_loop(server: Process) -> None:
    await server.load()
    attachment = await server.client.attach()
    sink = submit(attachment, 10, max_tokens=5)
    assert await embed(server, [7]) == [7]
    await sink.end()
    assert sink.tokens == [11, 12, 13, 14, 15]


async def test_bad_text_refuses_its_whole_call_and_no_other(server: Process) -> None:
    await server.load()
    with pytest.raises(RuntimeRefused, match=r"INVALID_ARGUMENT.*empty"):
        await embed(server, [1], [])
    with pytest.raises(RuntimeRefused, match=r"INVALID_ARGUMENT.*0 texts"):
        await embed(server)
    with pytest.raises(RuntimeRefused, match=r"ABORTED.*text 1: told to fail"):
        await embed(server, [1], [FAILING_TOKEN], [2])
    assert await embed(server, [9]) == [9]


def test_an_answer_that_no_message_holds_is_refused_at_its_first_vector() -> None:
    engine = FakeEngine(FakeRunner(Script(), EngineConfig(max_model_len=128)))
    embeds = Embeds(engine)
    embeds.start(1, request_of(*[[1]] * 4096))
    key, vector = SequenceKey(1, 0), bytes(4 * 4096)
    ((call_id, refusal),) = embeds.take([Pooled(key=key, embedding=vector)])
    assert call_id == 1
    assert isinstance(refusal, InvalidSequence)
    most = int(re.search(r"at most (\d+)", str(refusal)).group(1))  # type: ignore[union-attr]
    assert not embeds.has_calls
    embeds.start(2, request_of(*[[1]] * most))
    ((_, answer),) = embeds.take(
        [Pooled(key=SequenceKey(2, index), embedding=vector) for index in range(most)]
    )
    assert isinstance(answer, pb.EmbedResponse)
    assert answer.ByteSize() < MAX_PAYLOAD_BYTES < 4096 * len(vector) + 4096


async def test_leaving_drops_what_is_not_computed(server: Process) -> None:
    await server.load(SLOW)
    texts = [[1]] * 2000
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await embed(server, *texts)
    assert (await server.until(lambda status: status.load.num_steps > 0)).load.num_steps < 100
    async with asyncio.timeout(2):
        assert await embed(server, [3]) == [3]


async def test_engine_that_dies_ends_the_call(server: Process) -> None:
    await server.load()
    with pytest.raises(RuntimeUnavailable):
        await embed(server, [CRASHING_TOKEN])


async def test_nothing_is_embedded_while_parked_or_unloaded(server: Process) -> None:
    with pytest.raises(RuntimeRefused, match="FAILED_PRECONDITION"):
        await embed(server, [1])
    await server.load()
    await server.client.park(timeout_s=TIMEOUT_S)
    with pytest.raises(RuntimeRefused, match="PARKED"):
        await embed(server, [1])
    await server.client.wake([], timeout_s=TIMEOUT_S)
    assert await embed(server, [1]) == [1]


@pytest.mark.model
async def test_real_engine_embeds_parks_and_wakes(launch: Launch, minilm_snapshot: Path) -> None:
    server = launch(
        factory="runtime.engine_factory:TorchEngineFactory", store=minilm_snapshot.parent
    )
    await server.client.wait_reachable(60)
    engine = pb.EngineConfig(task="embed", pooling="mean", normalize=True, max_model_len=256)
    request = pb.LoadRequest(snapshot=minilm_snapshot.name, engine=engine)
    loaded = await server.client.load(request, timeout_s=60)
    assert loaded.memory.weights_bytes > 80 << 20
    texts = request_of([101, 7592, 102], [101, 2088, 102])
    first = await server.client.embed(texts, timeout_s=TIMEOUT_S)
    assert [len(one) for one in first.embeddings] == [384 * 4] * 2
    with pytest.raises(RuntimeRefused, match="max_model_len=256"):
        await server.client.embed(request_of([101] * 257), timeout_s=TIMEOUT_S)
    parked = await server.client.park(timeout_s=TIMEOUT_S)
    assert parked.memory.weights_bytes == 0
    await server.client.wake([], timeout_s=60)
    again = await server.client.embed(texts, timeout_s=TIMEOUT_S)
    assert again.embeddings == first.embeddings
    sink = submit(await server.client.attach(), 101)
    assert "does not generate" in (await sink.end()).error
