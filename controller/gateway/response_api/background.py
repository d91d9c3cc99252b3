"""Responses that nobody waits for: asynchronous requests under the id of a response."""

import json
from contextlib import suppress
from typing import Any

from controller.errors import ApiError, Conflict, InvalidRequest, NotFound
from controller.gateway.response_api.beginning import ResponseTurn
from controller.gateway.response_api.store import ResponseStore
from controller.gateway.schemas.response_object import ResponseFailure, ResponseObject
from controller.requests.service import PREFIX, RequestService, RequestStatus
from controller.store.requests import StoredRequest
from controller.store.responses import StoredResponse

PATH = "/v1/responses"
TIMEOUT_S = 3600.0
RESPONSE_PREFIX = "resp_"


class BackgroundResponses:
    """Accepts responses, and knows how far they are.

    A response is kept as queued when it is accepted, and replaced when it is over. In between, and
    if it fails, its request knows what became of it.

    Args:
        store: Where responses are kept.
        requests: Makes them.
    """

    def __init__(self, store: ResponseStore, requests: RequestService) -> None:
        self._store = store
        self._requests = requests

    async def accept(
        self, turn: ResponseTurn, body: dict[str, Any], *, key_id: str | None
    ) -> ResponseObject:
        """Accept a response.

        Args:
            turn: The response.
            body: The request as it came.
            key_id: Whose it is.

        Raises:
            QueueFull: Too many requests are under way.
            StoreUnavailable: The database is away.
        """
        response = turn.response.model_copy(update={"status": "queued"})
        await self._store.keep(
            response.id,
            key_id=key_id,
            body=response.model_dump_json().encode(),
            conversation=turn.conversation,
        )
        try:
            await self._requests.create(
                request_id=request_id_of(response.id),
                key_id=key_id,
                endpoint=PATH,
                body=body,
                timeout_s=TIMEOUT_S,
                webhook_url=None,
                metadata=None,
            )
        except ApiError:
            await self._store.delete(response.id, key_id=key_id)
            raise
        return response

    async def now(self, found: StoredResponse) -> bytes:
        """Return a kept response as it is now, as JSON."""
        response = ResponseObject.model_validate_json(found.body)
        if response.status != "queued":
            return found.body
        try:
            request = await self._requests.get(request_id_of(found.id), key_id=found.key_id)
        except NotFound:
            reason = "the response failed too long ago to tell why"
            return _failed(response, "server_error", reason)
        if request.status == RequestStatus.COMPLETED and request.answer is not None:
            return request.answer  # the store was away when it was to be kept
        if request.status == RequestStatus.FAILED:
            return _failed(response, *_reason(request))
        state = "cancelled" if request.status == RequestStatus.CANCELLED else "in_progress"
        return response.model_copy(update={"status": state}).model_dump_json().encode()

    async def cancel(self, found: StoredResponse) -> bytes:
        """End a response, if it is under way; return it as it is then, as JSON.

        Raises:
            InvalidRequest: It is not made in the background.
        """
        if not json.loads(found.body)["background"]:
            raise InvalidRequest(
                f"response_id: {found.id!r} was not made in the background; one that is streamed "
                "or waited for ends when its client leaves",
                param="response_id",
            )
        with suppress(Conflict, NotFound):  # it is over
            await self._requests.cancel(request_id_of(found.id), key_id=found.key_id)
        return await self.now(await self._store.get(found.id, key_id=found.key_id))

    async def delete(self, response_id: str, *, key_id: str | None) -> None:
        """Forget a response, and the request that it was made by.

        Raises:
            NotFound: There is no such response, or it is another key's.
            Conflict: It is under way.
        """
        found = await self._store.get(response_id, key_id=key_id)
        if json.loads(found.body)["background"]:
            with suppress(NotFound):  # forgotten already
                await self._requests.delete(request_id_of(response_id), key_id=key_id)
        await self._store.delete(response_id, key_id=key_id)


def request_id_of(response_id: str) -> str:
    """Return the id of the request that makes a response."""
    return PREFIX + response_id.removeprefix(RESPONSE_PREFIX)


def response_id_of(request_id: str) -> str:
    """Return the id of the response that a request makes."""
    return RESPONSE_PREFIX + request_id.removeprefix(PREFIX)


def _reason(request: StoredRequest) -> tuple[str, str]:
    """Return code and message of a request that was refused."""
    error = json.loads(request.answer or b"{}").get("error", {})
    code = "invalid_prompt" if error.get("type") == "invalid_request_error" else "server_error"
    return code, str(error.get("message"))


def _failed(response: ResponseObject, code: str, message: str) -> bytes:
    failure = ResponseFailure(code=code, message=message)
    failed = response.model_copy(update={"status": "failed", "error": failure})
    return failed.model_dump_json().encode()
