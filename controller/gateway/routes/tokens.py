"""POST /tokenize and /detokenize; neither wakes a function."""

from fastapi import APIRouter, Request

from controller.errors import InvalidRequest
from controller.gateway.bodies import JsonRoute
from controller.gateway.calls import Call, Gateway, GatewayDependency
from controller.gateway.failures import ERROR_RESPONSES
from controller.gateway.schemas.tokens import (
    Detokenized,
    DetokenizeRequest,
    TokenizeRequest,
    Tokens,
)
from controller.gateway.turns import render

router = APIRouter(route_class=JsonRoute, tags=["openai"], responses=ERROR_RESPONSES)


@router.post("/tokenize", response_model_exclude_unset=True)
async def tokenize(body: TokenizeRequest, request: Request, gateway: GatewayDependency) -> Tokens:
    """Split a prompt or a conversation into tokens, exactly as a generation would."""
    call = await Call.open(gateway, request, _model(gateway, body.model))
    if body.messages is None:
        (tokens,) = await call.text.encode(
            [body.prompt or ""], add_special_tokens=body.add_special_tokens is not False
        )
    else:
        tokens = (await render(call, body.turn)).token_ids
    answer = Tokens(count=len(tokens), max_model_len=call.function.max_model_len, tokens=tokens)
    if body.return_token_strs:
        answer.token_strs = call.text.spell(tokens)
    return answer


@router.post("/detokenize")
async def detokenize(
    body: DetokenizeRequest, request: Request, gateway: GatewayDependency
) -> Detokenized:
    """Put token ids together to text."""
    call = await Call.open(gateway, request, _model(gateway, body.model))
    call.check_token_ids(body.tokens, param="tokens")
    return Detokenized(prompt=await call.text.decode(body.tokens))


def _model(gateway: Gateway, model: str | None) -> str:
    """Return the model a call means.

    Raises:
        InvalidRequest: It names none and there is not just one.
    """
    if model is not None:
        return model
    functions = gateway.registry.served()
    if len(functions) != 1:
        raise InvalidRequest(
            f"model: required, since {len(functions)} functions are served; GET /v1/models lists "
            "their names",
            param="model",
        )
    return functions[0].served_names[0]
