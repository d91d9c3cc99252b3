"""Asynchronous requests and their webhooks, to a receiver on loopback, on a fake clock."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from controller.errors import Conflict, InvalidRequest, ModelNotFound, NotFound, QueueFull
from controller.requests.sender import Sender
from controller.requests.service import RequestNode, RequestService
from controller.requests.webhook import RETRY_AFTER_S, next_attempt_s, secret_of
from controller.store.errors import DatabaseUnavailable
from controller.store.requests import StoredRequest
from functions.spec import FunctionSpec
from tests.fakes.batches import CHAT, BatchWorld

BODY = {"model": "tiny", "content": "hello"}


class Receiver:
    """An HTTP server that keeps what it is sent and answers as it is told."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.headers = ""
        self.url = ""

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hooks/"
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        body = await reader.readexactly(int(headers["content-length"]))
        # Header values as they were: signatures are case-sensitive.
        exact = dict(line.split(": ", 1) for line in lines if line)
        headers = {name.lower(): value for name, value in exact.items()}
        self.messages.append((first, headers, body))
        status = self.statuses.pop(0) if self.statuses else 204
        if status == 0:  # silence, until the client gives up
            await reader.read()
            writer.close()
            return
        reply = (
            f"HTTP/1.1 {status} x\r\n{self.headers}content-length: 0\r\nconnection: close\r\n\r\n"
        )
        writer.write(reply.encode())
        await writer.drain()
        writer.close()


