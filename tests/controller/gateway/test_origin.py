import pytest

from controller.gateway.auth import ApiKey, hash_key
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.asgi import AsgiCall
from tests.fakes.function import FakeFunction

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
CHAT = "/v1/chat/completions"
KEY = ApiKey(id="k", name="k", key_hash=hash_key("sk-good"))
GOOD_KEY = {"authorization": "Bearer sk-good"}


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "127.0.0.1",
        "127.0.0.1:8000",
        "127.8.9.1",
        "[::1]",
        "[::1]:8000",
    ],
)
async def test_names_of_this_machine_are_served(make_app: AppMaker, host: str) -> None:
    async with client_of(make_app()) as client:
        response = await client.post(CHAT, json=HELLO, headers={"host": host})
    assert response.status_code == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "10.0.0.1", "[", ""],
)
async def test_a_page_that_renames_itself_to_loopback_is_refused(
    make_app: AppMaker, function: FakeFunction, host: str, method: str
) -> None:
    async with client_of(make_app()) as client:
        response = await client.request(method, CHAT, json=HELLO, headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "forbidden"
    assert "x-request-id" in response.headers
    assert function.generations == []


async def test_any_name_is_served_where_keys_are_required(make_app: AppMaker) -> None:
    async with client_of(make_app(keys=(KEY,), require_api_keys=True)) as client:
        headers = {"host": "llm.example", **GOOD_KEY}
        response = await client.post(CHAT, json=HELLO, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("has_keys", [False, True])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "http://localhost:8000"},
    ],
)
async def test_what_another_page_sends_is_refused_unread(
    make_app: AppMaker, headers: dict[str, str], has_keys: bool
) -> None:
    app = make_app(keys=(KEY,), require_api_keys=has_keys)
    sent = {"host": "localhost:8000", **GOOD_KEY, **headers}
    call = AsgiCall(app, CHAT, [b"{}"], headers=sent)
    await call.finished()
    assert call.status == 403
    assert call.num_received == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://localhost:8000"},
        {"origin": "https://localhost:8000"},
        {"sec-fetch-site": "same-origin", "origin": "https://behind.a.proxy"},
        {"sec-fetch-site": "none"},
    ],
)
async def test_what_our_own_pages_send_is_served(
    make_app: AppMaker, headers: dict[str, str]
) -> None:
    async with client_of(make_app()) as client:
        sent = {"host": "localhost:8000", **headers}
        assert (await client.post(CHAT, json=HELLO, headers=sent)).status_code == 200


async def test_links_from_other_pages_may_be_followed(make_app: AppMaker) -> None:
    async with client_of(make_app()) as client:
        headers = {"sec-fetch-site": "cross-site", "origin": "https://search.example"}
        assert (await client.get("/healthz", headers=headers)).status_code == 200
