"""How a response begins: what was asked for, and the conversation it goes on from."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from controller.errors import InvalidRequest, NotFound, PreviousResponseNotFound
from controller.gateway.calls import Call
from controller.gateway.response_api.store import ResponseStore
from controller.gateway.schemas.chat import MAX_MESSAGES
from controller.gateway.schemas.response_input import (
    STORED_ITEMS,
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
)
from controller.gateway.schemas.response_object import ResponseObject, ResponseReasoning
from controller.gateway.schemas.responses import ResponseRequest
from controller.gateway.schemas.turn import Turn

KEPT_STATUSES = ("completed", "incomplete")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseTurn:
    """A response that is to be made.

    Attributes:
        response: With nothing of the answer yet.
        turn: What it answers.
        conversation: The same as it is kept: a JSON list of items.
    """

    response: ResponseObject
    turn: Turn
    conversation: bytes


async def begin(store: ResponseStore, call: Call, body: ResponseRequest) -> ResponseTurn:
    """Return the response that a request asks for.

    Raises:
        PreviousResponseNotFound: The one it is to follow is not kept.
        InvalidRequest: That one has no answer, or the conversation has become too long.
    """
    earlier = await _earlier(store, call, body)
    items = [*STORED_ITEMS.validate_python(earlier), *body.input]
    _check_calls(items)
    conversation = _encoded([*earlier, *(item.to_json() for item in body.input)])
    if earlier:
        _check_size(len(items), len(conversation), call.gateway.settings.max_body_bytes)
    return ResponseTurn(
        response=_response(call, body), turn=body.turn_of(items), conversation=conversation
    )


async def resume(
    store: ResponseStore, call: Call, body: ResponseRequest, response_id: str
) -> ResponseTurn:
    """Return a response that was begun earlier.

    Raises:
        NotFound: It was deleted.
    """
    found = await store.get(response_id, key_id=call.key_id)
    response = ResponseObject.model_validate_json(found.body)
    items = STORED_ITEMS.validate_json(found.conversation)
    return ResponseTurn(
        response=response.model_copy(update={"status": "in_progress"}),
        turn=body.turn_of(items),
        conversation=found.conversation,
    )


def _response(call: Call, body: ResponseRequest) -> ResponseObject:
    defaults = call.text.defaults_of(call.function.spec)
    form = None if body.text is None else body.text.format
    choice = body.tool_choice or "auto"
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(call.gateway.clock.now().timestamp()),
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=ResponseReasoning(effort=body.reasoning.effort if body.reasoning else None),
        store=body.is_kept,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        text={"format": form.to_json() if form else {"type": "text"}},
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
        tools=[tool.model_dump() for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        truncation=body.truncation or "disabled",
    )


async def _earlier(store: ResponseStore, call: Call, body: ResponseRequest) -> list[dict[str, Any]]:
    """Return the items before a request's own, each with an id of its own."""
    previous_id = body.previous_response_id
    if previous_id is None:
        return []
    try:
        found = await store.get(previous_id, key_id=call.key_id)
    except NotFound as error:
        raise PreviousResponseNotFound(error.message, param="previous_response_id") from error
    previous = json.loads(found.body)
    if previous["status"] not in KEPT_STATUSES:
        raise InvalidRequest(
            f"previous_response_id: {previous_id!r} has no answer to go on from",
            param="previous_response_id",
        )
    return [*json.loads(found.conversation), *previous["output"]]


def _check_calls(items: Sequence[Item]) -> None:
    """Refuse the result of a call that nobody has made, which templates would drop or garble.

    Raises:
        InvalidRequest: There is one.
    """
    made: set[str] = set()
    for item in items:
        if isinstance(item, FunctionCallItem):
            made.add(item.call_id)
        elif isinstance(item, FunctionCallOutputItem) and item.call_id not in made:
            raise InvalidRequest(
                f"input: no function_call with the call_id {item.call_id[:64]!r} comes before its "
                "output; send the call too, or the previous_response_id of the response with it",
                param="input",
            )


def _encoded(items: list[dict[str, Any]]) -> bytes:
    """Return items as JSON; an id that was there before is made anew, since pages go by ids."""
    seen: set[str] = set()
    for item in items:
        if item["id"] in seen:
            item["id"] = f"{item['id'].partition('_')[0]}_{uuid.uuid4().hex}"
        seen.add(item["id"])
    return json.dumps(items, ensure_ascii=False, separators=(",", ":")).encode()


def _check_size(num_items: int, num_bytes: int, max_bytes: int) -> None:
    if num_items > MAX_MESSAGES or num_bytes > max_bytes:
        raise InvalidRequest(
            f"previous_response_id: the conversation has {num_items} items and {num_bytes} bytes; "
            f"at most {MAX_MESSAGES} and {max_bytes} are allowed: begin a new one",
            param="previous_response_id",
        )
