"""/v1/responses: the same turns as chat completions, as items that can be kept."""

import json
import uuid
from functools import partial
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Query, Request, Response

from controller.errors import InvalidRequest, NotFound, PreviousResponseNotFound, StoreUnavailable
from controller.gateway.answers import Answer
from controller.gateway.bodies import JsonRoute
from controller.gateway.calls import Call, GatewayDependency
from controller.gateway.output_items import OutputItems
from controller.gateway.pieces import Piece
from controller.gateway.response_drafts import ResponseDraft, ResponseWriter
from controller.gateway.response_store import ResponseStore
from controller.gateway.responses import ANSWER_RESPONSES, ERROR_RESPONSES
from controller.gateway.schemas.chat import MAX_MESSAGES
from controller.gateway.schemas.response_input import STORED_ITEMS
from controller.gateway.schemas.response_object import (
    InputItemList,
    ResponseDeleted,
    ResponseObject,
    ResponseReasoning,
)
from controller.gateway.schemas.responses import ResponseRequest
from controller.gateway.streaming import EventStream, answer_headers
from controller.gateway.turns import answer_turn

JSON = "application/json"
Limit = Annotated[int, Query(ge=1, le=100)]

log = structlog.get_logger(__name__)


def responses_router(store: ResponseStore) -> APIRouter:
    """Return the endpoints of the Responses API."""
    router = APIRouter(route_class=JsonRoute, tags=["openai"])

    @router.post("/v1/responses", response_model=ResponseObject, responses=ANSWER_RESPONSES)
    async def create_response(
        body: ResponseRequest, request: Request, gateway: GatewayDependency
    ) -> Response:
        """Answer a conversation; the first call of an idle function wakes it."""
        call = await Call.open(gateway, request, body.model)
        earlier = await _earlier(store, call, body)
        turn = body.turn_after(STORED_ITEMS.validate_python(earlier))
        conversation = [*earlier, *(item.to_json() for item in body.input)]
        _check_size(conversation, gateway.settings.max_body_bytes)
        answer = await answer_turn(call, body, turn)
        logprobs = call.logprob_writer(body).chat if body.num_logprobs is not None else None
        draft = ResponseDraft(
            response_of(call, body),
            OutputItems(None if logprobs is None else lambda tokens: logprobs(tokens)["content"]),
            keep=partial(_keep, store, call.key_id, conversation) if _is_kept(body) else None,
            usage=lambda: answer.usage,
            clock=gateway.clock,
        )
        if body.stream:
            writer = ResponseWriter(draft)
            return EventStream(answer, writer, heartbeat_s=gateway.settings.heartbeat_s)
        response = await _whole(answer, draft)
        return Response(response.model_dump_json(), media_type=JSON, headers=answer_headers(answer))

    @router.get(
        "/v1/responses/{response_id}", response_model=ResponseObject, responses=ERROR_RESPONSES
    )
    async def get_response(response_id: str, request: Request, stream: bool = False) -> Response:
        """Return a response that is kept."""
        if stream:
            raise InvalidRequest(
                "stream: a response that is over cannot be streamed again; leave it out",
                param="stream",
            )
        found = await store.get(response_id, key_id=request.scope["state"]["key_id"])
        return Response(found.body, media_type=JSON)

    @router.delete("/v1/responses/{response_id}", responses=ERROR_RESPONSES)
    async def delete_response(response_id: str, request: Request) -> ResponseDeleted:
        """Forget a response; those that follow it stay."""
        await store.delete(response_id, key_id=request.scope["state"]["key_id"])
        return ResponseDeleted(id=response_id)

    @router.get("/v1/responses/{response_id}/input_items", responses=ERROR_RESPONSES)
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


def response_of(call: Call, body: ResponseRequest) -> ResponseObject:
    """Return the response to a request, with nothing of the answer yet."""
    defaults = call.text.defaults_of(call.function.spec)
    form = None if body.text is None else body.text.format
    choice = body.tool_choice or "auto"
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(call.gateway.clock.now().timestamp()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=ResponseReasoning(effort=body.reasoning.effort if body.reasoning else None),
        store=_is_kept(body),
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        text={"format": form.to_json() if form else {"type": "text"}},
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        tools=[tool.model_dump() for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        truncation=body.truncation or "disabled",
    )


def _is_kept(body: ResponseRequest) -> bool:
    return body.store is not False


async def _earlier(store: ResponseStore, call: Call, body: ResponseRequest) -> list[dict[str, Any]]:
    """Return the conversation that a response goes on from.

    Raises:
        PreviousResponseNotFound: It is not kept.
    """
    previous_id = body.previous_response_id
    if previous_id is None:
        return []
    try:
        found = await store.get(previous_id, key_id=call.key_id)
    except NotFound as error:
        raise PreviousResponseNotFound(error.message, param="previous_response_id") from error
    return [*json.loads(found.conversation), *json.loads(found.body)["output"]]


def _check_size(conversation: list[dict[str, Any]], max_bytes: int) -> None:
    """Refuse a conversation that has become longer than a body may be.

    Raises:
        InvalidRequest: It has.
    """
    num_chars = len(json.dumps(conversation, ensure_ascii=False))
    if len(conversation) > MAX_MESSAGES or num_chars > max_bytes:
        raise InvalidRequest(
            f"previous_response_id: the conversation has {len(conversation)} items and "
            f"{num_chars} characters; at most {MAX_MESSAGES} and {max_bytes} are allowed: begin "
            "a new one",
            param="previous_response_id",
        )


async def _keep(
    store: ResponseStore,
    key_id: str | None,
    conversation: list[dict[str, Any]],
    response: ResponseObject,
) -> bool:
    """Keep a response; one that cannot be is still an answer, and says so."""
    try:
        await store.keep(
            response.id,
            key_id=key_id,
            body=response.model_dump_json().encode(),
            conversation=json.dumps(conversation).encode(),
        )
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
