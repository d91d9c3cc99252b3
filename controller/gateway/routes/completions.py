"""POST /v1/completions."""

import uuid
from collections.abc import Sequence
from typing import cast

from fastapi import APIRouter, Request, Response

from controller.errors import InvalidRequest
from controller.gateway.bodies import JsonRoute
from controller.gateway.calls import (
    Call,
    GatewayDependency,
    Whole,
    collect,
    requested_grammar,
)
from controller.gateway.failures import ANSWER_RESPONSES
from controller.gateway.infill import Infill
from controller.gateway.logprobs import off_loop
from controller.gateway.schemas.common import FinishReason, json_list, json_of
from controller.gateway.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionRequest,
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
    infill = _infill(call, body)
    prompts = await _token_ids(call, body, infill)
    if infill is not None:
        ends = [*(body.stop_token_ids or ()), *infill.end_token_ids]
        body = body.model_copy(update={"stop_token_ids": ends})
    answer = await call.answer(
        prompts, body, default_max_tokens=DEFAULT_MAX_TOKENS, grammar=grammar
    )
    completion_id = f"cmpl-{body.request_id or uuid.uuid4().hex}"
    created = int(gateway.clock.now().timestamp())
    logprobs = call.logprob_writer(body).completion if body.logprobs is not None else None
    if body.stream:
        writer = ChunkWriter(
            TEXT_CHUNK,
            {"id": completion_id, "created": created, "model": body.model},
            usage=lambda: answer.usage,
            includes_usage=body.includes_usage,
            continues_usage=body.continues_usage,
            logprobs=logprobs,
            prompt_of=answer.prompt_of if body.return_token_ids else None,
        )
        return EventStream(answer, writer, heartbeat_s=gateway.settings.heartbeat_s)
    best = _best(await collect(answer), body)
    told = [answer.prompt_tokens(number) for number in range(len(prompts))]

    def write() -> bytes:
        prompt_logprobs = [call.prompt_logprobs(body, tokens) for tokens in told]
        choices = [
            json_of(
                CompletionChoice(
                    index=index,
                    text=whole.text,
                    finish_reason=cast("FinishReason", whole.finish_reason),
                    stop_reason=whole.stop_reason,
                    token_ids=whole.token_ids if body.return_token_ids else None,
                    prompt_token_ids=answer.prompt_of(at) if body.return_token_ids else None,
                ),
                logprobs=logprobs(whole.tokens) if logprobs else None,
                prompt_logprobs=prompt_logprobs[at // body.num_choices],
            )
            for index, (at, whole) in enumerate(best)
        ]
        completion = Completion(
            id=completion_id, created=created, model=body.model, choices=[], usage=answer.usage
        )
        return json_of(completion, choices=json_list(choices))

    num_told = sum(map(len, told)) + sum(len(whole.tokens) for _, whole in best)
    return Response(
        await off_loop(write, num_tokens=num_told),
        media_type="application/json",
        headers=answer_headers(answer),
    )


def _best(wholes: Sequence[Whole], body: CompletionRequest) -> list[tuple[int, Whole]]:
    """Return the answers to give, those of one prompt in a row, with their places in the call."""
    best: list[tuple[int, Whole]] = []
    places = range(len(wholes))
    for first in places[:: body.num_choices]:
        group = list(places[first : first + body.num_choices])
        if body.picks_best:
            group.sort(key=lambda at: wholes[at].mean_logprob, reverse=True)
            del group[body.n or 1 :]
        best += [(at, wholes[at]) for at in group]
    return best


def _infill(call: Call, body: CompletionRequest) -> Infill | None:
    """Return how the model is asked to fill in, if it is to.

    Raises:
        InvalidRequest: It cannot.
    """
    if not body.suffix:
        return None
    if call.text.infill is None:
        raise InvalidRequest(
            f"suffix: {call.function.name!r} cannot fill in, its tokenizer has no tokens for it; "
            "leave it out, or ask a model that can",
            param="suffix",
        )
    return call.text.infill


async def _token_ids(call: Call, body: CompletionRequest, infill: Infill | None) -> list[list[int]]:
    prompts = body.prompt
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if infill is not None:
        texts = [infill.prompt(text, body.suffix or "") for text in texts]
    add_special_tokens = body.add_special_tokens is not False
    encoded = iter(await call.text.encode(texts, add_special_tokens=add_special_tokens))
    token_ids = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]
    for prompt in token_ids:
        if not prompt:
            raise InvalidRequest("prompt: is empty; send at least one token", param="prompt")
        call.check_token_ids(prompt, param="prompt")
    return token_ids
