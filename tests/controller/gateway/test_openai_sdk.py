import asyncio
from collections.abc import AsyncIterator

import openai
import pytest

from controller.errors import QueueFull, RuntimeDied
from controller.scaling.generation import TokenChunk
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.function import FakeFunction

ANSWER = "Zürich is warm, 東京 too 🔥."


@pytest.fixture
async def sdk(make_app: AppMaker) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        client_of(make_app(heartbeat_s=0.005)) as client,
        openai.AsyncOpenAI(
            api_key="unused",
            base_url="http://localhost/v1",
            http_client=client,  # type: ignore[arg-type]  # it takes any httpx
            max_retries=0,
        ) as sdk,
    ):
        yield sdk


async def test_chat(sdk: openai.AsyncOpenAI) -> None:
    completion = await sdk.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], user="someone"
    )
    assert completion.choices[0].message.content == ANSWER
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 0


async def test_answer_can_be_sent_back_as_it_came(sdk: openai.AsyncOpenAI) -> None:
    first = await sdk.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}]
    )
    message = first.choices[0].message
    second = await sdk.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "user", "content": "hello"},
            message.model_dump(),  # type: ignore[list-item]  # as users do
            {"role": "user", "content": "and then?"},
        ],
    )
    assert second.choices[0].finish_reason == "stop"


async def test_streamed_chat_through_a_cold_start(
    sdk: openai.AsyncOpenAI, function: FakeFunction, answer_tokens: list[int]
) -> None:
    woken = asyncio.Event()
    function.tier = "stopped"
    last = TokenChunk([2], finish_reason="stop")
    function.script = lambda request: [woken, TokenChunk(answer_tokens), last]
    asyncio.get_running_loop().call_later(0.02, woken.set)
    stream = await sdk.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(answer_tokens) + 1


async def test_stream_helper_accumulates_the_answer(sdk: openai.AsyncOpenAI) -> None:
    async with sdk.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "hello"}]
    ) as stream:
        completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == ANSWER


async def test_completions_of_a_batch(sdk: openai.AsyncOpenAI) -> None:
    completion = await sdk.completions.create(model="tiny", prompt=["a", "b"], max_tokens=100)
    assert [choice.text for choice in completion.choices] == [ANSWER, ANSWER]


async def test_models(sdk: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in sdk.models.list()] == ["tiny"]
    assert (await sdk.models.retrieve("tiny")).owned_by == "coldspark"


async def test_failure_mid_stream_is_raised_by_the_sdk(
    sdk: openai.AsyncOpenAI, function: FakeFunction, answer_tokens: list[int]
) -> None:
    function.script = lambda request: [TokenChunk(answer_tokens[:8]), RuntimeDied("it is gone")]
    stream = await sdk.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], stream=True
    )
    with pytest.raises(openai.APIError, match="it is gone"):
        async for _ in stream:
            pass


async def test_errors_have_the_sdks_types(sdk: openai.AsyncOpenAI, function: FakeFunction) -> None:
    with pytest.raises(openai.NotFoundError, match="near names"):
        await sdk.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        await sdk.completions.create(model="tiny", prompt="x", max_tokens=-1)
    function.refusal = QueueFull("full", retry_after_s=1)
    with pytest.raises(openai.RateLimitError) as caught:
        await sdk.completions.create(model="tiny", prompt="x")
    assert caught.value.code == "queue_full"
