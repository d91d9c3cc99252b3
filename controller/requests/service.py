"""Requests that are accepted now and answered later: run, kept, and told of by webhook.

Every request that is accepted has exactly one answer, written together with the duty to tell of
it. A controller that starts again runs those without an answer and delivers what is undelivered,
so a webhook may come twice, under the same id.
"""

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any

import structlog

from controller.batches.access import transact
from controller.batches.calls import Caller, InnerAnswer, InnerCall
from controller.batches.run import (
    DOUBTFUL,
    FIRST_PAUSE_S,
    MAX_DOUBTFUL,
    MAX_PAUSE_S,
    PASSING,
)
from controller.clock import Clock, unix_us
from controller.errors import (
    ActivationTimeout,
    ApiError,
    Conflict,
    InvalidRequest,
    NotFound,
    QueueFull,
    StoreUnavailable,
)
from controller.requests.egress import EgressRefused, Resolve, allowed_target, reachable
from controller.requests.sender import DeliveryFailed, Sender
from controller.requests.views import request_view
from controller.requests.webhook import headers_of, next_attempt_s, payload, secret_of
from controller.scaling.generation import FunctionRegistry
from controller.store.database import Database
from controller.store.errors import NotStored
from controller.store.requests import Requests, StoredRequest

log = structlog.get_logger(__name__)

PREFIX = "req_"
MAX_LIVE = 1000
MAX_TOTAL_BYTES = 512 << 20
STORE_PAUSE_S = 1.0


class RequestStatus(StrEnum):
    """Where a request is."""

    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestNode:
    """What all asynchronous requests of one controller share.

    Attributes:
        secret: What the secrets of webhooks are derived from.
        resolve: Looks a host up; None asks the system.
    """

    database: Database
    registry: FunctionRegistry
    clock: Clock
    call: Caller
    secret: bytes
    sender: Sender = field(default_factory=Sender)
    resolve: Resolve | None = None


