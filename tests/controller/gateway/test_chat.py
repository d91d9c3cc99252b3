from collections.abc import Iterable
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from controller.errors import ActivationFailed, QueueFull
from controller.scaling.generation import GenerationRequest, TokenChunk
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.asgi import events
from tests.fakes.function import FakeFunction, Step
from tests.fakes.tokenizers import write_snapshot

ANSWER = "Zürich is warm, 東京 too 🔥."
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
PATH = "/v1/chat/completions"


async def test_whole_answer_has_text_finish_reason_and_usage(
    client: httpx.AsyncClient, function: FakeFunction, answer_tokens: list[int]
) -> None:
    body = (await client.post(PATH, json=HELLO)).json()
    num_prompt = len(function.generations[0].request.prompt_token_ids)
    num_output = len(answer_tokens) + 1  # the end of sequence was generated, too
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
            }
        ],
        "prompt_token_ids": None,
        "prompt_logprobs": None,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


async def test_prompt_is_the_rendered_template_without_a_second_bos(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer
) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
        {"role": "user", "content": "c"},
    ]
    await client.post(PATH, json={"model": "tiny", "messages": messages})
    prompt = byte_level.decode(
        list(function.generations[0].request.prompt_token_ids), skip_special_tokens=False
    )
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_stream_opens_with_the_role_and_finishes_once(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json={**HELLO, "stream": True})
    *chunks, done = events(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == ANSWER
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_chunk_comes_last_and_the_others_say_null(
    client: httpx.AsyncClient, answer_tokens: list[int]
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await client.post(PATH, json={**HELLO, **options})
    whole = (await client.post(PATH, json=HELLO)).json()
    *chunks, last, _ = events(response.text)
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert last["usage"]["completion_tokens"] == len(answer_tokens) + 1


async def test_a_length_finish_carries_the_last_text(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json={**HELLO, "stream": True, "max_tokens": 2})
    *_, last, done = events(response.text)
    assert done == "[DONE]"
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["choices"][0]["delta"]["content"]


async def test_max_completion_tokens_goes_before_max_tokens(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    await client.post(PATH, json={**HELLO, "max_tokens": 9, "max_completion_tokens": 3})
    assert function.generations[0].request.sampling.max_tokens == 3


async def test_answer_may_fill_the_context_when_no_limit_is_given(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    await client.post(PATH, json=HELLO)
    request = function.generations[0].request
    assert request.sampling.max_tokens == 256 - len(request.prompt_token_ids)


async def test_sampling_fields_reach_the_engine(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "seed": -1,
        "max_tokens": 5,
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
    }
    await client.post(PATH, json={**HELLO, **fields})
    sampling = function.generations[0].request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
    assert (sampling.min_p, sampling.seed, sampling.max_tokens) == (0.125, 2**64 - 1, 5)
    assert (list(sampling.stop_token_ids), sampling.ignore_eos) == ([3, 4], True)


async def test_absent_sampling_fields_are_neutral(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream"))
    await client.post(PATH, json={**HELLO, **nulls})
    sampling = function.generations[0].request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert not sampling.HasField("seed")


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_ends_the_answer_and_the_generation(
    client: httpx.AsyncClient, function: FakeFunction, stream: bool
) -> None:
    response = await client.post(PATH, json={**HELLO, "stop": ["m, 東"], "stream": stream})
    if stream:
        *chunks, done = events(response.text)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
        assert done == "[DONE]"
    else:
        (choice,) = response.json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert text == "Zürich is war"
    assert reason == "stop"
    (generation,) = function.generations
    assert generation.left.is_set()
    assert generation.record.outcome == "stop"
    assert generation.record.num_output_tokens < 15


async def test_usage_after_a_stop_string_counts_what_was_generated(
    make_app: AppMaker, function: FakeFunction, answer_tokens: list[int]
) -> None:
    def merged(request: GenerationRequest) -> Iterable[Step]:
        yield TokenChunk(answer_tokens)
        yield TokenChunk([], finish_reason="length")

    function.script = merged
    async with client_of(make_app()) as client:
        body = (await client.post(PATH, json={**HELLO, "stop": "is"})).json()
    assert body["choices"][0]["message"]["content"] == "Zürich "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(answer_tokens)


async def test_headers_tell_tier_queue_time_and_request_id(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    function.tier = "parked"
    for stream in (False, True):
        body = {**HELLO, "stream": stream}
        response = await client.post(PATH, json=body, headers={"x-request-id": "abc-1"})
        assert response.headers["x-coldspark-tier"] == "parked"
        assert response.headers["x-coldspark-queue-ms"] == "12"
        assert response.headers["x-request-id"] == "abc-1"
    assert function.generations[0].request.request_id == "abc-1"


async def test_strange_request_id_is_replaced(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json=HELLO, headers={"x-request-id": "a b\tc" * 50})
    assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize("stream", [False, True])
async def test_refused_admission_is_a_proper_status(
    client: httpx.AsyncClient, function: FakeFunction, stream: bool
) -> None:
    function.refusal = QueueFull("the queue of 'tiny' is full", retry_after_s=1.2)
    response = await client.post(PATH, json={**HELLO, "stream": stream})
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "queue_full"
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("stream", [False, True])
async def test_failed_activation_is_a_proper_status(
    client: httpx.AsyncClient, function: FakeFunction, stream: bool
) -> None:
    function.script = lambda request: [ActivationFailed("it crashed", retry_after_s=30)]
    response = await client.post(PATH, json={**HELLO, "stream": stream})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "activation_failed"
    assert response.headers["retry-after"] == "30"
    assert isinstance(function.generations[0].left_with, ActivationFailed)


async def test_generation_config_fills_what_the_request_leaves_out(
    make_app: AppMaker, tmp_path: Path, byte_level: Tokenizer, function: FakeFunction
) -> None:
    recommended: dict[str, object] = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    for name, do_sample, expected in (("a", True, (0.6, 0.95, 20)), ("b", False, (1, 1, 0))):
        function.snapshot_path = write_snapshot(
            tmp_path / name,
            byte_level,
            eos_token="<|im_end|>",
            generation_config={**recommended, "do_sample": do_sample},
        )
        async with client_of(make_app()) as client:
            await client.post(PATH, json=HELLO)
            await client.post(PATH, json={**HELLO, "temperature": 0, "top_p": 1, "top_k": -1})
        by_default, asked = (generation.request.sampling for generation in function.generations)
        assert (by_default.temperature, by_default.top_p, by_default.top_k) == expected
        assert (asked.temperature, asked.top_p, asked.top_k) == (0, 1, 0)
        function.generations.clear()
