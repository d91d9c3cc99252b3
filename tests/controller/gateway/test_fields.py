"""What each field of a request does, from the body to the engine's parameters and back."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from controller.gateway.logprobs import MANY_TOKENS, LogprobWriter
from controller.gateway.prompt_echo import PromptEcho
from controller.gateway.schemas.chat import ChatCompletion
from controller.gateway.schemas.completions import Completion
from controller.scaling.generation import GenerationRequest, TokenChunk
from runtime.rpc import inference_pb2 as pb
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.asgi import events
from tests.fakes.function import FakeFunction, Step
from tests.fakes.tokenizers import write_snapshot

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
PROMPT: dict[str, Any] = {"model": "tiny", "prompt": "hello"}
BODIES = {CHAT: HELLO, TEXT: PROMPT}


async def post(client: httpx.AsyncClient, path: str, **fields: Any) -> dict[str, Any]:
    response = await client.post(path, json={**BODIES[path], **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def sampling_of(function: FakeFunction, index: int = -1) -> pb.SamplingParams:
    return function.generations[index].request.sampling


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"presence_penalty": -0.5}, {"presence_penalty": -0.5}),
        ({"frequency_penalty": 0.25}, {"frequency_penalty": 0.25}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"logit_bias": {"7": -100, "300": 1.5}}, {"logit_bias": {7: -100.0, 300: 1.5}}),
        ({"allowed_token_ids": [4, 9]}, {"allowed_token_ids": [4, 9]}),
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"temperature": 0, "top_k": -1}, {"temperature": 0, "top_k": 0}),
        ({"top_p": 0, "top_k": 9}, {"temperature": 0, "top_p": 1, "top_k": 0}),
        ({"seed": -1}, {"seed": (1 << 64) - 1}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"stop_token_ids": [5]}, {"stop_token_ids": [5]}),
    ],
)
async def test_fields_reach_the_engine(
    client: httpx.AsyncClient,
    function: FakeFunction,
    path: str,
    fields: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    await post(client, path, **fields)
    wanted = pb.SamplingParams(**expected)
    for name in expected:
        assert getattr(sampling_of(function), name) == getattr(wanted, name)


async def test_bad_words_are_banned_with_and_without_a_space(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer
) -> None:
    await post(client, CHAT, bad_words=["warm"])
    words = [list(word.token_ids) for word in sampling_of(function).bad_words]
    assert sorted(byte_level.decode(word) for word in words) == [" warm", "warm"]


@pytest.mark.parametrize(("mode", "expected"), [("auto", 1.25), ("none", 1.0)])
async def test_the_authors_defaults_are_applied_unless_the_function_says_not(
    make_app: AppMaker,
    function: FakeFunction,
    tmp_path: Path,
    byte_level: Tokenizer,
    mode: str,
    expected: float,
) -> None:
    recommended: dict[str, object] = {"temperature": 1.25, "repetition_penalty": 1.25, "top_k": 20}
    function.snapshot_path = write_snapshot(
        tmp_path, byte_level, eos_token="<|im_end|>", generation_config=recommended
    )
    model = function.spec.model.model_copy(update={"generation_config": mode})
    function.spec = function.spec.model_copy(update={"model": model})
    async with client_of(make_app()) as client:
        await post(client, CHAT)
        described = (await client.get("/v1/models/tiny")).json()["sampling_defaults"]
    assert sampling_of(function).temperature == expected
    assert sampling_of(function).repetition_penalty == expected
    assert described["temperature"] == expected
    assert described["top_k"] == (20 if mode == "auto" else 0)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_several_answers_have_their_own_seeds_and_indices(
    client: httpx.AsyncClient, function: FakeFunction, path: str
) -> None:
    body = await post(client, path, n=3, seed=41)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [each.request.sampling.seed for each in function.generations] == [41, 42, 43]
    assert len({each.request.request_id for each in function.generations}) == 3
    assert body["usage"]["completion_tokens"] % 3 == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "num_answers"),
    [
        (CHAT, {"n": 3}, 3),
        (TEXT, {"n": 3}, 3),
        (TEXT, {"prompt": ["one", "and another", "one"], "n": 2}, 6),
    ],
)
async def test_each_prompt_is_counted_once_however_many_answers_it_has(
    client: httpx.AsyncClient,
    function: FakeFunction,
    path: str,
    fields: dict[str, Any],
    num_answers: int,
    stream: bool,
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = await client.post(path, json={**BODIES[path], **fields, **options})
    usage = (events(response.text)[-2] if stream else response.json())["usage"]
    assert len(function.generations) == num_answers
    firsts = function.generations[:: fields["n"]]
    num_prompt = sum(len(each.request.prompt_token_ids) for each in firsts)
    assert usage["prompt_tokens"] == num_prompt
    assert usage["total_tokens"] == num_prompt + usage["completion_tokens"]


async def test_cached_tokens_of_a_prompt_are_those_its_first_answer_found(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    numbers = iter([4, 6, 6, 1, 2, 2])

    def script(request: GenerationRequest) -> Iterable[Step]:
        record = next(e.record for e in function.generations if e.request is request)
        record.num_cached_tokens = next(numbers)
        yield TokenChunk([2], finish_reason="stop")

    function.script = script
    body = await post(client, TEXT, prompt=["one", "two"], n=3)
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 4 + 1


async def test_answers_of_one_prompt_are_in_a_row(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    await post(client, TEXT, prompt=["a", "b"], n=2)
    prompts = [list(each.request.prompt_token_ids) for each in function.generations]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]


def logprobs_script(tokens: list[int], logprobs: list[float]) -> Any:
    """Return a script that says how likely each token was, token 104 being half as likely."""

    def script(request: GenerationRequest) -> Iterable[Step]:
        for token_id, logprob in zip(tokens, logprobs, strict=True):
            yield TokenChunk(
                [token_id],
                logprobs=[
                    pb.TokenLogprobs(
                        logprob=logprob,
                        top_token_ids=[token_id, 104][: request.sampling.num_logprobs],
                        top_logprobs=[logprob, logprob - 0.5][: request.sampling.num_logprobs],
                    )
                ],
            )
        yield TokenChunk([], finish_reason="stop")

    return script


async def test_chat_logprobs_tell_tokens_bytes_and_the_likeliest(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer
) -> None:
    tokens = byte_level.encode("hé😀").ids
    function.script = logprobs_script(tokens, [-0.25] * len(tokens))
    body = await post(client, CHAT, logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == "hé😀"
    assert all(token["logprob"] == -0.25 for token in content)
    assert [len(token["top_logprobs"]) for token in content] == [2] * len(tokens)
    assert all("\N{REPLACEMENT CHARACTER}" in token["token"] for token in content[-2:])
    body = await post(client, CHAT, logprobs=True)
    assert [token["top_logprobs"] for token in body["choices"][0]["logprobs"]["content"]] == (
        [[]] * len(tokens)
    )
    assert sampling_of(function).num_logprobs == 0
    body = await post(client, CHAT)
    assert body["choices"][0]["logprobs"] is None
    assert not sampling_of(function).HasField("num_logprobs")


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_streamed_logprobs_join_to_the_whole(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer, path: str
) -> None:
    tokens = byte_level.encode("Zürich 東京 STOP").ids
    function.script = logprobs_script(tokens, [-float(i) for i in range(len(tokens))])
    fields: dict[str, Any] = {"logprobs": 1, "stop": "TOP"}
    if path == CHAT:
        fields = {"logprobs": True, "top_logprobs": 1, "stop": "TOP"}
    whole = (await post(client, path, **fields))["choices"][0]
    response = await client.post(path, json={**BODIES[path], **fields, "stream": True})
    chunks = [event["choices"][0] for event in events(response.text)[:-1]]
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    assert len(parts) > 1
    for key, value in whole["logprobs"].items():
        if isinstance(value, list):
            assert [item for part in parts for item in part[key]] == value
            assert len(value) == len(tokens)
    assert whole["stop_reason"] == chunks[-1]["stop_reason"] == "TOP"


async def test_completion_logprobs_have_offsets_and_the_chosen_token(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer
) -> None:
    tokens = byte_level.encode("hot é").ids
    function.script = logprobs_script(tokens, [-0.5] * len(tokens))
    body = await post(client, TEXT, logprobs=0)
    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][0] == choice["text"][: len(logprobs["tokens"][0])]
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert logprobs["text_offset"][0] == 0
    assert logprobs["top_logprobs"] == [{token: -0.5} for token in logprobs["tokens"]]
    body = await post(client, TEXT, logprobs=1, return_tokens_as_token_ids=True)
    assert body["choices"][0]["logprobs"]["tokens"] == [f"token_id:{id}" for id in tokens]


async def test_minus_infinity_is_written_as_json_can(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    function.script = logprobs_script([104], [float("-inf")])
    body = await post(client, TEXT, logprobs=1)
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


async def test_best_of_returns_the_likeliest_answers(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    def script(request: GenerationRequest) -> Iterable[Step]:
        likelihood = {1: -3.0, 2: -1.0, 3: -2.0}[request.sampling.seed]
        token = 104 + request.sampling.seed
        yield TokenChunk([token] * 2, logprobs=[pb.TokenLogprobs(logprob=likelihood)] * 2)
        yield TokenChunk([], finish_reason="length")

    function.script = script
    body = await post(client, TEXT, best_of=3, n=2, seed=1, return_token_ids=True)
    assert [choice["token_ids"] for choice in body["choices"]] == [[106] * 2, [107] * 2]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert [choice["logprobs"] for choice in body["choices"]] == [None, None]
    assert body["usage"]["completion_tokens"] == 6


async def test_token_ids_are_returned_when_asked_for(
    client: httpx.AsyncClient, function: FakeFunction, answer_tokens: list[int]
) -> None:
    chat = await post(client, CHAT, return_token_ids=True)
    assert chat["choices"][0]["token_ids"] == [*answer_tokens, 2]
    prompt = list(function.generations[-1].request.prompt_token_ids)
    assert chat["prompt_token_ids"] == prompt
    text = await post(client, TEXT, prompt=[104, 105], return_token_ids=True)
    assert text["choices"][0]["prompt_token_ids"] == [104, 105]
    response = await client.post(CHAT, json={**HELLO, "return_token_ids": True, "stream": True})
    chunks = [event["choices"][0] for event in events(response.text)[:-1]]
    assert [id for chunk in chunks for id in chunk["token_ids"]] == [*answer_tokens, 2]


async def test_prompts_are_returned_at_the_beginning_of_streams(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    fields = {"return_token_ids": True, "stream": True, "n": 2}
    response = await client.post(CHAT, json=HELLO | fields)
    told = [event["prompt_token_ids"] for event in events(response.text)[:-1]
            if "prompt_token_ids" in event]  # fmt: skip
    assert told == [list(function.generations[-1].request.prompt_token_ids)]
    response = await client.post(TEXT, json=PROMPT | fields | {"prompt": [[104], [105, 106]]})
    choices = [event["choices"][0] for event in events(response.text)[:-1]]
    prompts = [(choice["index"], choice["prompt_token_ids"]) for choice in choices
               if "prompt_token_ids" in choice]  # fmt: skip
    assert sorted(prompts) == [(0, [104]), (1, [104]), (2, [105, 106]), (3, [105, 106])]
    firsts = {choice["index"]: choice for choice in reversed(choices)}
    assert all("prompt_token_ids" in choice for choice in firsts.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_the_stop_string_is_kept_if_asked_for_and_named(
    client: httpx.AsyncClient, stream: bool
) -> None:
    for keep, text in ((False, "Zürich is "), (True, "Zürich is warm")):
        fields = {"stop": ["warm"], "include_stop_str_in_output": keep, "stream": stream}
        response = await client.post(TEXT, json={**PROMPT, "max_tokens": 100, **fields})
        if stream:
            choices = [event["choices"][0] for event in events(response.text)[:-1]]
        else:
            choices = response.json()["choices"]
        assert "".join(choice["text"] for choice in choices) == text
        assert choices[-1]["stop_reason"] == "warm"


async def test_a_stop_token_is_named(client: httpx.AsyncClient, function: FakeFunction) -> None:
    function.script = lambda request: [TokenChunk([104, 105], finish_reason="stop")]
    assert (await post(client, TEXT, stop_token_ids=[105]))["choices"][0]["stop_reason"] == 105
    assert (await post(client, TEXT))["choices"][0]["stop_reason"] is None


async def test_stop_strings_count_after_min_tokens(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer
) -> None:
    tokens = byte_level.encode("warm warm warm").ids
    function.script = lambda request: [
        *(TokenChunk([token]) for token in tokens),
        TokenChunk([], finish_reason="length"),
    ]
    first = len(byte_level.encode("warm").ids)
    body = await post(client, TEXT, stop="warm", min_tokens=first)
    assert body["choices"][0]["text"] == "warm "
    assert (await post(client, TEXT, stop="warm"))["choices"][0]["text"] == ""


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_may_begin_within_min_tokens_and_end_later(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer, stream: bool
) -> None:
    tokens = [byte_level.encode(letter).ids[0] for letter in "xENDyENDz"]
    function.script = lambda request: [
        *(TokenChunk([token]) for token in tokens),
        TokenChunk([], finish_reason="length"),
    ]
    for min_tokens, text in ((0, "x"), (2, "x"), (3, "x"), (4, "xENDy"), (8, "xENDyENDz")):
        fields = {"stop": "END", "min_tokens": min_tokens, "stream": stream}
        response = await client.post(TEXT, json={**PROMPT, **fields})
        if stream:
            choices = [event["choices"][0] for event in events(response.text)[:-1]]
        else:
            choices = response.json()["choices"]
        assert "".join(choice["text"] for choice in choices) == text
        assert choices[-1]["finish_reason"] == ("length" if min_tokens == 8 else "stop")


async def test_special_tokens_are_shown_if_asked_for(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    function.script = lambda request: [TokenChunk([104, 1, 105, 2], finish_reason="stop")]
    plain = (await post(client, TEXT))["choices"][0]["text"]
    shown = (await post(client, TEXT, skip_special_tokens=False))["choices"][0]["text"]
    assert "<|im_start|>" in shown
    assert shown.replace("<|im_start|>", "") == plain


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 2}, [13, 14]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [10, 11]),
        ({"truncate_prompt_tokens": 99}, [10, 11, 12, 13, 14]),
        ({"truncate_prompt_tokens": 0}, [14]),
    ],
)
async def test_prompts_are_cut_where_asked(
    client: httpx.AsyncClient, function: FakeFunction, fields: dict[str, Any], kept: list[int]
) -> None:
    await post(client, TEXT, prompt=[10, 11, 12, 13, 14], **fields)
    assert list(function.generations[-1].request.prompt_token_ids) == kept


async def test_minus_one_cuts_a_prompt_to_leave_room_for_the_answer(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    await post(client, TEXT, prompt=[104] * 400, max_tokens=20, truncate_prompt_tokens=-1)
    assert len(function.generations[-1].request.prompt_token_ids) == 256 - 20


async def test_request_id_is_part_of_the_answers_id(client: httpx.AsyncClient) -> None:
    assert (await post(client, CHAT, request_id="my-1"))["id"] == "chatcmpl-my-1"
    assert (await post(client, TEXT, request_id="my-1"))["id"] == "cmpl-my-1"


async def prompt_of(
    client: httpx.AsyncClient, function: FakeFunction, tokenizer: Tokenizer, **fields: Any
) -> str:
    await post(client, CHAT, **fields)
    text: str = tokenizer.decode(
        function.generations[-1].request.prompt_token_ids, skip_special_tokens=False
    )
    return text


async def test_prompts_end_as_asked(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer
) -> None:
    asked = "<|im_start|>user\nhello<|im_end|>\n"
    messages = [*HELLO["messages"], {"role": "assistant", "content": "Well, "}]
    assert await prompt_of(client, function, byte_level) == f"{asked}<|im_start|>assistant\n"
    assert await prompt_of(client, function, byte_level, add_generation_prompt=False) == asked
    continued = await prompt_of(
        client, function, byte_level, messages=messages, continue_final_message=True
    )
    assert continued == f"{asked}<|im_start|>assistant\nWell, "


async def test_a_last_message_without_text_cannot_be_continued(client: httpx.AsyncClient) -> None:
    messages = [*HELLO["messages"], {"role": "assistant", "content": " "}]
    response = await client.post(
        CHAT, json={**HELLO, "messages": messages, "continue_final_message": True}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "continue_final_message"


async def test_template_variables_reach_the_template(
    make_app: AppMaker, function: FakeFunction, tmp_path: Path, byte_level: Tokenizer
) -> None:
    template = "{{ mood }} {{ documents[0].title }} {{ messages[0].content }}"
    function.snapshot_path = write_snapshot(
        tmp_path, byte_level, eos_token="<|im_end|>", chat_template=template
    )
    async with client_of(make_app()) as client:
        text = await prompt_of(
            client,
            function,
            byte_level,
            chat_template_kwargs={"mood": "calm", "messages": "no"},
            documents=[{"title": "one"}],
        )
    assert text == "calm one hello"


async def test_usage_goes_with_every_chunk_if_asked_for(
    client: httpx.AsyncClient, answer_tokens: list[int]
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await client.post(CHAT, json={**HELLO, "stream": True, "stream_options": options})
    usages = [event["usage"] for event in events(response.text)[:-1]]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert counts[-1] == len(answer_tokens) + 1
    assert all(usage["prompt_tokens"] == usages[0]["prompt_tokens"] > 0 for usage in usages)


async def test_priority_and_salt_go_to_the_replica(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    await post(client, CHAT, priority=-7, cache_salt="mine")
    request = function.generations[-1].request
    assert (request.priority, request.cache_salt) == (-7, "mine")
    await post(client, CHAT)
    request = function.generations[-1].request
    assert (request.priority, request.cache_salt) == (0, "")


def echo_script(tokens: list[int]) -> Any:
    """Return a script whose prompt's tokens are the likelier the later, told in two parts."""

    def script(request: GenerationRequest) -> Iterable[Step]:
        prompt = request.prompt_token_ids
        num_top = request.sampling.num_prompt_logprobs
        told = request.sampling.HasField("num_prompt_logprobs")
        parts = [
            pb.PromptLogprobs(
                first=first,
                logprobs=[-float(position) for position in range(first, end)],
                top_token_ids=[104] * num_top * (end - first),
                top_logprobs=[-0.5] * num_top * (end - first),
            )
            for first, end in ((1, 3), (2, len(prompt)))  # the second begins within the first
        ]
        logprobs = [pb.TokenLogprobs(logprob=-0.25)]
        for index, token_id in enumerate(tokens):
            yield TokenChunk(
                [token_id], logprobs=logprobs, prompt_logprobs=parts if told and not index else ()
            )
        yield TokenChunk([], finish_reason="length")

    return script


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_and_its_logprobs_before_the_answer(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer, stream: bool
) -> None:
    text = "Zürich 東京 hot"
    prompt, tokens = byte_level.encode(text).ids, byte_level.encode(" tea").ids
    function.script = echo_script(tokens)
    fields = {"prompt": text, "echo": True, "logprobs": 1, "stream": stream}
    response = await client.post(TEXT, json={**PROMPT, **fields})
    if stream:
        choices = [event["choices"][0] for event in events(response.text)[:-1]]
    else:
        choices = response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == text + " tea"
    logprobs: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
    for choice in choices:
        for key in logprobs:
            logprobs[key] += (choice["logprobs"] or {}).get(key, [])
    expected = [None, *(-float(position) for position in range(1, len(prompt)))]
    assert logprobs["token_logprobs"] == expected + [-0.25] * len(tokens)
    assert logprobs["text_offset"][len(prompt)] == len(text)
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert len(logprobs["tokens"]) == len(prompt) + len(tokens)


