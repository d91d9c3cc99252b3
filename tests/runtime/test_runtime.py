import pytest

from runtime.rpc import inference_pb2 as pb
from tests.runtime.conftest import TIMEOUT_S, Process, Recorder


async def test_a_loaded_runtime_streams_tokens(server: Process) -> None:
    await server.client.wait_reachable(TIMEOUT_S)
    response = await server.load()
    assert [phase.name for phase in response.phases][:2] == ["runtime_import", "fork"]
    attachment = await server.client.attach()
    sink = Recorder()
    attachment.submit([10, 11], pb.SamplingParams(max_tokens=3), sink)
    finished = await sink.end()
    assert sink.tokens == [11, 12, 13]
    assert finished.reason == pb.FINISH_REASON_LENGTH
    await attachment.close()
