import base64
import struct
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from controller.errors import QueueFull
from controller.scaling.embedding import Pooling
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.function import FakeFunction
from tests.fakes.tokenizers import byte_level_tokenizer, write_snapshot

EMBEDDINGS = "/v1/embeddings"
SIZE = 8


def pooling(shorter: tuple[int, ...] | None = ()) -> Pooling:
    return Pooling(mode="mean", normalize=True, size=SIZE, shorter=shorter, max_tokens=None)


@pytest.fixture
def encoder(tmp_path_factory: pytest.TempPathFactory) -> FakeFunction:
    """Puts one token before a text and one after it, takes 16, and embeds a text as its length."""
    tokenizer = byte_level_tokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    snapshot = write_snapshot(
        tmp_path_factory.mktemp("store") / "encoder@0123456789ab", tokenizer, eos_token="<|im_end|>"
    )
    function = FakeFunction(snapshot, lambda _: [], max_model_len=16)
    function.pooling = pooling()
    return function


@pytest.fixture
async def client(make_app: AppMaker, encoder: FakeFunction) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(encoder)) as client:
        yield client


def numbers_of(text: str) -> list[float]:
    return list(struct.unpack(f"<{SIZE}f", base64.b64decode(text)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", [[1, 68, 2]]),
        (["a", "aa"], [[1, 68, 2], [1, 68, 68, 2]]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
async def test_every_form_of_input(
    client: httpx.AsyncClient,
    encoder: FakeFunction,
    byte_level: Tokenizer,
    given: Any,
    expected: list[list[int]],
) -> None:
    (letter,) = byte_level.encode("a").ids
    expected = [[letter if token == 68 else token for token in text] for text in expected]
    answer = (await client.post(EMBEDDINGS, json={"model": "tiny", "input": given})).json()
    assert encoder.embeddings[0].request.texts == expected
    num_tokens = sum(map(len, expected))
    assert answer["object"] == "list"
    assert answer["model"] == "tiny"
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    for index, (one, text) in enumerate(zip(answer["data"], expected, strict=True)):
        number = struct.unpack("f", struct.pack("f", len(text) / 3))[0]
        assert (one["object"], one["index"]) == ("embedding", index)
        assert struct.pack("<8f", *one["embedding"]) == struct.pack("<8f", *[number] * SIZE)


async def test_base64_and_numbers_are_the_same_vectors(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "input": ["a", "bb"]}
    numbers = (await client.post(EMBEDDINGS, json=body)).json()["data"]
    encoded = await client.post(EMBEDDINGS, json={**body, "encoding_format": "base64"})
    for one, other in zip(numbers, encoded.json()["data"], strict=True):
        assert one["embedding"] == pytest.approx(numbers_of(other["embedding"]), rel=1e-8)


async def test_special_tokens_can_be_left_out(
    client: httpx.AsyncClient, encoder: FakeFunction
) -> None:
    body = {"model": "tiny", "input": "a", "add_special_tokens": False}
    await client.post(EMBEDDINGS, json=body)
    assert len(encoder.embeddings[0].request.texts[0]) == 1


@pytest.mark.parametrize(("wanted", "length"), [(-1, 16), (5, 5), (400, None)])
async def test_text_that_is_too_long_is_cut_only_on_demand(
    client: httpx.AsyncClient, encoder: FakeFunction, wanted: int, length: int | None
) -> None:
    body = {"model": "tiny", "input": ["a" * 30, "b"]}
    refused = await client.post(EMBEDDINGS, json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "text 0 has 32 tokens" in refused.json()["error"]["message"]
    response = await client.post(EMBEDDINGS, json={**body, "truncate_prompt_tokens": wanted})
    if length is None:
        assert response.status_code == 400
        return
    cut, short = encoder.embeddings[0].request.texts
    assert (cut[0], cut[-1], len(cut)) == (1, 2, length)
    assert len(short) == 3


async def test_dimensions_are_for_models_that_allow_them(
    client: httpx.AsyncClient, encoder: FakeFunction
) -> None:
    async def ask(dimensions: int) -> httpx.Response:
        body = {"model": "tiny", "input": "a", "dimensions": dimensions}
        return await client.post(EMBEDDINGS, json=body)

    assert (await ask(SIZE)).status_code == 200
    assert "send 8, or leave it out" in (await ask(4)).json()["error"]["message"]
    encoder.pooling = pooling(shorter=(2, 4))
    assert len((await ask(4)).json()["data"][0]["embedding"]) == 4
    assert "one of 2, 4, 8" in (await ask(3)).json()["error"]["message"]
    encoder.pooling = pooling(shorter=None)
    assert (await ask(3)).status_code == 200
    assert (await ask(9)).json()["error"]["param"] == "dimensions"


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"input": ""}, "input", "text 0 is empty"),
        ({"input": []}, "input", "not empty"),
        ({"input": ["a", ""]}, "input", "text 1 is empty"),
        ({"input": [[]]}, "input", "text 0 is empty"),
        ({"input": ["a", 1]}, "input", "must be"),
        ({"input": [1, -1]}, "input", "must be"),
        ({"input": {"a": 1}}, "input", "must be"),
        ({"input": ["a"] * 2049}, "input", "2049 texts; at most 2048"),
        ({"input": [[5]] * 300_001}, "input", "at most 300000"),
        ({"input": [10_000]}, "input", "is not a token"),
        ({"encoding_format": "bytes"}, "encoding_format", "'float' or 'base64'"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"dimenssions": 4}, "dimenssions", "did you mean 'dimensions'"),
        ({"messages": [{"role": "user"}]}, "messages", "not supported"),
        ({"input": None}, "input", "must be"),
    ],
)
async def test_bad_input_is_400(
    client: httpx.AsyncClient, changes: dict[str, Any], param: str, words: str
) -> None:
    response = await client.post(EMBEDDINGS, json={"model": "tiny", "input": "a"} | changes)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


