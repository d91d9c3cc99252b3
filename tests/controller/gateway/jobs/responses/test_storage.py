"""Responses that are kept, and conversations that go on from them."""

import httpx
import openai
import pytest
from structlog.testing import capture_logs

from controller.gateway.auth import ApiKey, hash_key
from controller.gateway.response_api import beginning
from controller.store.errors import DatabaseUnavailable
from controller.store.responses import Responses
from tests.controller.gateway.conftest import FakeKeyStore
from tests.controller.gateway.jobs.responses.helpers import (
    HELLO,
    PATH,
    post,
)
from tests.controller.gateway.test_tools import Speaker


async def test_kept_response_is_found_until_it_is_deleted(sdk: openai.AsyncOpenAI) -> None:
    made = await sdk.responses.create(model="tiny", input="hello")
    assert await sdk.responses.retrieve(made.id) == made
    items = await sdk.responses.input_items.list(made.id)
    (item,) = items.data
    assert item.type == "message"
    assert item.to_dict()["content"] == [{"type": "input_text", "text": "hello"}]
    await sdk.responses.delete(made.id)
    for call in (sdk.responses.retrieve, sdk.responses.delete):
        with pytest.raises(openai.NotFoundError, match="there is no response"):
            await call(made.id)


async def test_conversation_goes_on_from_a_kept_response(
    sdk: openai.AsyncOpenAI, function: Speaker
) -> None:
    first = await sdk.responses.create(model="tiny", input="hello", instructions="Be brief.")
    second = await sdk.responses.create(
        model="tiny", input="and then?", previous_response_id=first.id
    )
    assert second.previous_response_id == first.id
    assert function.prompt == (
        "<|im_start|>user\nhello<|im_end|>\n"
        f"<|im_start|>assistant\n{function.text}<|im_end|>\n"
        "<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
    )
    await sdk.responses.delete(first.id)
    third = await sdk.responses.create(model="tiny", input="so?", previous_response_id=second.id)
    assert "<|im_start|>user\nhello<|im_end|>" in function.prompt
    listed = [item.to_dict() async for item in sdk.responses.input_items.list(third.id, limit=2)]
    said = [item["content"][0]["text"] for item in listed]  # type: ignore[index]
    assert said == ["so?", function.text, "and then?", function.text, "hello"]
    assert listed[1]["id"] == second.output[0].id
    page = await sdk.responses.input_items.list(third.id, order="asc", limit=1)
    assert (page.data[0].to_dict(), page.has_more) == (listed[-1], True)
    with pytest.raises(openai.NotFoundError, match="no item"):
        await sdk.responses.input_items.list(third.id, after="msg_0")


async def test_response_is_not_kept_if_that_is_asked(sdk: openai.AsyncOpenAI) -> None:
    made = await sdk.responses.create(model="tiny", input="hello", store=False)
    assert made.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.responses.create(model="tiny", input="x", previous_response_id=made.id)
    assert caught.value.param == "previous_response_id"
    assert caught.value.code == "previous_response_not_found"


class TestKeys:
    """Two callers."""

    @pytest.fixture
    def key_store(self) -> FakeKeyStore:
        keys = (ApiKey(id=one, name=one, key_hash=hash_key(f"sk-{one}")) for one in "ab")
        return FakeKeyStore(*keys)

    async def test_response_is_its_keys_alone(self, sdk: openai.AsyncOpenAI) -> None:
        hers, his = sdk.with_options(api_key="sk-a"), sdk.with_options(api_key="sk-b")
        made = await hers.responses.create(model="tiny", input="hello")
        for call in (his.responses.retrieve, his.responses.delete, his.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                await call(made.id)
        with pytest.raises(openai.BadRequestError, match="there is no response"):
            await his.responses.create(model="tiny", input="x", previous_response_id=made.id)
        assert (await hers.responses.retrieve(made.id)).id == made.id


async def test_answer_says_that_it_could_not_be_kept(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise DatabaseUnavailable("its disk is full")

    monkeypatch.setattr(Responses, "put", away)
    with capture_logs() as logs:
        response = await post(client)
    assert (response["status"], response["store"]) == ("completed", False)
    assert [entry["event"] for entry in logs] == ["response not kept"]


async def test_conversation_that_has_become_too_long_is_refused(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await post(client)
    monkeypatch.setattr(beginning, "MAX_MESSAGES", 2)
    answer = await client.post(PATH, json={**HELLO, "previous_response_id": first["id"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "previous_response_id")


async def test_ids_of_a_conversation_are_its_own(client: httpx.AsyncClient) -> None:
    first = await post(client, input=[{"role": "user", "content": "x", "id": "msg_1"}])
    again = [*first["output"], {"role": "user", "content": "y", "id": "msg_1"}]
    second = await post(client, input=again, previous_response_id=first["id"])
    listed = (await client.get(f"{PATH}/{second['id']}/input_items?order=asc")).json()
    ids = [item["id"] for item in listed["data"]]
    assert len(set(ids)) == len(ids) == 4
    assert ids[:2] == ["msg_1", first["output"][0]["id"]]
    assert [one.partition("_")[0] for one in ids] == ["msg"] * 4
