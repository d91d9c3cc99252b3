import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from controller.gateway.schemas.chat import ChatCompletionRequest
from controller.gateway.schemas.completions import CompletionRequest
from controller.metrics import Metrics
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.asgi import AsgiCall
from tests.fakes.function import FakeFunction
from tests.fakes.tokenizers import write_snapshot

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
PROMPT: dict[str, Any] = {"model": "tiny", "prompt": "hello"}


async def refused(
    client: httpx.AsyncClient, path: str, body: object, status: int = 400
) -> dict[str, Any]:
    """Send a body, raw or to be encoded; return the error of the expected status."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    response = await client.post(path, content=content, headers=headers)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        (b"", "not JSON"),
        (b"{", "line 1 column 2"),
        (b'{"model": "tiny",}', "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model": "tiny", "temperature": NaN}', "NaN"),
        (b'{"model": "tiny", "temperature": -Infinity}', "-Infinity"),
        (b'{"model": "tiny", "temperature": 1e999}', "out of range"),
        (b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"model": "a", "model": "b"}', "'model' appears twice"),
        (b'{"model": "tiny", "metadata": {"x": 1, "x": 2}}', "'x' appears twice"),
        (b'{"model": "\xff\xfe"}', "not UTF-8 at byte 11"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b'{"model": "tiny", "user": "\\uDFFF"}', "surrogate"),
        (b'{"model": "tiny", "user": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested"),
        (b'{"model": "tiny", "user": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}", "nested"),
    ],
)
async def test_broken_json_is_refused_with_the_reason(
    client: httpx.AsyncClient, body: bytes, hint: str
) -> None:
    for path in (CHAT, TEXT):
        assert hint in (await refused(client, path, body))["message"]


async def test_surrogate_pairs_and_any_unicode_are_fine(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    body = b'{"model": "tiny", "prompt": "\\ud83d\\udd25 \\u0000 \xf0\x9f\x94\xa5"}'
    headers = {"content-type": "application/json; charset=utf-8"}
    response = await client.post(TEXT, content=body, headers=headers)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("change", "param", "hint"),
    [
        ({"model": None}, "model", "string"),
        ({"model": 7}, "model", "string"),
        ({"model": ""}, "model", "at least 1"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 10**30}, "max_tokens", "less than or equal"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 10**400}, "temperature", "number"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 2}, "min_p", "less than or equal to 1"),
        ({"seed": 2**63}, "seed", "less than or equal"),
        ({"stop": ""}, "stop", "1 to 1024"),
        ({"stop": ["a", ""]}, "stop", "1 to 1024"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": {"a": 1}}, "stop", "list of strings"),
        ({"stop": ["x" * 2000]}, "stop", "1 to 1024"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "ids go from 0 to"),
        ({"stop_token_ids": ["a"] * 100_000}, "stop_token_ids", "at most 1024"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", "integer"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "ids go from 0 to"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
        ({"stream": True, "stream_options": {"include_use": 1}}, None, "did you mean"),
        ({"use_beam_search": True}, "use_beam_search", "not supported yet"),
        ({"guided_json": {}}, "guided_json", "send 'structured_outputs' instead"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"n": True}, "n", "integer"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"logit_bias": {"99999999999": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"\u0664": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"405": 1}}, "logit_bias", "ids go from 0 to"),
        ({"logit_bias": {"4": 101}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"logit_bias": [1, 2]}, "logit_bias", "dictionary"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
        ({"allowed_token_ids": [405]}, "allowed_token_ids", "ids go from 0 to"),
        ({"allowed_token_ids": [0] * 300_000}, "allowed_token_ids", "at most 262144"),
        ({"bad_words": [""]}, "bad_words", "1 to 1024"),
        ({"bad_words": ["a"] * 257}, "bad_words", "at most 256"),
        ({"min_tokens": -1}, "min_tokens", "greater than or equal to 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "at most 8 tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
        ({"truncation_side": "middle"}, "truncation_side", "'left' or 'right'"),
        ({"request_id": "a b"}, "request_id", "pattern"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "cannot be streamed"),
        ({"priority": 2**31}, "priority", "less than or equal to"),
        ({"cache_salt": ""}, "cache_salt", "at least 1"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"x" * 1000: 1}, "x" * 64, "unknown field"),
    ],
)
async def test_wrong_field_is_named_with_what_to_change(
    client: httpx.AsyncClient, change: dict[str, Any], param: str | None, hint: str
) -> None:
    for path, good in ((CHAT, HELLO), (TEXT, PROMPT)):
        error = await refused(client, path, {**good, **change})
        assert hint in error["message"]
        assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": HELLO["messages"] * 10_001}, "messages"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        (
            {"messages": [HELLO["messages"][0], {"role": "tool", "content": ""}]},
            "messages[1].tool_call_id",
        ),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [7]}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": "", "contnet": ""}]}, "messages[0].contnet"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].id",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"echo": True}, "echo"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"prompt": "x"}, "prompt"),
    ],
)
async def test_wrong_chat_field_is_named(
    client: httpx.AsyncClient, change: dict[str, Any], param: str
) -> None:
    assert (await refused(client, CHAT, {**HELLO, **change}))["param"] == param


async def test_older_names_of_tools_are_told_the_newer_ones(client: httpx.AsyncClient) -> None:
    for old, value, new in (
        ("functions", [{"name": "f"}], "tools"),
        ("function_call", {"name": "f"}, "tool_choice"),
    ):
        error = await refused(client, CHAT, {**HELLO, old: value})
        assert (error["param"], f"send {new!r} instead" in error["message"]) == (old, True)


@pytest.mark.parametrize(
    "prompt", [None, "", [], [[]], 7, {}, [1, "a"], [[1], "a"], [[1], ["a"]], [-1], [True], [1.5]]
)
async def test_wrong_prompt_is_named(client: httpx.AsyncClient, prompt: object) -> None:
    assert (await refused(client, TEXT, {**PROMPT, "prompt": prompt}))["param"] == "prompt"


@pytest.mark.parametrize("token_id", [405, 10**9, 2**70])
async def test_token_outside_the_vocabulary_is_refused(
    client: httpx.AsyncClient, token_id: int
) -> None:
    error = await refused(client, TEXT, {**PROMPT, "prompt": [1, token_id]})
    assert "ids go from 0 to" in error["message"]


@pytest.mark.parametrize(
    ("change", "param", "hint"),
    [
        ({"echo": 1}, "echo", "boolean"),
        ({"suffix": "x"}, "suffix", "cannot fill in"),
        ({"suffix": "x", "prompt": [104]}, "suffix", "prompts that are text"),
        ({"suffix": "x", "echo": True}, "suffix", "excludes 'echo'"),
        ({"suffix": "x", "truncate_prompt_tokens": 5}, "suffix", "excludes"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"best_of": 2, "n": 3}, "best_of", "at least n"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"n": 128, "prompt": ["a", "b", "c"]}, "n", "at most 256"),
    ],
)
async def test_wrong_completion_field_is_named(
    client: httpx.AsyncClient, change: dict[str, Any], param: str, hint: str
) -> None:
    error = await refused(client, TEXT, {**PROMPT, **change})
    assert error["param"] == param
    assert hint in error["message"]


async def test_neutral_and_harmless_fields_are_accepted(client: httpx.AsyncClient) -> None:
    neutral: dict[str, Any] = {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": None,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "auto",
        "logprobs": False,
        "top_logprobs": None,
        "stop": None,
        "stream_options": None,
        "user": "u",
        "metadata": {"a": 1},
        "store": True,
        "service_tier": "auto",
        "session_id": "s",
        "prompt_cache_options": {"mode": "auto"},
        "moderation": None,
        "stream_interval": 1,
        "vllm_xargs": {},
        "mm_processor_kwargs": {},
        "logprob_token_ids": [],
        "return_prompt_text": False,
        "thinking_token_budget": None,
    }
    response = await client.post(CHAT, json={**HELLO, **neutral})
    assert response.status_code == 200, response.text


async def test_prompt_as_long_as_the_context_is_refused_with_numbers(
    client: httpx.AsyncClient,
) -> None:
    for num_tokens in (256, 300):
        error = await refused(client, TEXT, {**PROMPT, "prompt": [104] * num_tokens})
        assert error["code"] == "context_length_exceeded"
        assert str(num_tokens) in error["message"]
        assert "256" in error["message"]


async def test_limit_beyond_the_context_is_refused_with_numbers(
    client: httpx.AsyncClient,
) -> None:
    request = {**PROMPT, "prompt": [104] * 250, "max_tokens": 7}
    error = await refused(client, TEXT, request)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "leaves 6" in error["message"]
    response = await client.post(TEXT, json={**request, "max_tokens": 6})
    assert response.status_code == 200


async def test_the_newer_name_of_the_limit_is_named_where_it_was_used(
    client: httpx.AsyncClient,
) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        assert (await refused(client, CHAT, {**HELLO, field: 1000}))["param"] == field


async def test_a_long_prompt_leaves_what_is_left_by_default(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    await client.post(TEXT, json={**PROMPT, "prompt": [104] * 250})
    assert function.generations[0].request.sampling.max_tokens == 6


async def test_template_refusal_is_told_in_the_templates_words(
    make_app: AppMaker, function: FakeFunction, tmp_path: Path, byte_level: Tokenizer
) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    function.snapshot_path = write_snapshot(
        tmp_path, byte_level, eos_token="<|im_end|>", chat_template=template
    )
    async with client_of(make_app()) as client:
        error = await refused(client, CHAT, HELLO)
    assert "roles must alternate" in error["message"]
    assert error["param"] == "messages"


async def test_model_without_a_template_points_to_completions(
    make_app: AppMaker, function: FakeFunction, tmp_path: Path, byte_level: Tokenizer
) -> None:
    function.snapshot_path = write_snapshot(
        tmp_path, byte_level, eos_token="<|im_end|>", chat_template=None
    )
    async with client_of(make_app()) as client:
        assert "/v1/completions" in (await refused(client, CHAT, HELLO))["message"]


@pytest.mark.parametrize("model", ["../../etc", "%2e%2e", "tiny\0", "x" * 256, "-rf", "Tiny"])
async def test_unknown_model_is_404_with_near_names(client: httpx.AsyncClient, model: str) -> None:
    error = await refused(client, CHAT, {**HELLO, "model": model}, status=404)
    assert error["code"] == "model_not_found"
    assert "tiny" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", CHAT, 405),
        ("DELETE", CHAT, 405),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/models/../../etc/passwd", 404),
    ],
)
async def test_unknown_route_and_method_answer_in_the_envelope(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert path.rpartition("/")[2] in response.json()["error"]["message"]


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data", ""])
async def test_other_content_types_are_refused(
    client: httpx.AsyncClient, content_type: str
) -> None:
    headers = {"content-type": content_type}
    response = await client.post(CHAT, content=json.dumps(HELLO), headers=headers)
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


async def test_compressed_bodies_are_refused(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = await client.post(CHAT, content=b"\x1f\x8b", headers=headers)
    assert response.status_code == 400
    assert "uncompressed" in response.json()["error"]["message"]


async def test_announced_large_body_is_refused_unread(make_app: AppMaker) -> None:
    call = AsgiCall(
        make_app(max_body_bytes=1024), CHAT, [b"x"] * 3, headers={"content-length": "10000000"}
    )
    body = json.loads(await call.finished())
    assert call.status == 413
    assert call.headers["connection"] == "close"
    assert "1024 bytes" in body["error"]["message"]
    assert call.num_received == 0


async def test_chunked_large_body_is_refused_at_the_limit(make_app: AppMaker) -> None:
    call = AsgiCall(make_app(max_body_bytes=1024), CHAT, [b"x" * 100] * 1000)
    await call.finished()
    assert call.status == 413
    assert call.num_received == 11


async def test_body_that_never_ends_is_408(make_app: AppMaker) -> None:
    call = AsgiCall(make_app(body_timeout_s=0.01), CHAT, [b"{"], is_complete=False)
    body = json.loads(await call.finished())
    assert call.status == 408
    assert body["error"]["code"] == "request_timeout"


async def test_client_that_leaves_while_sending_gets_nothing(
    make_app: AppMaker, metrics: Metrics
) -> None:
    call = AsgiCall(make_app(), CHAT, [b"{"], is_complete=False)
    call.leave()
    assert await call.finished() == ""
    assert call.messages == []
    assert b'code="499"' in metrics.render()


async def test_nothing_reaches_the_function_from_bad_input(
    client: httpx.AsyncClient, function: FakeFunction
) -> None:
    await refused(client, CHAT, {**HELLO, "max_tokens": -1})
    await refused(client, TEXT, {**PROMPT, "prompt": [10**9]})
    assert function.generations == []


@pytest.mark.parametrize("stream", [False, True])
async def test_defect_of_ours_is_500_in_the_envelope_with_the_request_id(
    client: httpx.AsyncClient, function: FakeFunction, stream: bool
) -> None:
    function.script = lambda request: [KeyError("bug")]
    with capture_logs() as logs:
        response = await client.post(
            CHAT, json={**HELLO, "stream": stream}, headers={"x-request-id": "abc"}
        )
    assert [(entry["event"], entry["request_id"]) for entry in logs] == [("request_failed", "abc")]
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "'abc'" in response.json()["error"]["message"]
    assert "bug" not in response.text


async def test_snapshot_without_a_tokenizer_is_500_and_logged(
    client: httpx.AsyncClient, function: FakeFunction, tmp_path: Path
) -> None:
    function.snapshot_path = tmp_path
    with capture_logs() as logs:
        response = await client.post(CHAT, json=HELLO)
    assert [entry["event"] for entry in logs] == ["request_failed"]
    assert response.status_code == 500
    assert "build it again" in response.json()["error"]["message"]


@pytest.fixture
def app(make_app: AppMaker) -> FastAPI:
    return make_app()


ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["tiny", "user", "text", "assistant", 1, 0, 104]),
)
KEYS = st.sampled_from(["role", "content", "type", "text", "include_usage", "x"])
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted(
    {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
    | {*ChatCompletionRequest.unsupported, *CompletionRequest.unsupported, "user", "no_such"}
)


@settings(max_examples=200)
@given(
    path=st.sampled_from([CHAT, TEXT]),
    is_whole=st.booleans(),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
)
def test_no_json_makes_the_gateway_fail(
    app: FastAPI, path: str, is_whole: bool, changes: dict[str, Any]
) -> None:
    good = {CHAT: HELLO, TEXT: PROMPT}[path] if is_whole else {}

    async def ask() -> None:
        async with client_of(app) as client:
            response = await client.post(path, json={**good, **changes})
        assert response.status_code in (200, 400, 404), response.text
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    asyncio.run(ask())


async def test_bodies_on_their_way_are_bounded_together(make_app: AppMaker) -> None:
    app = make_app(max_body_bytes=4096, max_unread_bytes=6000)
    slow = AsgiCall(app, CHAT, [b" " * 4000], is_complete=False)
    await asyncio.sleep(0.01)
    refused = AsgiCall(app, CHAT, [b" " * 4000], is_complete=False)
    await refused.finished()
    assert refused.status == 503
    assert refused.headers["retry-after"] == "1"
    assert json.loads(refused.text)["error"]["code"] == "overloaded"
    slow.leave()
    await slow.finished()
    served = AsgiCall(app, CHAT, [json.dumps(HELLO).encode() + b" " * 4000])
    await served.finished()
    assert served.status == 200
