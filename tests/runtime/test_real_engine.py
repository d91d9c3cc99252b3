"""The runtime, whole: real processes, the torch engine, the small real model."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import Attachment, RuntimeUnavailable
from tests.runtime.conftest import Launch, Process, Recorder

pytestmark = [pytest.mark.model, pytest.mark.timeout(180)]

LOAD_TIMEOUT_S = 120.0
FACTORY = "runtime.engine_factory:TorchEngineFactory"
PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


@pytest.fixture
async def server(launch: Launch, smollm2_snapshot_fp32: Path) -> Process:
    """A runtime with the real model loaded, in fp32: no rounding makes answers differ."""
    server = launch(factory=FACTORY, store=smollm2_snapshot_fp32.parent)
    await server.client.wait_reachable(LOAD_TIMEOUT_S)
    engine = pb.EngineConfig(max_model_len=512, kv_cache_bytes=64 << 20, enable_prefix_caching=True)
    request = pb.LoadRequest(snapshot=smollm2_snapshot_fp32.name, engine=engine)
    response = await server.client.load(request, timeout_s=LOAD_TIMEOUT_S)
    assert response.max_model_len == 512
    return server


def generate(attachment: Attachment, prompt: Sequence[int], max_tokens: int) -> Recorder:
    sink = Recorder()
    sampling = pb.SamplingParams(max_tokens=max_tokens, top_p=1.0)
    sink.sequence_id = attachment.submit(prompt, sampling, sink)
    return sink


async def test_the_answer_is_the_same_after_parking_and_waking(server: Process) -> None:
    attachment = await server.client.attach()
    before = generate(attachment, PROMPT, 12)
    assert (await before.end()).num_output_tokens == len(before.tokens)
    assert len(set(before.tokens)) > 1

    held = (await server.status()).memory
    engine = server.engine()
    rss_ready = engine.memory_info().rss
    parked = await server.client.park(timeout_s=LOAD_TIMEOUT_S)
    assert parked.memory.weights_bytes == parked.memory.kv_cache_bytes == 0
    assert engine.memory_info().rss < rss_ready - held.weights_bytes // 2
    await server.client.wake([], timeout_s=LOAD_TIMEOUT_S)

    after = generate(attachment, PROMPT, 12)
    finished = await after.end()
    assert after.tokens == before.tokens
    assert finished.num_cached_tokens == 0, "the KV cache was given back with its prefixes"
    again = generate(attachment, PROMPT * 2, 1)
    num_cached_tokens = (await again.end()).num_cached_tokens
    assert num_cached_tokens > 0
    assert again.started is not None
    assert again.started.num_cached_tokens == num_cached_tokens
    assert server.engine() == engine
    await attachment.close()


async def test_many_sequences_and_bad_ones_share_a_batch(server: Process) -> None:
    attachment = await server.client.attach()
    sinks = [generate(attachment, PROMPT, 6 + number) for number in range(6)]
    bad = [
        generate(attachment, [], 5),
        generate(attachment, [1 << 31], 5),
        generate(attachment, PROMPT * 100, 5),
        generate(attachment, PROMPT, 0),
    ]
    for sink in bad:
        finished = await sink.end()
        assert finished.reason == pb.FINISH_REASON_REFUSED
        assert finished.error
    for sink in sinks:
        await sink.end()
        assert sink.tokens[:6] == sinks[0].tokens[:6]
    idle = await server.until(lambda status: status.load.num_running == 0)
    assert idle.load.num_free_kv_blocks == idle.load.num_kv_blocks
    await attachment.close()


async def test_cancelling_frees_the_blocks(server: Process) -> None:
    attachment = await server.client.attach()
    sink = generate(attachment, PROMPT, 480)
    await sink.until(lambda sink: len(sink.tokens) > 2)
    attachment.cancel(sink.sequence_id)
    finished = await sink.end()
    assert finished.reason == pb.FINISH_REASON_CANCELLED
    assert finished.num_output_tokens < 480
    status = await server.until(lambda status: status.load.num_running == 0)
    assert status.load.num_free_kv_blocks == status.load.num_kv_blocks
    await attachment.close()


async def test_a_killed_engine_is_replaced_by_a_fork(server: Process) -> None:
    attachment = await server.client.attach()
    sink = generate(attachment, PROMPT, 480)
    await sink.until(lambda sink: len(sink.tokens) > 0)
    snapshot = (await server.status()).snapshot
    zygote = server.zygote()
    server.engine().kill()
    assert isinstance(await sink.breakage(), RuntimeUnavailable)
    await server.client.load(pb.LoadRequest(snapshot=snapshot), timeout_s=LOAD_TIMEOUT_S)
    assert server.zygote() == zygote
    attachment = await server.client.attach()
    assert (await generate(attachment, PROMPT, 2).end()).num_output_tokens == 2


async def test_grammars_are_followed_and_a_bad_one_is_refused(
    server: Process, smollm2_snapshot_fp32: Path
) -> None:
    attachment = await server.client.attach()

    def ask(grammar: str) -> Recorder:
        sink = Recorder()
        sampling = pb.SamplingParams(max_tokens=60, top_p=1.0, temperature=1.0, grammar=grammar)
        sink.sequence_id = attachment.submit(PROMPT, sampling, sink)
        return sink

    free = generate(attachment, PROMPT, 12)
    words = [ask('start: "Yes" | "No, never"') for _ in range(3)]
    bad = ask("start: nowhere")
    tokenizer = Tokenizer.from_file(str(smollm2_snapshot_fp32 / "tokenizer.json"))
    for sink in words:
        assert (await sink.end()).reason == pb.FINISH_REASON_STOP
        assert tokenizer.decode(sink.tokens) in ("Yes", "No, never")
    assert (await bad.end()).reason == pb.FINISH_REASON_REFUSED
    assert (await free.end()).num_output_tokens == len(free.tokens)
    await attachment.close()
