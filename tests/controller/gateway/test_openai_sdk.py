import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from controller.errors import QueueFull, RuntimeDied
from controller.scaling.generation import TokenChunk
from runtime.rpc import inference_pb2 as pb
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


class Person(pydantic.BaseModel):
    """What the typed helpers ask for."""

    name: str
    age: Annotated[int, pydantic.Field(ge=0, le=150)]
    friends: list["Person"]
    mood: Literal["calm", "merry"] | None


async def test_typed_helpers_get_what_they_ask_for(
    sdk: openai.AsyncOpenAI, function: FakeFunction, byte_level: Tokenizer
) -> None:
    text = '{"name":"Zoë","age":36,"friends":[],"mood":null}'
    function.script = lambda request: [
        *(TokenChunk([token]) for token in byte_level.encode(text).ids),
        TokenChunk([], finish_reason="stop"),
    ]
    messages: list[Any] = [{"role": "user", "content": "Who?"}]
    whole = await sdk.chat.completions.parse(
        model="tiny", messages=messages, response_format=Person
    )
    expected = Person(name="Zoë", age=36, friends=[], mood=None)
    assert whole.choices[0].message.parsed == expected
    async with sdk.chat.completions.stream(
        model="tiny", messages=messages, response_format=Person
    ) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == expected
    for generation in function.generations:
        grammar = generation.request.sampling.grammar
        matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
        tokens = LLTokenizer("byte").tokenize_str(text)
        assert matcher.try_consume_tokens(tokens) == len(tokens)
        assert matcher.is_accepting()


async def test_several_answers_and_their_logprobs_accumulate_in_a_stream(
    sdk: openai.AsyncOpenAI, function: FakeFunction, byte_level: Tokenizer
) -> None:
    tokens = byte_level.encode("so warm").ids
    found = [pb.TokenLogprobs(logprob=-0.5, top_token_ids=[104], top_logprobs=[-0.25])]
    function.script = lambda request: [
        *(TokenChunk([token], logprobs=found) for token in tokens),
        TokenChunk([], finish_reason="stop"),
    ]
    async with sdk.chat.completions.stream(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        n=2,
        logprobs=True,
        top_logprobs=1,
        seed=3,
    ) as stream:
        final = await stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["so warm"] * 2
    for choice in final.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == len(tokens)
        assert choice.logprobs.content[0].top_logprobs[0].logprob == -0.25


async def test_completions_of_the_sdk(
    sdk: openai.AsyncOpenAI, function: FakeFunction, byte_level: Tokenizer
) -> None:
    found = [pb.TokenLogprobs(logprob=-0.5)]
    function.script = lambda request: (
        [TokenChunk([token], logprobs=found) for token in byte_level.encode(" tea").ids]
        + [TokenChunk([], finish_reason="length")]
    )
    completion = await sdk.completions.create(
        model="tiny", prompt=["hot", "cold"], n=2, best_of=3, echo=True, logprobs=0, max_tokens=4
    )
    assert [choice.text for choice in completion.choices] == ["hot tea"] * 2 + ["cold tea"] * 2
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == "hot tea"
