import base64
from datetime import UTC, datetime, timedelta

import pytest

from controller.gateway.auth import ApiKey, hash_key
from tests.controller.gateway.conftest import AppMaker, client_of
from tests.fakes.asgi import AsgiCall
from tests.fakes.function import FakeFunction

SECRET = "sk-good"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
NOW = datetime.now(UTC)


def key(secret: str, **fields: object) -> ApiKey:
    known = {"id": f"id-{secret}", "name": f"name-{secret}", "key_hash": hash_key(secret)}
    return ApiKey(**{**known, **fields})  # type: ignore[arg-type]  # fields of the key


def basic(secret: str) -> str:
    return "Basic " + base64.b64encode(f"anybody:{secret}".encode()).decode()


KEYS = (
    key(SECRET, expires_at=NOW + timedelta(hours=1)),
    key("sk-old", expires_at=NOW - timedelta(seconds=1)),
    key("sk-revoked", is_revoked=True),
)


async def test_good_key_is_let_through_and_pays(make_app: AppMaker, function: FakeFunction) -> None:
    async with client_of(make_app(keys=KEYS, require_api_keys=True)) as client:
        headers = {"authorization": f"Bearer {SECRET}"}
        response = await client.post("/v1/chat/completions", json=HELLO, headers=headers)
    assert response.status_code == 200
    assert function.generations[0].request.key_id == "id-sk-good"


async def test_a_browser_may_send_the_key_as_its_password(make_app: AppMaker) -> None:
    async with client_of(make_app(keys=KEYS, require_api_keys=True)) as client:
        response = await client.get("/metrics", headers={"authorization": basic(SECRET)})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("authorization", "hint"),
    [
        (None, "no API key"),
        ("", "no API key"),
        ("Bearer", "no API key"),
        ("Bearer ", "no API key"),
        (f"Basic {SECRET}", "no API key"),
        ("Basic bm9ib2R5Og==", "no API key"),
        (basic("sk-guess"), "not known"),
        ("Bearer sk-guess", "not known"),
        (f"Bearer {hash_key(SECRET)}", "not known"),
        ("Bearer sk-old", "expired"),
        ("Bearer sk-revoked", "revoked"),
    ],
)
async def test_bad_key_is_401_with_the_reason(
    make_app: AppMaker, function: FakeFunction, authorization: str | None, hint: str
) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    async with client_of(make_app(keys=KEYS, require_api_keys=True)) as client:
        for path in ("/v1/chat/completions", "/v1/nothing"):
            response = await client.post(path, json=HELLO, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"].startswith("Bearer, Basic ")
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert hint in response.json()["error"]["message"]
            assert "x-request-id" in response.headers
    assert function.generations == []


async def test_body_of_a_stranger_is_not_read(make_app: AppMaker) -> None:
    call = AsgiCall(make_app(require_api_keys=True), "/v1/chat/completions", [b"x"] * 9)
    await call.finished()
    assert call.status == 401
    assert call.num_received == 0


async def test_probes_need_no_key_but_figures_do(make_app: AppMaker) -> None:
    async with client_of(make_app(keys=KEYS, require_api_keys=True)) as client:
        assert (await client.get("/healthz")).status_code == 200
        for path in ("/readyz", "/health", "/ping"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/metrics")).status_code == 401


async def test_keys_are_not_looked_at_where_they_are_not_required(
    make_app: AppMaker, function: FakeFunction
) -> None:
    async with client_of(make_app(keys=KEYS)) as client:
        headers = {"authorization": "Bearer sk-guess"}
        response = await client.post("/v1/chat/completions", json=HELLO, headers=headers)
    assert response.status_code == 200
    assert function.generations[0].request.key_id is None
