"""The real runtime under each real backend: reached, loaded, asked, gone."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from controller.backends.base import RuntimeBackend, RuntimePhase, RuntimeSpec
from controller.backends.docker import DockerBackend
from controller.backends.process import ProcessBackend
from runtime.rpc import inference_pb2 as pb
from runtime.rpc.client import RuntimeClient, RuntimeRpcError
from tests.docker_engine import runtime_image

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(180)]

START_S = 120.0


@pytest.fixture(params=["process", pytest.param("docker", marks=pytest.mark.docker)])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RuntimeBackend]:
    opened: RuntimeBackend
    if request.param == "process":
        opened = ProcessBackend(tmp_path, cluster="test")
    else:
        opened = DockerBackend(tmp_path, cluster="test", image=runtime_image())
    yield opened
    await opened.delete("r-1", grace_s=0.0)
    await opened.close()


async def test_a_real_runtime_answers_and_leaves(
    backend: RuntimeBackend, smollm2_snapshot: Path
) -> None:
    info = await backend.create(
        RuntimeSpec(
            runtime_id="r-1",
            function="smollm2",
            revision="abc123",
            epoch=1,
            snapshot_store=smollm2_snapshot.parent,
            memory_bytes=2 << 30,
        )
    )
    client = RuntimeClient(info.endpoint)
    await client.wait_reachable(START_S)
    await client.load(
        pb.LoadRequest(
            snapshot=smollm2_snapshot.name,
            engine=pb.EngineConfig(max_model_len=256, kv_cache_bytes=64 << 20, dtype="bfloat16"),
        ),
        timeout_s=START_S,
    )
    assert len(await generate(client, [1, 504, 3575, 282, 4649, 314], num_tokens=8)) == 8
    await client.close()

    assert (await backend.inspect("r-1")).phase is RuntimePhase.RUNNING
    await backend.delete("r-1")
    assert await backend.list() == []


async def generate(
    client: RuntimeClient, prompt_token_ids: Sequence[int], *, num_tokens: int
) -> list[int]:
    """Return greedy tokens."""
    sink = Collected()
    attachment = await client.attach()
    sampling = pb.SamplingParams(temperature=0.0, top_p=1.0, max_tokens=num_tokens, ignore_eos=True)
    attachment.submit(prompt_token_ids, sampling, sink)
    tokens = await sink.finished
    await attachment.close()
    return tokens


class Collected:
    """The tokens of one sequence."""

    def __init__(self) -> None:
        self.finished: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._tokens: list[int] = []

    def on_started(self, started: pb.Started) -> None:
        assert not self._tokens

    def on_logprobs(self, logprobs: pb.TokenLogprobs) -> None:
        raise AssertionError("nobody has asked for them")

    def on_prompt_logprobs(self, logprobs: pb.PromptLogprobs) -> None:
        raise AssertionError("nobody has asked for them")

    def on_token(self, token_id: int) -> None:
        self._tokens.append(token_id)

    def on_finished(self, finished: pb.Finished) -> None:
        if finished.error:
            self.finished.set_exception(AssertionError(finished.error))
        else:
            self.finished.set_result(self._tokens)

    def on_broken(self, error: RuntimeRpcError) -> None:
        self.finished.set_exception(error)
