"""Files and batches through the SDK and the real routes, over a function that plays a script."""

import asyncio
import dataclasses
import json
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types import Batch

from controller.errors import ActivationFailed
from controller.gateway.auth import ApiKey, hash_key
from tests.controller.gateway.conftest import FakeKeyStore
from tests.fakes.function import FakeFunction

MESSAGES = [{"role": "user", "content": "hello"}]
CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"


def lines_of(url: str, *bodies: dict[str, Any]) -> bytes:
    lines = (
        {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": body}
        for number, body in enumerate(bodies)
    )
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


async def run_batch(sdk: openai.AsyncOpenAI, url: Any, content: bytes, **options: Any) -> Batch:
    file = await sdk.files.create(file=("in.jsonl", content), purpose="batch")
    made = await sdk.batches.create(
        input_file_id=file.id, endpoint=url, completion_window="24h", **options
    )
    return await ended(sdk, made.id)


async def ended(sdk: openai.AsyncOpenAI, batch_id: str) -> Batch:
    async with asyncio.timeout(30):
        while True:
            batch = await sdk.batches.retrieve(batch_id)
            if batch.status in ("completed", "failed", "expired", "cancelled"):
                return batch
            await asyncio.sleep(0.02)


async def answers_of(sdk: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    text = (await sdk.files.content(file_id)).text
    return {line["custom_id"]: line for line in map(json.loads, text.splitlines())}


async def test_chat_batch_gives_what_single_calls_give(sdk: openai.AsyncOpenAI) -> None:
    bodies = [{"model": "tiny", "messages": MESSAGES, "max_tokens": 3 + n} for n in range(5)]
    batch = await run_batch(
        sdk, CHAT, lines_of(CHAT, *bodies, {"model": "tiny"}), metadata={"team": "blue"}
    )
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (5, 1)
    assert batch.metadata == {"team": "blue"}
    assert batch.in_progress_at is not None
    assert batch.expires_at == batch.created_at + 86_400
    answers = await answers_of(sdk, batch.output_file_id)
    for number, body in enumerate(bodies):
        single = await sdk.chat.completions.create(**body)  # type: ignore[call-overload]  # a dict
        response = answers[f"id-{number}"]["response"]
        assert response["status_code"] == 200
        assert response["request_id"] == f"{batch.id}-{number}"
        got = response["body"]
        assert got["choices"] == single.to_dict()["choices"]
        assert got["usage"]["completion_tokens"] == 3 + number
    failed = (await answers_of(sdk, batch.error_file_id))["id-5"]["response"]
    assert failed["status_code"] == 400
    assert failed["body"]["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": "hello"}),
        (EMBEDDINGS, {"model": "encoder", "input": ["hello", "you"]}),
    ],
)
async def test_other_endpoints(sdk: openai.AsyncOpenAI, url: str, body: dict[str, Any]) -> None:
    batch = await run_batch(sdk, url, lines_of(url, body))
    answer = (await answers_of(sdk, batch.output_file_id))["id-0"]["response"]["body"]
    assert answer["object"] in ("text_completion", "list")


async def test_refused_input_says_which_line(sdk: openai.AsyncOpenAI) -> None:
    batch = await run_batch(sdk, CHAT, lines_of(EMBEDDINGS, {"model": "tiny"}))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.line, error.code) for error in batch.errors.data] == [(1, "invalid_url")]


async def test_cancelled_in_the_middle(sdk: openai.AsyncOpenAI, function: FakeFunction) -> None:
    function.script = lambda request: [asyncio.Event()]
    content = lines_of(CHAT, {"model": "tiny", "messages": MESSAGES})
    file = await sdk.files.create(file=content, purpose="batch")
    made = await sdk.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    async with asyncio.timeout(30):
        await function.entered.wait()
    with pytest.raises(openai.ConflictError):
        await sdk.files.delete(file.id)
    await sdk.batches.cancel(made.id)
    assert (await ended(sdk, made.id)).status == "cancelled"
    assert function.num_running == 0
    assert (await sdk.files.delete(file.id)).deleted


async def test_requests_of_a_batch_may_not_wake_and_say_so(
    sdk: openai.AsyncOpenAI, function: FakeFunction
) -> None:
    content = lines_of(CHAT, {"model": "tiny", "messages": MESSAGES})
    await run_batch(sdk, CHAT, content)
    (generation,) = function.generations
    assert not generation.request.may_wake
    assert generation.request.priority > 0, "interactive requests go first inside a replica too"


async def test_refusals_that_pass_are_not_answers(
    sdk: openai.AsyncOpenAI, function: FakeFunction
) -> None:
    function.refusal = ActivationFailed("not now", retry_after_s=1.0)
    asyncio.get_running_loop().call_later(0.2, lambda: setattr(function, "refusal", None))
    batch = await run_batch(sdk, CHAT, lines_of(CHAT, {"model": "tiny", "messages": MESSAGES}))
    assert batch.request_counts is not None
    assert (batch.status, batch.request_counts.failed) == ("completed", 0)


async def test_list_is_cut_into_pages(sdk: openai.AsyncOpenAI) -> None:
    content = lines_of(CHAT, {"model": "tiny", "messages": MESSAGES})
    made = [(await run_batch(sdk, CHAT, content)).id for _ in range(5)]
    listed = [batch.id async for batch in sdk.batches.list(limit=2)]
    assert listed == made[::-1]
    with pytest.raises(openai.NotFoundError):
        await sdk.batches.list(after="batch_0")
    with pytest.raises(openai.NotFoundError):
        await sdk.batches.retrieve("batch_0")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": "0s"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"input_file_ids": "x"}, "input_file_ids"),
        ({"output_expires_after": {"seconds": 1}}, "output_expires_after"),
    ],
)
async def test_bad_field_is_named(
    client: httpx.AsyncClient, changes: dict[str, Any], param: str
) -> None:
    body = {"input_file_id": "file-0", "endpoint": CHAT, "completion_window": "24h"}
    response = await client.post("/v1/batches", json=body | changes)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_file_that_is_not_there_is_404(client: httpx.AsyncClient) -> None:
    body = {"input_file_id": "file-0", "endpoint": CHAT, "completion_window": "24h"}
    response = await client.post("/v1/batches", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (404, "file_id")


KEY = ApiKey(id="k", name="k", key_hash=hash_key("sk-k"))


@pytest.mark.parametrize("key_store", [FakeKeyStore(KEY)])
async def test_requests_of_a_key_that_was_revoked_are_refused(
    sdk: openai.AsyncOpenAI, key_store: FakeKeyStore, function: FakeFunction
) -> None:
    sdk = sdk.with_options(api_key="sk-k")
    function.tier = "parked"
    content = lines_of(CHAT, {"model": "tiny", "messages": MESSAGES})
    file = await sdk.files.create(file=content, purpose="batch")
    made = await sdk.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    key_store.keys[KEY.key_hash] = dataclasses.replace(KEY, is_revoked=True)
    function.tier = "ready"
    await asyncio.sleep(0.5)
    key_store.keys[KEY.key_hash] = KEY
    batch = await ended(sdk, made.id)
    failed = (await answers_of(sdk, batch.error_file_id))["id-0"]["response"]
    assert (failed["status_code"], failed["body"]["error"]["code"]) == (401, "invalid_api_key")
    assert function.generations == []