async def test_each_model_does_its_own_task(make_app: AppMaker, encoder: FakeFunction) -> None:
    generator = FakeFunction(encoder.snapshot_path, lambda _: [], name="talker")
    async with client_of(make_app(encoder, generator)) as client:
        embedded = await client.post(EMBEDDINGS, json={"model": "talker", "input": "a"})
        completed = await client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        models = (await client.get("/v1/models")).json()["data"]
    for response, words in ((embedded, "does not embed"), (completed, "/v1/embeddings")):
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "model"
        assert words in response.json()["error"]["message"]
    assert [(model["task"], model["embedding_size"]) for model in models] == [
        ("embed", SIZE),
        ("generate", None),
    ]


async def test_headers_say_how_cold_it_was(
    client: httpx.AsyncClient, encoder: FakeFunction
) -> None:
    encoder.tier = "parked"
    response = await client.post(EMBEDDINGS, json={"model": "tiny", "input": "a"})
    assert response.headers["x-coldspark-tier"] == "parked"
    assert response.headers["x-coldspark-queue-ms"] == "12"


async def test_many_vectors_let_others_have_their_turn(
    client: httpx.AsyncClient, encoder: FakeFunction
) -> None:
    encoder.pooling = Pooling(mode="mean", normalize=True, size=4096, shorter=(), max_tokens=None)
    response = await client.post(EMBEDDINGS, json={"model": "tiny", "input": [[5]] * 100})
    assert [one["index"] for one in response.json()["data"]] == list(range(100))


async def test_sdk_reads_both_encodings(client: httpx.AsyncClient, encoder: FakeFunction) -> None:
    sdk = openai.AsyncOpenAI(
        api_key="unused",
        base_url="http://localhost/v1",
        http_client=client,  # type: ignore[arg-type]  # it takes any httpx
        max_retries=0,
    )
    by_default = await sdk.embeddings.create(model="tiny", input=["a", "bb"])
    as_numbers = await sdk.embeddings.create(
        model="tiny", input=["a", "bb"], encoding_format="float"
    )
    for one, other in zip(by_default.data, as_numbers.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, rel=1e-6)
    assert by_default.usage.prompt_tokens == as_numbers.usage.total_tokens
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        await sdk.embeddings.create(model="tiny", input="a", dimensions=3)
    encoder.refusal = QueueFull("full", retry_after_s=1)
    with pytest.raises(openai.RateLimitError):
        await sdk.embeddings.create(model="tiny", input="a")
