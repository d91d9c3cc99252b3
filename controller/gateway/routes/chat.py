"""POST /v1/chat/completions."""

import uuid
from typing import cast

from fastapi import APIRouter, Request, Response

from controller.gateway.bodies import JsonRoute
from controller.gateway.calls import Call, GatewayDependency, Whole, collect
from controller.gateway.failures import ANSWER_RESPONSES
from controller.gateway.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
)
from controller.gateway.schemas.common import ChatLogprobs, FinishReason
from controller.gateway.streaming import CHAT_CHUNK, ChunkWriter, EventStream, answer_headers
from controller.gateway.turns import answer_turn

router = APIRouter(route_class=JsonRoute, tags=["openai"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ANSWER_RESPONSES)
async def create_chat_completion(
    body: ChatCompletionRequest, request: Request, gateway: GatewayDependency
) -> Response:
    """Continue a conversation; the first call of an idle function wakes it."""
    call = await Call.open(gateway, request, body.model)
    answer = await answer_turn(call, body, body.turn)
    chat_id = f"chatcmpl-{body.request_id or uuid.uuid4().hex}"
    created = int(gateway.clock.now().timestamp())
    logprobs = call.logprob_writer(body).chat if body.logprobs else None
    if body.stream:
        writer = ChunkWriter(
            CHAT_CHUNK,
            {"id": chat_id, "created": created, "model": body.model},
            usage=lambda: answer.usage,
            includes_usage=body.includes_usage,
            continues_usage=body.continues_usage,
            logprobs=logprobs,
            prompt_of=answer.prompt_of if body.return_token_ids else None,
        )
        return EventStream(answer, writer, heartbeat_s=gateway.settings.heartbeat_s)
    wholes = await collect(answer)
    choices = [
        ChatChoice(
            index=index,
            message=assistant_message(whole),
            logprobs=ChatLogprobs(**logprobs(whole.tokens)) if logprobs else None,
            finish_reason=cast("FinishReason", whole.finish_reason),
            stop_reason=whole.stop_reason,
            token_ids=whole.token_ids if body.return_token_ids else None,
        )
        for index, whole in enumerate(wholes)
    ]
    completion = ChatCompletion(
        id=chat_id,
        created=created,
        model=body.model,
        choices=choices,
        usage=answer.usage,
        prompt_token_ids=answer.prompt_of(0) if body.return_token_ids else None,
        prompt_logprobs=call.prompt_logprobs(body, answer.prompt_tokens(0)),
    )
    return Response(
        completion.model_dump_json(),
        media_type="application/json",
        headers=answer_headers(answer),
    )


def assistant_message(whole: Whole) -> AssistantMessage:
    """Return a choice as a message."""
    return AssistantMessage(
        content=whole.text or (None if whole.calls or whole.reasoning else ""),
        reasoning_content=whole.reasoning or None,
        reasoning=whole.reasoning or None,
        tool_calls=whole.calls or None,
    )