async def test_echo_without_logprobs_computes_none(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer
) -> None:
    function.script = echo_script(byte_level.encode(" tea").ids)
    body = await post(client, TEXT, prompt=["hot", "cold"], echo=True)
    assert [choice["text"] for choice in body["choices"]] == ["hot tea", "cold tea"]
    body = await post(client, TEXT, prompt=[104, 105], echo=True)
    assert body["choices"][0]["text"] == byte_level.decode([104, 105]) + " tea"
    assert not sampling_of(function).HasField("num_prompt_logprobs")


async def test_no_token_is_returned_where_none_is_wanted(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer
) -> None:
    function.script = echo_script(byte_level.encode("tea").ids)
    body = await post(client, TEXT, prompt="hot water", echo=True, max_tokens=0, logprobs=1)
    choice = body["choices"][0]
    assert choice["text"] == "hot water"
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(byte_level.encode("hot water").ids)
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1] == -1.0
    assert body["usage"]["completion_tokens"] == 0
    assert function.num_running == 0


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_prompt_logprobs_are_told_in_vllms_shape(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer, path: str
) -> None:
    function.script = echo_script(byte_level.encode("tea").ids)
    body = await post(client, path, prompt_logprobs=1)
    prompt = list(function.generations[-1].request.prompt_token_ids)
    told = body["prompt_logprobs"] if path == CHAT else body["choices"][0]["prompt_logprobs"]
    assert len(told) == len(prompt)
    assert told[0] is None
    assert told[1][str(prompt[1])]["logprob"] == -1.0
    assert told[1]["104"] == {
        "logprob": -0.5,
        "rank": 1,
        "decoded_token": byte_level.decode([104]),
    }
    choice = body["choices"][0]
    assert (choice["text"] if path == TEXT else choice["message"]["content"]) == "tea"


