"""/v1/requests: accept now, answer later."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from controller.gateway.bodies import JsonRoute
from controller.gateway.failures import ERROR_RESPONSES
from controller.gateway.schemas.requests import (
    DEFAULT_TIMEOUT_S,
    AsyncRequest,
    AsyncRequestBody,
    AsyncRequestDeleted,
    AsyncRequestList,
    WebhookSecret,
)
from controller.requests.service import RequestService
from controller.requests.views import request_view
from controller.store.requests import StoredRequest

Limit = Annotated[int, Query(ge=1, le=100)]


def requests_router(requests: RequestService) -> APIRouter:
    """Return the endpoints of asynchronous requests."""
    router = APIRouter(route_class=JsonRoute, tags=["async"], responses=ERROR_RESPONSES)

    @router.post("/v1/requests", status_code=202)
    async def create_request(
        body: AsyncRequestBody, request: Request, response: Response
    ) -> AsyncRequest:
        """Accept a request; it wakes its function as every other does."""
        accepted = await requests.create(
            key_id=request.scope["state"]["key_id"],
            endpoint=body.endpoint,
            body=body.body,
            timeout_s=DEFAULT_TIMEOUT_S if body.timeout_s is None else body.timeout_s,
            webhook_url=body.webhook_url,
            metadata=body.metadata,
        )
        response.headers["location"] = f"/v1/requests/{accepted.id}"
        return _view(accepted)

    @router.get("/v1/requests")
    async def list_requests(
        request: Request, after: str | None = None, limit: Limit = 20
    ) -> AsyncRequestList:
        """List the caller's requests, newest first."""
        key_id = request.scope["state"]["key_id"]
        found = await requests.list(key_id=key_id, after=after, limit=limit + 1)
        page = [_view(one) for one in found[:limit]]
        return AsyncRequestList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(found) > limit,
        )

    @router.get("/v1/requests/{request_id}")
    async def get_request(request_id: str, request: Request) -> AsyncRequest:
        """Describe one request, with its answer once there is one."""
        return _view(await requests.get(request_id, key_id=request.scope["state"]["key_id"]))

    @router.post("/v1/requests/{request_id}/cancel")
    async def cancel_request(request_id: str, request: Request) -> AsyncRequest:
        """End a request that is not answered yet."""
        return _view(await requests.cancel(request_id, key_id=request.scope["state"]["key_id"]))

    @router.delete("/v1/requests/{request_id}")
    async def delete_request(request_id: str, request: Request) -> AsyncRequestDeleted:
        """Forget a request and its answer."""
        await requests.delete(request_id, key_id=request.scope["state"]["key_id"])
        return AsyncRequestDeleted(id=request_id)

    @router.get("/v1/webhook_secret")
    async def get_webhook_secret(request: Request) -> WebhookSecret:
        """Return what the caller's webhooks are signed with."""
        return WebhookSecret(secret=requests.secret(request.scope["state"]["key_id"]))

    return router


def _view(request: StoredRequest) -> AsyncRequest:
    return AsyncRequest.model_validate(request_view(request))
