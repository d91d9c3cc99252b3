import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import httpx
import openai
import pytest
from fastapi import FastAPI

from controller.batches.files import FileStore
from controller.clock import SystemClock
from controller.errors import Conflict
from controller.gateway.app import create_app
from controller.gateway.auth import ApiKey, hash_key
from controller.gateway.routes.files import files_router
from controller.metrics import Metrics
from controller.settings import Settings
from controller.store.database import Database
from tests.controller.gateway.conftest import FakeKeyStore, client_of
from tests.fakes.asgi import AsgiCall
from tests.fakes.clock import FakeClock
from tests.fakes.function import FakeRegistry

CONTENT = b'{"custom_id": "1"}\n' * 1000
FORM = {"purpose": "batch"}


class Users:
    """Says that some files are in use."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def check_unused(self, file_id: str) -> None:
        if file_id in self.used:
            raise Conflict("in use")


@pytest.fixture
def users() -> Users:
    return Users()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
async def store(tmp_path: Path, directory: Path) -> AsyncIterator[FileStore]:
    database = Database.open(f"sqlite:///{tmp_path / 'coldspark.db'}")
    yield FileStore(
        directory, database, FakeClock(), max_file_bytes=1 << 20, max_total_bytes=3 << 20
    )
    database.close()


Maker = Callable[..., FastAPI]


@pytest.fixture
def make(store: FileStore, users: Users) -> Maker:
    def app(*keys: ApiKey, **changes: object) -> FastAPI:
        settings = Settings.model_validate({"require_api_keys": bool(keys)} | changes)
        clock = SystemClock()
        return create_app(
            FakeRegistry(),
            FakeKeyStore(*keys),
            settings,
            clock,
            metrics=Metrics(),
            extra_routers=[files_router(store, users, settings, FakeClock())],
        )

    return app


@pytest.fixture
async def client(make: Maker) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make()) as client:
        yield client


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


async def upload(
    client: httpx.AsyncClient,
    content: bytes = CONTENT,
    form: Mapping[str, str] = MappingProxyType({}),
) -> httpx.Response:
    return await client.post(
        "/v1/files", data={**FORM, **form}, files={"file": ("input.jsonl", content)}
    )


async def test_file_comes_back_as_it_was_sent(client: httpx.AsyncClient) -> None:
    made = (await upload(client)).json()
    assert re.fullmatch(r"file-[0-9a-f]{24}", made["id"])
    assert made == {
        "id": made["id"],
        "object": "file",
        "bytes": len(CONTENT),
        "created_at": made["created_at"],
        "expires_at": None,
        "filename": "input.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert (await client.get(f"/v1/files/{made['id']}")).json() == made
    content = await client.get(f"/v1/files/{made['id']}/content")
    assert content.content == CONTENT
    assert content.headers["content-type"] == "application/octet-stream"


async def test_deleted_file_is_gone_from_disk_too(
    client: httpx.AsyncClient, directory: Path, users: Users
) -> None:
    file_id = (await upload(client)).json()["id"]
    users.used.add(file_id)
    assert (await client.delete(f"/v1/files/{file_id}")).status_code == 409
    users.used.clear()
    answer = await client.delete(f"/v1/files/{file_id}")
    assert answer.json() == {"id": file_id, "object": "file", "deleted": True}
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        gone = await client.get(path)
        assert (gone.status_code, gone.json()["error"]["param"]) == (404, "file_id")
    assert names(directory) == []


async def test_content_that_is_gone_is_404(client: httpx.AsyncClient, directory: Path) -> None:
    file_id = (await upload(client)).json()["id"]
    (directory / file_id).unlink()
    assert (await client.get(f"/v1/files/{file_id}/content")).status_code == 404


async def test_list_is_cut_into_pages(client: httpx.AsyncClient) -> None:
    ids = {(await upload(client)).json()["id"] for _ in range(5)}
    for order in ("asc", "desc"):
        seen: list[str] = []
        more = True
        while more:
            after = {"after": seen[-1]} if seen else {}
            params = {"limit": "2", "order": order, **after}
            page = (await client.get("/v1/files", params=params)).json()
            seen += [file["id"] for file in page["data"]]
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], seen[-1])
            more = page["has_more"]
        assert len(seen) == 5
        assert set(seen) == ids
    assert (await client.get("/v1/files", params={"purpose": "user_data"})).json()["data"] == []
    assert (await client.get("/v1/files", params={"after": "file-0"})).status_code == 404
    assert (await client.get("/v1/files", params={"limit": 0})).status_code == 400


async def test_file_over_a_limit_leaves_nothing(client: httpx.AsyncClient, directory: Path) -> None:
    response = await upload(client, b"x" * ((1 << 20) + 1))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert response.headers["connection"] == "close"
    assert names(directory) == []
    for _ in range(3):
        assert (await upload(client, b"x" * (1 << 20))).status_code == 200
    full = await upload(client, b"x")
    assert full.status_code == 413
    assert "delete some" in full.json()["error"]["message"]


async def test_upload_is_not_bound_by_the_limit_of_bodies(make: Maker) -> None:
    async with client_of(make(max_body_bytes=2048)) as client:
        assert (await upload(client)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "body", "words"),
    [
        ({"content-type": "application/json"}, b"{}", "multipart/form-data"),
        ({"content-type": "multipart/form-data"}, b"", "boundary"),
        ({"content-type": "multipart/form-data; boundary=x"}, b"", "cut off"),
        ({"content-type": "multipart/form-data; boundary=x"}, b"garbage", "cannot be read"),
        (
            {"content-type": "multipart/form-data; boundary=x"},
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf',
            "cut off",
        ),
        (
            {"content-type": "multipart/form-data; boundary=x", "content-encoding": "gzip"},
            b"",
            "uncompressed",
        ),
        (
            {"content-type": "multipart/form-data; boundary=x"},
            b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n",
            "no name",
        ),
    ],
)
async def test_body_that_is_no_such_form_is_400(
    client: httpx.AsyncClient, directory: Path, headers: dict[str, str], body: bytes, words: str
) -> None:
    response = await client.post("/v1/files", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]
    assert names(directory) == []


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({"extra": "1"}, "extra"),
        ({"expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after"),
        ({"expires_after[anchor]": "created_at"}, "expires_after"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "9"}, "expires_after"),
    ],
)
async def test_bad_field_is_named(
    client: httpx.AsyncClient, directory: Path, form: dict[str, str], param: str
) -> None:
    response = await upload(client, form=form)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert names(directory) == []


async def test_form_without_a_file_is_400(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/files", files={"purpose": (None, "batch")})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "file")


async def test_client_that_leaves_in_the_middle_leaves_nothing(
    make: Maker, directory: Path
) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    begun = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"y" * 9999
    )
    call = AsgiCall(make(), "/v1/files", [begun], headers=headers, is_complete=False)
    for _ in range(500):
        if names(directory):
            break
        await asyncio.sleep(0.01)
    assert names(directory) != []
    call.leave()
    await call.finished()
    assert call.messages == []
    assert names(directory) == []


async def test_silent_client_is_408(make: Maker, directory: Path) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    app = make(body_timeout_s=0.05)
    call = AsgiCall(app, "/v1/files", [b"--x\r\n"], headers=headers, is_complete=False)
    await call.finished()
    assert call.status == 408
    assert names(directory) == []


async def test_files_are_their_keys_own(make: Maker) -> None:
    keys = [ApiKey(id=name, name=name, key_hash=hash_key(f"sk-{name}")) for name in "ab"]
    async with client_of(make(*keys)) as client:
        client.headers["authorization"] = "Bearer sk-a"
        file_id = (await upload(client)).json()["id"]
        client.headers["authorization"] = "Bearer sk-b"
        assert (await client.get(f"/v1/files/{file_id}")).status_code == 404
        assert (await client.delete(f"/v1/files/{file_id}")).status_code == 404
        assert (await client.get("/v1/files")).json()["data"] == []


async def test_what_expired_or_was_never_finished_is_swept_away(
    client: httpx.AsyncClient, store: FileStore, directory: Path
) -> None:
    expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    made = (await upload(client, form=expiry)).json()
    assert made["expires_at"] == made["created_at"] + 3600
    kept = (await upload(client)).json()["id"]
    (directory / "file-0123.part").write_bytes(b"of a controller that was killed")
    await store.clear_up()
    clock = store._clock
    assert isinstance(clock, FakeClock)
    clock.advance(3601)
    assert (await client.get(f"/v1/files/{made['id']}")).status_code == 404
    await store.sweep()
    assert names(directory) == [kept]


async def test_sdk_drives_every_endpoint(client: httpx.AsyncClient) -> None:
    sdk = openai.AsyncOpenAI(
        api_key="unused",
        base_url="http://localhost/v1",
        http_client=client,  # type: ignore[arg-type]  # it takes any httpx
        max_retries=0,
    )
    made = await sdk.files.create(
        file=("in.jsonl", CONTENT),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert (made.bytes, made.status) == (len(CONTENT), "processed")
    assert (await sdk.files.retrieve(made.id)).filename == "in.jsonl"
    assert (await sdk.files.content(made.id)).content == CONTENT
    for _ in range(3):
        await sdk.files.create(file=b"1", purpose="user_data")
    assert len([file async for file in sdk.files.list(limit=2)]) == 4
    assert (await sdk.files.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await sdk.files.retrieve(made.id)


async def test_uploads_at_once_do_not_mix(client: httpx.AsyncClient) -> None:
    contents = [bytes([65 + number]) * 300_000 for number in range(8)]
    made = await asyncio.gather(*(upload(client, content) for content in contents))
    for response, content in zip(made, contents, strict=True):
        got = await client.get(f"/v1/files/{response.json()['id']}/content")
        assert got.content == content
