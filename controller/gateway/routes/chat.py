"""POST /v1/chat/completions."""

import uuid
from typing import cast

from fastapi import APIRouter, Request, Response

from controller.gateway.bodies import JsonRoute
from controller.gateway.calls import Call, GatewayDependency, collect, requested_grammar
from controller.gateway.responses import ANSWER_RESPONSES
from controller.gateway.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
)
from controller.gateway.schemas.common import FinishReason
from controller.gateway.streaming import CHAT_CHUNK, ChunkWriter, EventStream, answer_headers

router = APIRouter(route_class=JsonRoute, tags=["openai"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ANSWER_RESPONSES)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, gateway: GatewayDependency
) -> Response:
    """Continue a conversation; the first call of an idle function wakes it."""
    grammar = await requested_grammar(body)
    call = await Call.open(gateway, request, body.model)
    prompt = await call.text.encode_chat([message.variables() for message in body.messages])
    answer = call.answer([prompt], body, default_max_tokens=None, grammar=grammar)
    chat_id = f"chatcmpl-{uuid.uuid4().hex}"
    created = int(gateway.clock.now().timestamp())
    if body.stream:
        identity = {"id": chat_id, "created": created, "model": body.model}
        writer = ChunkWriter(CHAT_CHUNK, identity, includes_usage=body.includes_usage)
        return EventStream(answer, writer, heartbeat_s=gateway.settings.heartbeat_s)
    choices = [
        ChatChoice(
            index=index,
            message=AssistantMessage(content=text),
            finish_reason=cast("FinishReason", reason),
        )
        for index, (text, reason) in enumerate(await collect(answer))
    ]
    completion = ChatCompletion(
        id=chat_id, created=created, model=body.model, choices=choices, usage=answer.usage
    )
    return Response(
        completion.model_dump_json(),
        media_type="application/json",
        headers=answer_headers(answer),
    )
