"""Asynchronous requests through HTTP, over a function that plays a script."""

import asyncio
from typing import Any

import httpx
import openai
import pytest

from tests.fakes.function import FakeFunction

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


async def ended(client: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while True:
            request: dict[str, Any] = (await client.get(f"/v1/requests/{request_id}")).json()
            if request["status"] != "in_progress":
                return request
            await asyncio.sleep(0.02)


async def test_accepted_request_is_answered_as_the_endpoint_answers(
    client: httpx.AsyncClient,
) -> None:
    accepted = await client.post("/v1/requests", json={"endpoint": CHAT, "body": BODY})
    made = accepted.json()
    assert accepted.status_code == 202
    assert accepted.headers["location"] == f"/v1/requests/{made['id']}"
    assert (made["status"], made["response"], made["webhook"]) == ("in_progress", None, None)
    done = await ended(client, made["id"])
    single = (await client.post(CHAT, json=BODY)).json()
    assert done["status"] == "completed"
    assert done["response"]["status_code"] == 200
    assert done["response"]["body"]["choices"] == single["choices"]
    (listed,) = (await client.get("/v1/requests")).json()["data"]
    assert listed == done | {"response": {"status_code": 200, "body": None}}
    gone = await client.delete(f"/v1/requests/{made['id']}")
    assert gone.json() == {"id": made["id"], "object": "async_request", "deleted": True}
    assert (await client.get(f"/v1/requests/{made['id']}")).status_code == 404


async def test_bad_body_is_told_in_the_answer(client: httpx.AsyncClient) -> None:
    body = {"endpoint": CHAT, "body": {"model": "tiny"}}
    accepted = await client.post("/v1/requests", json=body)
    assert accepted.status_code == 202, accepted.text
    done = await ended(client, accepted.json()["id"])
    assert (done["status"], done["response"]["status_code"]) == ("failed", 400), done
    assert done["response"]["body"]["error"]["param"] == "messages"


async def test_cancelled(client: httpx.AsyncClient, function: FakeFunction) -> None:
    function.script = lambda request: [asyncio.Event()]
    made = (await client.post("/v1/requests", json={"endpoint": CHAT, "body": BODY})).json()
    await function.entered.wait()
    answer = await client.post(f"/v1/requests/{made['id']}/cancel")
    assert answer.json()["status"] == "cancelled"
    assert function.num_running == 0


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"endpoint": "/v1/models"}, 400, "endpoint"),
        ({"endpoint": "http://169.254.169.254/"}, 400, "endpoint"),
        ({"body": {}}, 400, "body.model"),
        ({"body": {**BODY, "stream": True}}, 400, "body.stream"),
        ({"body": {**BODY, "background": True}}, 400, "body.background"),
        ({"body": {**BODY, "model": "other"}}, 404, "model"),
        ({"timeout_s": 0}, 400, "timeout_s"),
        ({"timeout_s": 1e9}, 400, "timeout_s"),
        ({"webhook_url": "https://hooks.example.com/"}, 400, "webhook_url"),
        ({"webhook_url": "file:///etc/passwd"}, 400, "webhook_url"),
        ({"webhook_urll": "https://hooks.example.com/"}, 400, "webhook_urll"),
        ({"metadata": {"k": "v" * 513}}, 400, "metadata"),
    ],
)
async def test_bad_field_is_named(
    client: httpx.AsyncClient, changes: dict[str, Any], status: int, param: str
) -> None:
    response = await client.post("/v1/requests", json={"endpoint": CHAT, "body": BODY} | changes)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_secret_is_in_the_form_that_libraries_take(client: httpx.AsyncClient) -> None:
    secret = (await client.get("/v1/webhook_secret")).json()["secret"]
    assert secret.startswith("whsec_")
    assert (await client.get("/v1/webhook_secret")).json()["secret"] == secret


async def test_sdk_reaches_them_by_its_raw_calls(sdk: openai.AsyncOpenAI) -> None:
    made = await sdk.post("/requests", cast_to=object, body={"endpoint": CHAT, "body": BODY})
    assert isinstance(made, dict)
    found = await sdk.get(f"/requests/{made['id']}", cast_to=object)
    assert isinstance(found, dict)
    assert found["id"] == made["id"]
    with pytest.raises(openai.NotFoundError):
        await sdk.get("/requests/req_0", cast_to=object)