class RequestWorld(BatchWorld):
    """Asynchronous requests of one controller after another."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.receiver = Receiver()
        self.requests = self.new_requests()

    def new_requests(self) -> RequestService:
        return RequestService(
            RequestNode(
                database=self.database,
                registry=self.registry,
                clock=self.clock,
                call=self.caller,
                secret=b"s" * 32,
                sender=Sender(timeout_s=0.5),
            )
        )

    def allow(self, *urls: str, private: bool = True) -> None:
        webhooks = {"allow": urls, "allow_private_addresses": private}
        self.function.spec = FunctionSpec.model_validate(
            {"name": "tiny", "model": {"source": "/nowhere"}, "webhooks": webhooks}
        )

    async def ask(self, **changes: Any) -> StoredRequest:
        options: dict[str, Any] = {
            "key_id": None,
            "endpoint": CHAT,
            "body": BODY,
            "timeout_s": 3600.0,
            "webhook_url": None,
            "metadata": None,
        }
        return await self.requests.create(**options | changes)

    async def when(
        self, request_id: str, condition: Callable[[StoredRequest], Any]
    ) -> StoredRequest:
        request = None
        for _ in range(1000):
            request = await self.requests.get(request_id, key_id=None)
            if condition(request):
                return request
            await self.requests.look()
            await asyncio.sleep(0.005)
        raise AssertionError(f"the request stays {request}")

    async def restart_requests(self) -> None:
        await self.requests.stop()
        self.requests = self.new_requests()
        await self.requests.start()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[RequestWorld]:
    world = RequestWorld(tmp_path)
    server = await world.receiver.start()
    yield world
    await world.requests.stop()
    server.close()
    await world.close()


async def test_answer_can_be_fetched(world: RequestWorld) -> None:
    made = await world.ask(metadata={"for": "tests"})
    assert (made.status, made.answer_status) == ("in_progress", None)
    done = await world.when(made.id, lambda request: request.ended_us)
    assert (done.status, done.answer_status) == ("completed", 200)
    assert json.loads(done.answer or b"") == {"echo": "hello"}
    (call,) = world.caller.calls
    assert (call.path, call.may_wake, call.request_id) == (CHAT, True, made.id)


async def test_refusal_is_an_answer_too(world: RequestWorld) -> None:
    world.caller.script = lambda content: 400
    done = await world.when((await world.ask()).id, lambda request: request.ended_us)
    assert (done.status, done.answer_status) == ("failed", 400)


async def test_passing_failures_are_asked_again(
    world: RequestWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.requests.service.FIRST_PAUSE_S", 0.001)
    statuses = [503, 429, 502, 504, 200]
    world.caller.script = lambda content: statuses.pop(0)
    done = await world.when((await world.ask()).id, lambda request: request.ended_us)
    assert done.answer_status == 200
    assert len(world.caller.calls) == 5


async def test_request_that_kills_replicas_is_given_up(
    world: RequestWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.requests.service.FIRST_PAUSE_S", 0.001)
    world.caller.script = lambda content: 502
    done = await world.when((await world.ask()).id, lambda request: request.ended_us)
    assert (done.answer_status, len(world.caller.calls)) == (502, 3)


async def test_time_that_runs_out_is_an_answer(world: RequestWorld) -> None:
    world.caller.script = lambda content: asyncio.Event()
    done = await world.when((await world.ask(timeout_s=0.05)).id, lambda request: request.ended_us)
    assert (done.status, done.answer_status) == ("failed", 504)
    assert json.loads(done.answer or b"")["error"]["code"] == "activation_timeout"
    assert world.caller.num_running == 0


async def test_webhook_is_signed_as_the_sdk_verifies_it(world: RequestWorld) -> None:
    world.allow(world.receiver.url)
    made = await world.ask(webhook_url=f"{world.receiver.url}a?b=c", metadata={"for": "tests"})
    done = await world.when(made.id, lambda request: request.webhook_status == "delivered")
    assert (done.webhook_attempts, done.webhook_error) == (1, None)
    ((first, headers, body),) = world.receiver.messages
    assert first == "POST /hooks/a?b=c HTTP/1.1"
    sdk = openai.OpenAI(api_key="unused")
    secret = world.requests.secret(None)
    seconds = int(world.clock.now().timestamp())
    assert headers["webhook-timestamp"] == str(seconds)
    verify = sdk.webhooks.verify_signature
    verify(body, headers, secret=secret, tolerance=1 << 40)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        verify(body + b" ", headers, secret=secret, tolerance=1 << 40)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        verify(body, headers, secret=secret_of(b"s" * 32, "other"), tolerance=1 << 40)
    content = json.loads(body)
    assert content["type"] == "async_request.completed"
    assert content["data"]["id"] == made.id
    assert content["data"]["response"] == {"status_code": 200, "body": {"echo": "hello"}}
    assert content["data"]["metadata"] == {"for": "tests"}


async def test_failed_deliveries_are_tried_again_later_under_the_same_id(
    world: RequestWorld,
) -> None:
    world.allow(world.receiver.url)
    world.receiver.statuses = [500, 302, 0]
    world.receiver.headers = f"location: {world.receiver.url}elsewhere\r\n"
    made = await world.ask(webhook_url=world.receiver.url)
    for attempt, wait_s in enumerate(RETRY_AFTER_S[:3], start=1):
        failed = await world.when(made.id, lambda r, n=attempt: r.webhook_attempts == n)  # type: ignore[misc]
        assert failed.webhook_status == "pending"
        world.clock.advance(wait_s - 1)
        for _ in range(5):
            await world.requests.look()
            await asyncio.sleep(0.005)
        assert len(world.receiver.messages) == attempt, "too early"
        world.clock.advance(1)
    done = await world.when(made.id, lambda request: request.webhook_status == "delivered")
    assert done.webhook_attempts == 4
    assert len({headers["webhook-id"] for _, headers, _ in world.receiver.messages}) == 1
    assert len({body for _, _, body in world.receiver.messages}) == 1
    assert all("elsewhere" not in first for first, _, _ in world.receiver.messages)


async def test_delivery_is_given_up_in_the_end(world: RequestWorld) -> None:
    world.allow(world.receiver.url)
    world.receiver.statuses = [500] * 99
    made = await world.ask(webhook_url=world.receiver.url)
    await world.when(made.id, lambda request: request.webhook_attempts == 1)
    for attempt in range(2, len(RETRY_AFTER_S) + 2):
        world.clock.advance(RETRY_AFTER_S[attempt - 2])
        await world.when(made.id, lambda r, n=attempt: r.webhook_attempts == n)  # type: ignore[misc]
    done = await world.requests.get(made.id, key_id=None)
    assert (done.webhook_status, done.webhook_error) == ("failed", "answered with 500")
    assert next_attempt_s(len(RETRY_AFTER_S) + 1) is None


async def test_receiver_that_is_gone_is_left_alone(world: RequestWorld) -> None:
    world.allow(world.receiver.url)
    world.receiver.statuses = [410]
    made = await world.ask(webhook_url=world.receiver.url)
    done = await world.when(made.id, lambda request: request.webhook_attempts)
    assert done.webhook_status == "failed"


async def test_only_what_the_spec_allows_is_accepted(world: RequestWorld) -> None:
    with pytest.raises(InvalidRequest, match=r"webhooks\.allow") as caught:
        await world.ask(webhook_url=world.receiver.url)
    assert caught.value.param == "webhook_url"
    assert await world.requests.list(key_id=None, after=None, limit=9) == []


async def test_private_address_is_not_reached_unless_the_spec_says_so(world: RequestWorld) -> None:
    world.allow(world.receiver.url, private=False)
    made = await world.ask(webhook_url=world.receiver.url)
    failed = await world.when(made.id, lambda request: request.webhook_attempts)
    assert "not public" in (failed.webhook_error or "")
    assert world.receiver.messages == []


async def test_permission_that_is_withdrawn_counts_at_once(world: RequestWorld) -> None:
    world.allow(world.receiver.url)
    gate = asyncio.Event()
    world.caller.script = lambda content: gate
    made = await world.ask(webhook_url=world.receiver.url)
    world.allow()
    gate.set()
    failed = await world.when(made.id, lambda request: request.webhook_attempts)
    assert "does not allow" in (failed.webhook_error or "")
    assert world.receiver.messages == []


async def test_restart_runs_what_has_no_answer_and_delivers_what_is_undelivered(
    world: RequestWorld,
) -> None:
    world.allow(world.receiver.url)
    gate = asyncio.Event()
    world.caller.script = lambda content: gate
    waiting = await world.ask()
    await world.when(waiting.id, lambda _: world.caller.num_running)
    await world.restart_requests()
    gate.set()
    done = await world.when(waiting.id, lambda request: request.ended_us)
    assert done.status == "completed"
    world.receiver.statuses = [500]
    told = await world.ask(webhook_url=world.receiver.url)
    await world.when(told.id, lambda request: request.webhook_attempts == 1)
    await world.restart_requests()
    world.clock.advance(5)
    await world.when(told.id, lambda request: request.webhook_status == "delivered")


async def test_cancelled_request_ends_at_once(world: RequestWorld) -> None:
    world.caller.script = lambda content: asyncio.Event()
    made = await world.ask()
    with pytest.raises(Conflict, match="under way"):
        await world.requests.delete(made.id, key_id=None)
    cancelled = await world.requests.cancel(made.id, key_id=None)
    assert cancelled.status == "cancelled"
    assert world.caller.num_running == 0
    with pytest.raises(Conflict, match="cancelled"):
        await world.requests.cancel(made.id, key_id=None)
    await world.requests.delete(made.id, key_id=None)
    with pytest.raises(NotFound):
        await world.requests.get(made.id, key_id=None)


async def test_requests_are_their_keys_own(world: RequestWorld) -> None:
    mine = await world.ask(key_id="mine")
    for call in (
        world.requests.get(mine.id, key_id="other"),
        world.requests.cancel(mine.id, key_id=None),
        world.requests.delete(mine.id, key_id="other"),
    ):
        with pytest.raises(NotFound):
            await call
    assert world.requests.secret("mine") != world.requests.secret("other")


async def test_unknown_model_and_too_many_are_refused(
    world: RequestWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelNotFound):
        await world.ask(body={"model": "other"})
    monkeypatch.setattr("controller.requests.service.MAX_LIVE", 1)
    world.caller.script = lambda content: asyncio.Event()
    await world.ask()
    with pytest.raises(QueueFull):
        await world.ask()


async def test_old_answers_are_forgotten_once_everybody_is_told(world: RequestWorld) -> None:
    world.allow(world.receiver.url)
    world.receiver.statuses = [500]
    told = await world.ask(webhook_url=world.receiver.url)
    plain = await world.ask()
    await world.when(told.id, lambda request: request.webhook_attempts == 1)
    await world.when(plain.id, lambda request: request.ended_us)
    world.clock.advance(100)
    await world.requests.prune(99)
    listed = await world.requests.list(key_id=None, after=None, limit=9)
    assert [request.id for request in listed] == [told.id]


async def test_database_that_is_away_is_waited_for(
    world: RequestWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.requests.service.STORE_PAUSE_S", 0.01)
    real, left = world.database.run, 3

    async def sometimes(work: Any, *args: Any) -> Any:
        nonlocal left
        if left and world.caller.calls:
            left -= 1
            raise DatabaseUnavailable("away")
        return await real(work, *args)

    made = await world.ask()
    monkeypatch.setattr(world.database, "run", sometimes)
    for _ in range(500):
        if not left:
            break
        await asyncio.sleep(0.01)
    assert (await world.when(made.id, lambda request: request.ended_us)).status == "completed"
