"""POST /v1/completions."""

import uuid
from collections.abc import Sequence
from typing import cast

from fastapi import APIRouter, Request, Response

from controller.errors import InvalidRequest
from controller.gateway.bodies import JsonRoute
from controller.gateway.calls import Call, GatewayDependency, collect, requested_grammar
from controller.gateway.responses import ANSWER_RESPONSES
from controller.gateway.schemas.common import FinishReason
from controller.gateway.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionRequest,
    Prompt,
)
from controller.gateway.streaming import TEXT_CHUNK, ChunkWriter, EventStream, answer_headers

DEFAULT_MAX_TOKENS = 16

router = APIRouter(route_class=JsonRoute, tags=["openai"])


@router.post("/v1/completions", response_model=Completion, responses=ANSWER_RESPONSES)
async def create_completion(
    body: CompletionRequest, request: Request, gateway: GatewayDependency
) -> Response:
    """Continue prompts as they are; several are answered by as many choices."""
    max_prompts = gateway.settings.max_prompts
    if len(body.prompt) > max_prompts:
        raise InvalidRequest(
            f"prompt: has {len(body.prompt)} prompts; at most {max_prompts} are allowed in a call",
            param="prompt",
        )
    grammar = await requested_grammar(body)
    call = await Call.open(gateway, request, body.model)
    prompts = await _token_ids(call, body.prompt)
    answer = call.answer(prompts, body, default_max_tokens=DEFAULT_MAX_TOKENS, grammar=grammar)
    completion_id = f"cmpl-{uuid.uuid4().hex}"
    created = int(gateway.clock.now().timestamp())
    if body.stream:
        identity = {"id": completion_id, "created": created, "model": body.model}
        writer = ChunkWriter(TEXT_CHUNK, identity, includes_usage=body.includes_usage)
        return EventStream(answer, writer, heartbeat_s=gateway.settings.heartbeat_s)
    choices = [
        CompletionChoice(index=index, text=text, finish_reason=cast("FinishReason", reason))
        for index, (text, reason) in enumerate(await collect(answer))
    ]
    completion = Completion(
        id=completion_id, created=created, model=body.model, choices=choices, usage=answer.usage
    )
    return Response(
        completion.model_dump_json(),
        media_type="application/json",
        headers=answer_headers(answer),
    )


async def _token_ids(call: Call, prompts: Sequence[Prompt]) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await call.text.encode(texts))
    token_ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
    for prompt in token_ids:
        if not prompt:
            raise InvalidRequest("prompt: is empty; send at least one token", param="prompt")
        call.check_token_ids(prompt, param="prompt")
    return token_ids
