import asyncio
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from controller.errors import RuntimeDied
from controller.scaling.generation import GenerationRequest, TokenChunk
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.asgi import events
from tests.fakes.function import FakeFunction, Step
from tests.fakes.tokenizers import write_snapshot

PATH = "/v1/completions"


@pytest.fixture
def echo(function: FakeFunction) -> FakeFunction:
    """A function that answers each prompt with its own tokens."""

    def script(request: GenerationRequest) -> Iterable[Step]:
        for token_id in request.prompt_token_ids:
            yield TokenChunk([token_id])
        yield TokenChunk([], finish_reason="stop")

    function.script = script
    return function


async def test_text_prompt_is_continued(client: httpx.AsyncClient, echo: FakeFunction) -> None:
    body = (await client.post(PATH, json={"model": "tiny", "prompt": "wake up"})).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "wake up",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": None,
            "prompt_token_ids": None,
            "prompt_logprobs": None,
        }
    ]


async def test_sixteen_tokens_are_generated_when_no_limit_is_given(
    client: httpx.AsyncClient, echo: FakeFunction
) -> None:
    await client.post(PATH, json={"model": "tiny", "prompt": "wake up"})
    assert echo.generations[0].request.sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        (["wake", "sleep", "spark"], None),
        ([104, 105], [[104, 105]]),
        ([[104], [105, 106]], [[104], [105, 106]]),
    ],
)
async def test_every_kind_of_prompt_gets_a_choice_of_its_index(
    client: httpx.AsyncClient,
    echo: FakeFunction,
    byte_level: Tokenizer,
    prompt: list[object],
    token_ids: list[list[int]] | None,
) -> None:
    expected = prompt if token_ids is None else [byte_level.decode(ids) for ids in token_ids]
    body = (await client.post(PATH, json={"model": "tiny", "prompt": prompt})).json()
    assert [choice["text"] for choice in body["choices"]] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    num_tokens = sum(len(each.request.prompt_token_ids) for each in echo.generations)
    assert body["usage"]["prompt_tokens"] == num_tokens
    assert body["usage"]["completion_tokens"] == num_tokens


async def test_streamed_batch_joins_per_index_and_finishes_each_once(
    client: httpx.AsyncClient, echo: FakeFunction
) -> None:
    prompts = ["one is short", "two is a little longer", "東京 🔥"]
    request = {"model": "tiny", "prompt": prompts, "stream": True}
    request["stream_options"] = {"include_usage": True}
    response = await client.post(PATH, json=request)
    *chunks, usage, done = events(response.text)
    texts: dict[int, str] = defaultdict(str)
    reasons: dict[int, list[str]] = defaultdict(list)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            reasons[choice["index"]].append(choice["finish_reason"])
    assert [texts[index] for index in range(3)] == prompts
    assert dict(reasons) == {0: ["stop"], 1: ["stop"], 2: ["stop"]}
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens"] == usage["usage"]["completion_tokens"] > 3
    assert done == "[DONE]"


async def test_sequences_of_a_batch_have_names_of_their_own(
    client: httpx.AsyncClient, echo: FakeFunction
) -> None:
    headers = {"x-request-id": "r"}
    await client.post(PATH, json={"model": "tiny", "prompt": ["a", "b"]}, headers=headers)
    assert [each.request.request_id for each in echo.generations] == ["r-0", "r-1"]


async def test_one_failing_prompt_fails_the_call_and_releases_the_others(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    never = asyncio.Event()
    function.script = lambda request: (
        [RuntimeDied("gone")] if len(request.prompt_token_ids) == 1 else [TokenChunk([104]), never]
    )
    response = await client.post(PATH, json={"model": "tiny", "prompt": [[104, 105], [104]]})
    assert response.status_code == 502
    assert function.num_running == 0
    assert all(generation.left.is_set() for generation in function.generations)


async def test_too_many_prompts_are_refused_with_the_limit(make_app: AppMaker) -> None:
    async with client_of(make_app(max_prompts=2)) as client:
        response = await client.post(PATH, json={"model": "tiny", "prompt": ["a"] * 3})
    assert response.status_code == 400
    assert "at most 2" in response.json()["error"]["message"]


async def test_text_prompts_get_the_bos_that_the_tokenizer_adds(
    make_app: AppMaker, echo: FakeFunction, byte_fallback: Tokenizer, tmp_path: Path
) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    echo.snapshot_path = write_snapshot(
        tmp_path, byte_fallback, eos_token="</s>", chat_template=template
    )
    async with client_of(make_app()) as client:
        whole = (await client.post(PATH, json={"model": "tiny", "prompt": "the hall"})).json()
        messages = [{"role": "user", "content": "the hall"}]
        chat = {"model": "tiny", "messages": messages}
        await client.post("/v1/chat/completions", json=chat)
    plain, rendered = (list(each.request.prompt_token_ids) for each in echo.generations)
    assert plain[0] == rendered[0] == 1
    assert plain.count(1) == rendered.count(1) == 1
    assert whole["choices"][0]["text"] == "the hall"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_token_ends_the_text_and_is_not_in_it(
    client: httpx.AsyncClient, echo: FakeFunction, byte_level: Tokenizer, stream: bool
) -> None:
    *rest, last = byte_level.encode("wake up").ids
    asked = {"model": "tiny", "prompt": [*rest, last], "stop_token_ids": [last]}
    response = await client.post(PATH, json={**asked, "stream": stream})
    if stream:
        chunks = events(response.text)[:-1]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    else:
        text = response.json()["choices"][0]["text"]
        assert response.json()["usage"]["completion_tokens"] == len(rest) + 1
    assert text == byte_level.decode(rest)
