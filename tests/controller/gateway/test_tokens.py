from pathlib import Path

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.function import FakeFunction
from tests.fakes.tokenizers import write_snapshot

MESSAGES = [{"role": "user", "content": "hello"}]


async def test_prompt_is_split_as_the_tokenizer_splits_it(
    client: httpx.AsyncClient, byte_level: Tokenizer
) -> None:
    body = {"model": "tiny", "prompt": "Zürich 東京", "return_token_strs": True}
    answer = (await client.post("/tokenize", json=body)).json()
    expected = byte_level.encode("Zürich 東京")
    assert answer == {
        "count": len(expected.ids),
        "max_model_len": 256,
        "tokens": expected.ids,
        "token_strs": expected.tokens,
    }


async def test_spelling_is_left_out_unless_asked_for(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"model": "tiny", "prompt": "a"})).json()
    assert set(answer) == {"count", "max_model_len", "tokens"}


async def test_conversation_counts_the_tokens_a_generation_is_billed(
    client: httpx.AsyncClient,
) -> None:
    body = {"model": "tiny", "messages": MESSAGES}
    counted = (await client.post("/tokenize", json=body)).json()["count"]
    generated = (await client.post("/v1/chat/completions", json=body)).json()
    assert generated["usage"]["prompt_tokens"] == counted


async def test_generation_prompt_can_be_left_out(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "messages": MESSAGES}
    closed = await client.post("/tokenize", json={**body, "add_generation_prompt": False})
    opened = await client.post("/tokenize", json=body)
    shorter, longer = closed.json()["tokens"], opened.json()["tokens"]
    assert longer[: len(shorter)] == shorter
    assert len(longer) > len(shorter)


async def test_last_message_can_be_left_open(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
    body = {"model": "tiny", "messages": messages, "continue_final_message": True}
    tokens = (await client.post("/tokenize", json=body)).json()["tokens"]
    await client.post("/v1/chat/completions", json=body)
    assert tokens == list(function.generations[0].request.prompt_token_ids)


async def test_template_variables_are_counted(
    make_app: AppMaker, tmp_path: Path, byte_level: Tokenizer
) -> None:
    snapshot = write_snapshot(
        tmp_path, byte_level, eos_token="<|im_end|>", chat_template="{{ mood }}"
    )
    body = {"messages": MESSAGES, "chat_template_kwargs": {"mood": "calm"}}
    async with client_of(make_app(FakeFunction(snapshot, lambda _: []))) as client:
        answer = (await client.post("/tokenize", json=body)).json()
    assert answer["tokens"] == byte_level.encode("calm").ids


async def test_special_tokens_of_the_tokenizer_are_added_to_prompts_only(
    tmp_path_factory: pytest.TempPathFactory, byte_fallback: Tokenizer, make_app: AppMaker
) -> None:

    snapshot = write_snapshot(
        tmp_path_factory.mktemp("store") / "llama@0123456789ab", byte_fallback, eos_token="</s>"
    )
    async with client_of(make_app(FakeFunction(snapshot, lambda _: []))) as client:
        for added, body in (
            (True, {"prompt": "H"}),
            (False, {"prompt": "H", "add_special_tokens": False}),
            (False, {"messages": MESSAGES}),
            (True, {"messages": MESSAGES, "add_special_tokens": True}),
        ):
            tokens = (await client.post("/tokenize", json={"model": "tiny", **body})).json()
            assert (tokens["tokens"][0] == 1) is added, body


async def test_tokens_come_back_as_the_text(client: httpx.AsyncClient) -> None:
    text = "<|im_start|>Zürich is warm, 東京 too 🔥."
    tokens = (await client.post("/tokenize", json={"prompt": text})).json()["tokens"]
    answer = await client.post("/detokenize", json={"tokens": tokens})
    assert answer.json() == {"prompt": text}


async def test_nothing_is_woken(client: httpx.AsyncClient, function: FakeFunction) -> None:
    function.tier = "stopped"
    await client.post("/tokenize", json={"prompt": "a"})
    await client.post("/detokenize", json={"tokens": [5]})
    assert function.generations == []


TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, None, "either"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, None, "either"),
        ("/tokenize", {"prompt": 1}, "prompt", "string"),
        ("/tokenize", {"prompt": "a", "promptt": "b"}, "promptt", "did you mean 'prompt'"),
        ("/tokenize", {"messages": []}, "messages", "at least 1"),
        ("/tokenize", {"messages": MESSAGES, "tools": [TOOL, TOOL]}, "tools", "two functions"),
        (
            "/tokenize",
            {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "excludes",
        ),
        ("/detokenize", {"tokens": [1, -1]}, "tokens", "is not a token"),
        ("/detokenize", {"tokens": [10**30]}, "tokens", "huge"),
        ("/detokenize", {"tokens": [1] * ((1 << 20) + 1)}, "tokens", "at most"),
        ("/detokenize", {}, "tokens", "required"),
    ],
)
async def test_bad_input_is_400(
    client: httpx.AsyncClient, path: str, body: object, param: str | None, words: str
) -> None:
    response = await client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


async def test_model_must_be_named_where_there_are_several(
    make_app: AppMaker, function: FakeFunction
) -> None:
    other = FakeFunction(function.snapshot_path, function.script, name="other")
    async with client_of(make_app(function, other)) as client:
        response = await client.post("/tokenize", json={"prompt": "a"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "model"
        named = await client.post("/tokenize", json={"prompt": "a", "model": "other"})
        assert named.status_code == 200


async def test_sdk_reaches_them_by_its_raw_post(client: httpx.AsyncClient) -> None:
    sdk = openai.AsyncOpenAI(
        api_key="unused",
        base_url="http://localhost",
        http_client=client,  # type: ignore[arg-type]  # it takes any httpx
    )
    answer = await sdk.post("/tokenize", cast_to=object, body={"model": "tiny", "prompt": "a"})
    assert isinstance(answer, dict)
    assert answer["count"] == 1
