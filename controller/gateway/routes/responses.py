"""/v1/responses: the same turns as chat completions, as items that can be kept."""

import json
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Query, Request, Response

from controller.errors import InvalidRequest, NotFound, StoreUnavailable
from controller.gateway.answers import Answer
from controller.gateway.bodies import JsonRoute
from controller.gateway.calls import Call, GatewayDependency
from controller.gateway.failures import ANSWER_RESPONSES, ERROR_RESPONSES
from controller.gateway.pieces import Piece
from controller.gateway.response_api.background import BackgroundResponses, response_id_of
from controller.gateway.response_api.beginning import ResponseTurn, begin, resume
from controller.gateway.response_api.drafts import ResponseDraft, ResponseWriter
from controller.gateway.response_api.output_items import OutputItems
from controller.gateway.response_api.store import ResponseStore
from controller.gateway.schemas.response_object import (
    InputItemList,
    InputTokens,
    ResponseDeleted,
    ResponseObject,
)
from controller.gateway.schemas.responses import ResponseRequest
from controller.gateway.streaming import EventStream, answer_headers
from controller.gateway.turns import answer_turn, render

JSON = "application/json"
Limit = Annotated[int, Query(ge=1, le=100)]

log = structlog.get_logger(__name__)


def response_making_router(
    store: ResponseStore, background: BackgroundResponses | None = None
) -> APIRouter:
    """Return the endpoint that makes responses.

    Args:
        store: Keeps them.
        background: Takes those that nobody waits for; None if that has been done already.
    """
    router = APIRouter(route_class=JsonRoute, tags=["openai"])

    @router.post("/v1/responses", response_model=ResponseObject, responses=ANSWER_RESPONSES)
    async def create_response(
        body: ResponseRequest, request: Request, gateway: GatewayDependency
    ) -> Response:
        """Answer a conversation; the first call of an idle function wakes it."""
        call = await Call.open(gateway, request, body.model)
        if body.background and background is None:
            turn = await resume(store, call, body, response_id_of(call.request_id))
        else:
            turn = await begin(store, call, body)
        call = replace(call, num_bytes=max(call.num_bytes, len(turn.conversation)))
        answer = await answer_turn(call, body, turn.turn)
        if body.background and background is not None:
            document = json.loads(await request.body())
            return _json(await background.accept(turn, document, key_id=call.key_id))
        draft = _draft(store, call, body, turn, answer)
        if body.stream:
            writer = ResponseWriter(draft)
            return EventStream(answer, writer, heartbeat_s=gateway.settings.heartbeat_s)
        response = _json(await _whole(answer, draft))
        response.headers.update(answer_headers(answer))
        return response

    return router


def kept_responses_router(store: ResponseStore, background: BackgroundResponses) -> APIRouter:
    """Return the endpoints of responses that are kept."""
    router = APIRouter(
        route_class=JsonRoute, prefix="/v1/responses", tags=["openai"], responses=ERROR_RESPONSES
    )

    @router.post("/input_tokens")
    async def count_input_tokens(
        body: ResponseRequest, request: Request, gateway: GatewayDependency
    ) -> InputTokens:
        """Count what a response would have as its input; wakes nothing."""
        call = await Call.open(gateway, request, body.model)
        begun = await begin(store, call, body)
        prompt = await render(call, begun.turn)
        return InputTokens(input_tokens=len(prompt.token_ids))

    @router.get("/{response_id}", response_model=ResponseObject)
    async def get_response(response_id: str, request: Request, stream: bool = False) -> Response:
        """Return a response that is kept."""
        if stream:
            raise InvalidRequest(
                "stream: a response is streamed only while it is made; leave it out",
                param="stream",
            )
        found = await store.get(response_id, key_id=request.scope["state"]["key_id"])
        return Response(await background.now(found), media_type=JSON)

    @router.post("/{response_id}/cancel", response_model=ResponseObject)
    async def cancel_response(response_id: str, request: Request) -> Response:
        """End a response that is made in the background; one that is over stays as it is."""
        found = await store.get(response_id, key_id=request.scope["state"]["key_id"])
        return Response(await background.cancel(found), media_type=JSON)

    @router.delete("/{response_id}")
    async def delete_response(response_id: str, request: Request) -> ResponseDeleted:
        """Forget a response; those that follow it stay."""
        await background.delete(response_id, key_id=request.scope["state"]["key_id"])
        return ResponseDeleted(id=response_id)

    @router.get("/{response_id}/input_items")
    async def list_input_items(
        response_id: str,
        request: Request,
        after: str | None = None,
        limit: Limit = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> InputItemList:
        """List what a response answers, earlier responses and their input included."""
        found = await store.get(response_id, key_id=request.scope["state"]["key_id"])
        items: list[dict[str, Any]] = json.loads(found.conversation)
        return _page(items if order == "asc" else items[::-1], after, limit)

    return router


def _draft(
    store: ResponseStore, call: Call, body: ResponseRequest, turn: ResponseTurn, answer: Answer
) -> ResponseDraft:
    logprobs = call.logprob_writer(body).content if body.num_logprobs is not None else None
    return ResponseDraft(
        turn.response,
        OutputItems(None if logprobs is None else lambda tokens: list(logprobs(tokens))),
        keep=partial(_keep, store, call.key_id, turn.conversation) if body.is_kept else None,
        usage=lambda: answer.usage,
        clock=call.gateway.clock,
    )


async def _keep(
    store: ResponseStore, key_id: str | None, conversation: bytes, response: ResponseObject
) -> bool:
    """Keep a response; one that cannot be is still an answer, and says so."""
    body = response.model_dump_json().encode()
    try:
        await store.keep(response.id, key_id=key_id, body=body, conversation=conversation)
    except StoreUnavailable as error:
        log.warning("response not kept", response_id=response.id, error=str(error))
        return False
    return True


async def _whole(answer: Answer, draft: ResponseDraft) -> ResponseObject:
    """Run an answer to its end; return the response."""

    async def take(index: int, piece: Piece) -> None:
        for _ in draft.add(piece):
            pass

    async with answer:
        await answer.run(take)
    await draft.end()
    return draft.response


def _json(response: ResponseObject) -> Response:
    return Response(response.model_dump_json(), media_type=JSON)


def _page(items: list[dict[str, Any]], after: str | None, limit: int) -> InputItemList:
    """Return the items behind one of them.

    Raises:
        NotFound: That one is not there.
    """
    start = 0
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise NotFound(f"there is no item {after[:64]!r}", param="after")
        start = ids.index(after) + 1
    page = items[start : start + limit]
    return InputItemList(
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=len(items) > start + limit,
    )