async def test_a_prompts_logprobs_are_asked_for_once_and_told_with_each_answer(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer
) -> None:
    function.script = echo_script(byte_level.encode("tea").ids)
    body = await post(client, TEXT, prompt=["one", "and another"], n=2, prompt_logprobs=1)
    asked = [each.request.sampling for each in function.generations]
    assert [one.HasField("num_prompt_logprobs") for one in asked] == [True, False, True, False]
    for index, generation in enumerate(function.generations):
        told = body["choices"][index]["prompt_logprobs"]
        prompt = generation.request.prompt_token_ids
        found = [entry[str(id)]["logprob"] for id, entry in zip(prompt[1:], told[1:], strict=True)]
        assert found == [-float(position) for position in range(1, len(prompt))]


@pytest.mark.parametrize("fields", [{"n": 2}, {"best_of": 2}])
async def test_every_answer_that_echoes_logprobs_asks_for_the_prompts(
    client: httpx.AsyncClient, function: FakeFunction, byte_level: Tokenizer, fields: dict[str, int]
) -> None:
    function.script = echo_script(byte_level.encode("tea").ids)
    body = await post(client, TEXT, prompt="hot", echo=True, logprobs=1, **fields)
    for choice in body["choices"]:
        assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, *[-0.25] * 3]
    asked = [each.request.sampling for each in function.generations]
    assert [one.HasField("num_prompt_logprobs") for one in asked] == [True, True]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"prompt_logprobs": 1}),
        (TEXT, {"prompt_logprobs": 1, "n": 2}),
        (TEXT, {"echo": True, "logprobs": 1}),
        (TEXT, {"echo": True, "logprobs": 1, "stream": True}),
    ],
)
async def test_long_prompts_are_told_off_the_event_loop(
    client: httpx.AsyncClient,
    function: FakeFunction,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    fields: dict[str, Any],
) -> None:
    function.script = echo_script([104])
    threads: dict[str, set[int]] = defaultdict(set)

    def watch(owner: type, name: str, num_tokens: Callable[[Any], int]) -> None:
        method = getattr(owner, name)

        def watched(*args: Any) -> Any:
            if num_tokens(args) > MANY_TOKENS:
                threads[name].add(threading.get_ident())
            return method(*args)

        monkeypatch.setattr(owner, name, watched)

    watch(LogprobWriter, "prompt", lambda args: len(args[1]))
    watch(LogprobWriter, "completion", lambda args: len(args[1]))
    watch(PromptEcho, "put_before", lambda args: len(args[0].prompt.token_ids) * len(args[2]))
    text = "hot tea " * 20
    prompt = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    response = await client.post(path, json={**BODIES[path], **prompt, **fields})
    assert response.status_code == 200, response.text
    assert set(threads) == {"put_before", "prompt" if "prompt_logprobs" in fields else "completion"}
    assert all(threading.get_ident() not in found for found in threads.values())


@pytest.mark.parametrize(
    ("path", "fields", "schema"),
    [
        (CHAT, {"logprobs": True, "top_logprobs": 1, "prompt_logprobs": 1, "n": 2}, ChatCompletion),
        (TEXT, {"logprobs": 1, "prompt_logprobs": 1, "echo": True, "n": 2}, Completion),
    ],
)
async def test_logprobs_are_as_the_schema_says(
    client: httpx.AsyncClient,
    function: FakeFunction,
    byte_level: Tokenizer,
    path: str,
    fields: dict[str, Any],
    schema: type[ChatCompletion | Completion],
) -> None:
    text = 'Zür "\\\n'
    function.script = echo_script(byte_level.encode(text).ids)
    body = await post(client, path, **fields)
    answer = schema.model_validate(body, strict=True)
    assert body == answer.model_dump()
