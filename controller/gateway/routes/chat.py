"""POST /v1/chat/completions."""

import uuid
from typing import cast

from fastapi import APIRouter, Request, Response

from controller.gateway.bodies import JsonRoute
from controller.gateway.calls import Call, GatewayDependency, Whole, collect
from controller.gateway.failures import ANSWER_RESPONSES
from controller.gateway.logprobs import off_loop
from controller.gateway.schemas.chat import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
)
from controller.gateway.schemas.common import FinishReason, json_list, json_of
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
    prompt = answer.prompt_tokens(0)

    def write() -> bytes:
        choices = [
            json_of(
                ChatChoice(
                    index=index,
                    message=assistant_message(whole),
                    finish_reason=cast("FinishReason", whole.finish_reason),
                    stop_reason=whole.stop_reason,
                    token_ids=whole.token_ids if body.return_token_ids else None,
                ),
                logprobs=logprobs(whole.tokens) if logprobs else None,
            )
            for index, whole in enumerate(wholes)
        ]
        completion = ChatCompletion(
            id=chat_id,
            created=created,
            model=body.model,
            choices=[],
            usage=answer.usage,
            prompt_token_ids=answer.prompt_of(0) if body.return_token_ids else None,
        )
        told = call.prompt_logprobs(body, prompt)
        return json_of(completion, choices=json_list(choices), prompt_logprobs=told)

    num_told = len(prompt) + sum(len(whole.tokens) for whole in wholes)
    return Response(
        await off_loop(write, num_tokens=num_told),
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