class RequestService:
    """Every request without an answer has a task, and so has every delivery under way.

    Args:
        node: What they share.
    """

    def __init__(self, node: RequestNode) -> None:
        self._node = node
        self._running: dict[str, asyncio.Task[None]] = {}
        self._undelivered: dict[str, int] = {}  # when to try next, in microseconds
        self._delivering: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Take up what an earlier controller has left."""
        database = self._node.database
        live = await database.run(lambda c: Requests(c).in_status({RequestStatus.IN_PROGRESS}))
        for request in reversed(live):  # the oldest first
            self._begin(request)
        for request in await database.run(lambda c: Requests(c).undelivered()):
            self._undelivered[request.id] = request.webhook_next_us or 0

    async def stop(self) -> None:
        """Stop all work; the next start goes on with it."""
        tasks = [*self._running.values(), *self._delivering.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def look(self) -> None:
        """Begin deliveries that are due; called on a tick."""
        now_us = self._now_us()
        for request_id, next_us in list(self._undelivered.items()):
            if request_id not in self._delivering and next_us <= now_us:
                task = _task(self._deliver(request_id), f"deliver {request_id}")
                self._delivering[request_id] = task
                task.add_done_callback(partial(self._attempt_over, request_id))

    def _attempt_over(self, request_id: str, _task: asyncio.Task[None]) -> None:
        del self._delivering[request_id]

    def secret(self, key_id: str | None) -> str:
        """Return the secret that a key's webhooks are signed with."""
        return secret_of(self._node.secret, key_id)

    async def create(
        self,
        *,
        key_id: str | None,
        endpoint: str,
        body: Mapping[str, Any],
        timeout_s: float,
        webhook_url: str | None,
        metadata: Mapping[str, str] | None,
        request_id: str | None = None,
    ) -> StoredRequest:
        """Accept a request.

        Args:
            key_id: Whose it is.
            endpoint: What is to answer it.
            body: What that is asked.
            timeout_s: Seconds until it has failed.
            webhook_url: Told of the answer; None if nobody is.
            metadata: Shown with it.
            request_id: A new id; None makes one.

        Raises:
            ModelNotFound: No function serves its model.
            InvalidRequest: The function's spec does not allow the webhook.
            QueueFull: Too many requests are under way or too much is kept.
        """
        model = str(body["model"])
        if webhook_url is not None:
            self._check_webhook(model, webhook_url)
        else:
            self._node.registry.resolve(model)
        kept = await transact(self._node.database, lambda c: Requests(c).total_bytes())
        if len(self._running) >= MAX_LIVE or kept >= MAX_TOTAL_BYTES:
            raise QueueFull(
                f"{len(self._running)} asynchronous requests are under way and {kept} bytes of "
                "them are kept; retry later, or delete some",
                retry_after_s=10.0,
            )
        now_us = self._now_us()
        request = StoredRequest(
            id=request_id or PREFIX + secrets.token_hex(12),
            key_id=key_id,
            endpoint=endpoint,
            model=model,
            body=json.dumps(body).encode(),
            metadata_=metadata,
            status=RequestStatus.IN_PROGRESS,
            created_us=now_us,
            expires_us=now_us + int(timeout_s * 1e6),
            webhook_url=webhook_url,
        )
        await transact(self._node.database, lambda c: Requests(c).add(request))
        self._begin(request)
        return request

    async def get(self, request_id: str, *, key_id: str | None) -> StoredRequest:
        """Return a request of a key.

        Raises:
            NotFound: There is none, or it is another key's.
        """
        try:
            request = await transact(self._node.database, lambda c: Requests(c).get(request_id))
        except NotStored as error:
            raise _no_such_request(request_id) from error
        if request.key_id != key_id:
            raise _no_such_request(request_id)
        return request

    async def list(
        self, *, key_id: str | None, after: str | None, limit: int
    ) -> Sequence[StoredRequest]:
        """Return a key's requests, newest first.

        Raises:
            NotFound: There is no request `after`.
        """
        if after is not None:
            await self.get(after, key_id=key_id)
        return await transact(
            self._node.database,
            lambda c: Requests(c).list(key_id=key_id, after=after, limit=limit),
        )

    async def cancel(self, request_id: str, *, key_id: str | None) -> StoredRequest:
        """End a request; nobody is told of it.

        Raises:
            NotFound: There is none, or it is another key's.
            Conflict: It is answered.
        """
        request = await self.get(request_id, key_id=key_id)
        running = self._running.get(request_id)
        if running is None:
            raise Conflict(f"the request {request_id!r} is {request.status}")
        running.cancel()
        await asyncio.wait([running])
        request = await self.get(request_id, key_id=key_id)
        if request.webhook_status == "pending":  # the answer was faster
            self._undelivered[request.id] = 0
        elif request.status == RequestStatus.IN_PROGRESS:
            request = replace(request, status=RequestStatus.CANCELLED, ended_us=self._now_us())
            await transact(self._node.database, lambda c: Requests(c).put(request))
        return request

    async def delete(self, request_id: str, *, key_id: str | None) -> None:
        """Forget a request and its answer.

        Raises:
            NotFound: There is none, or it is another key's.
            Conflict: It is not answered yet.
        """
        await self.get(request_id, key_id=key_id)
        if request_id in self._running:
            raise Conflict(f"the request {request_id!r} is under way; cancel it first")
        self._undelivered.pop(request_id, None)
        await transact(self._node.database, lambda c: Requests(c).delete(request_id))

    async def prune(self, retention_s: float) -> None:
        """Forget answers that were kept long enough."""
        before_us = self._now_us() - int(retention_s * 1e6)
        await self._node.database.run(lambda c: Requests(c).prune(before_us))

    # Answering.

    def _begin(self, request: StoredRequest) -> None:
        # Its body is read when it is needed: a thousand of them would not fit.
        task = _task(self._run(replace(request, body=b"")), f"answer {request.id}")
        self._running[request.id] = task
        task.add_done_callback(lambda _: self._running.pop(request.id))

    async def _run(self, request: StoredRequest) -> None:
        answer = await self._answer(request)
        is_good = 200 <= answer.status < 300
        request = replace(
            request,
            status=RequestStatus.COMPLETED if is_good else RequestStatus.FAILED,
            ended_us=self._now_us(),
            answer_status=answer.status,
            answer=bytes(answer.body),
            webhook_status=None if request.webhook_url is None else "pending",
        )
        await self._persistently(lambda: self._put(request))
        if request.webhook_status is not None:
            self._undelivered[request.id] = 0

    async def _answer(self, request: StoredRequest) -> InnerAnswer:
        """Ask until there is an answer that stays the same, or no time is left."""
        num_doubtful, pause_s = 0, FIRST_PAUSE_S
        while True:
            left_s = (request.expires_us - self._now_us()) / 1e6
            try:
                async with asyncio.timeout(max(left_s, 0.0)):
                    answer = await self._ask(request)
                    num_doubtful += answer.status in DOUBTFUL
                    is_final = num_doubtful >= MAX_DOUBTFUL
                    if answer.status not in PASSING | DOUBTFUL or is_final:
                        return answer
                    await asyncio.sleep(pause_s)
            except TimeoutError:
                error = ActivationTimeout(
                    f"the request {request.id!r} was not answered before its timeout"
                )
                body = bytearray(json.dumps(error.envelope()).encode())
                return InnerAnswer(error.status, body)
            pause_s = min(2.0 * pause_s, MAX_PAUSE_S)

    async def _ask(self, request: StoredRequest) -> InnerAnswer:
        try:
            stored = await self.get(request.id, key_id=request.key_id)
        except StoreUnavailable as error:
            return InnerAnswer(error.status)
        return await self._node.call(
            InnerCall(
                path=request.endpoint,
                body=stored.body,
                request_id=request.id,
                key_id=request.key_id,
                may_wake=True,
            )
        )

    # Telling.

    def _check_webhook(self, model: str, url: str) -> None:
        function = self._node.registry.resolve(model)
        try:
            allowed_target(url, function.spec.webhooks.allow)
        except EgressRefused as refused:
            raise InvalidRequest(f"webhook_url: {refused}", param="webhook_url") from refused

    async def _deliver(self, request_id: str) -> None:
        """Make one attempt, and note what became of it."""
        try:
            request = await transact(self._node.database, lambda c: Requests(c).get(request_id))
        except NotStored:
            self._undelivered.pop(request_id, None)  # deleted
            return
        except StoreUnavailable:
            return  # the next look tries again
        failure, is_final = "", False
        try:
            await self._post(request)
        except DeliveryFailed as failed:
            failure, is_final = str(failed), failed.is_final
        except (EgressRefused, ApiError) as refused:
            failure = str(refused)
        num_attempts = request.webhook_attempts + 1
        wait_s = None if is_final else next_attempt_s(num_attempts)
        status = "delivered" if not failure else "pending" if wait_s is not None else "failed"
        request = replace(
            request,
            webhook_attempts=num_attempts,
            webhook_status=status,
            webhook_error=failure or None,
            webhook_next_us=None if wait_s is None else self._now_us() + int(wait_s * 1e6),
        )
        log.info("webhook", request_id=request.id, status=status, attempts=num_attempts)
        await self._persistently(lambda: self._put(request))
        if status != "pending":
            self._undelivered.pop(request_id, None)
        elif request_id in self._undelivered:  # else it was deleted meanwhile
            self._undelivered[request_id] = request.webhook_next_us or 0

    async def _post(self, request: StoredRequest) -> None:
        """Send the message, if it may still be sent and to nowhere else than it may.

        Raises:
            EgressRefused: The spec does not allow it any more, or the host leads inside.
            ApiError: The function is gone.
            DeliveryFailed: The receiver did not take it.
        """
        assert request.webhook_url is not None, "only those with a webhook are undelivered"
        assert request.ended_us is not None, "only those with an answer are undelivered"
        webhooks = self._node.registry.resolve(request.model).spec.webhooks
        target = allowed_target(request.webhook_url, webhooks.allow)
        address = await reachable(
            target, allow_private=webhooks.allow_private_addresses, resolve=self._node.resolve
        )
        ended = datetime.fromtimestamp(request.ended_us / 1e6, UTC)
        view = request_view(request)
        del view["webhook"]  # it changes with every attempt, and what is signed must not
        body = payload(f"async_request.{request.status}", ended, view)
        message_id = f"msg_{request.id.removeprefix(PREFIX)}"
        secret = self.secret(request.key_id)
        headers = headers_of(secret, message_id, self._node.clock.now(), body)
        await self._node.sender.post(target, address, headers, body)

    # Small things.

    async def _put(self, request: StoredRequest) -> None:
        await transact(self._node.database, lambda c: Requests(c).put(request))

    async def _persistently(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
                return
            except StoreUnavailable as error:
                log.warning("a request waits for the database", error=str(error))
                await asyncio.sleep(STORE_PAUSE_S)

    def _now_us(self) -> int:
        return unix_us(self._node.clock.now())


def _task(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_tell_of_defects)
    return task


def _tell_of_defects(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("asynchronous request stopped", task=task.get_name(), exc_info=error)


def _no_such_request(request_id: str) -> NotFound:
    return NotFound(
        f"there is no request {request_id[:64]!r}; GET /v1/requests lists yours",
        param="request_id",
    )
