"""POST /v1/embeddings."""

import asyncio
import base64
import json
from array import array
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from controller.errors import ContextLengthExceeded, InvalidRequest
from controller.gateway.bodies import JsonRoute
from controller.gateway.calls import Call, GatewayDependency
from controller.gateway.failures import ERROR_RESPONSES
from controller.gateway.schemas.embeddings import (
    MAX_INPUT_TOKENS,
    EmbeddingList,
    EmbeddingsRequest,
)
from controller.gateway.streaming import headers_of
from controller.scaling.embedding import EmbeddingRequest, Pooling

PAUSE_BYTES = 64 << 10  # of vectors written between two turns of the event loop

router = APIRouter(route_class=JsonRoute, tags=["openai"])


@router.post("/v1/embeddings", response_model=EmbeddingList, responses=ERROR_RESPONSES)
async def create_embeddings(
    body: EmbeddingsRequest, request: Request, gateway: GatewayDependency
) -> Response:
    """Embed texts; the first call of an idle function wakes it."""
    call = await Call.open(gateway, request, body.model)
    _check_dimensions(call, body.dimensions)
    embedding = call.function.embed(
        EmbeddingRequest(
            request_id=call.request_id,
            texts=await _token_ids(call, body),
            dimensions=body.dimensions,
            num_bytes=call.num_bytes,
            key_id=call.key_id,
            received_at=call.received_at,
            may_wake=call.may_wake,
        )
    )
    async with embedding:
        vectors = await embedding.run()
    record = embedding.record
    content = await _content(
        vectors, body.model, record.num_prompt_tokens, is_base64=body.encoding_format == "base64"
    )
    headers = headers_of(record.tier, record.queue_s, record.timeline)
    return Response(content, media_type="application/json", headers=headers)


def _check_dimensions(call: Call, dimensions: int | None) -> Pooling:
    pooling, name = call.function.pooling, call.function.name
    if pooling is None:
        raise InvalidRequest(
            f"model: {name!r} generates text and does not embed; ask a model for embeddings, or "
            "deploy this one with model.task: embed",
            param="model",
        )
    if dimensions is not None and not pooling.allows(dimensions):
        allowed = f"1 to {pooling.size}" if pooling.shorter is None else str(pooling.size)
        if pooling.shorter:
            allowed = f"one of {', '.join(map(str, (*pooling.shorter, pooling.size)))}"
        raise InvalidRequest(
            f"dimensions: the vectors of {name!r} cannot have {dimensions} numbers; send "
            f"{allowed}, or leave it out",
            param="dimensions",
        )
    return pooling


async def _token_ids(call: Call, body: EmbeddingsRequest) -> list[list[int]]:
    strings = [text for text in body.input if isinstance(text, str)]
    limit = call.function.max_model_len
    cut = body.truncate_prompt_tokens
    max_tokens = limit if cut == -1 else cut
    encoded = iter(
        await call.text.encode(
            strings, add_special_tokens=body.add_special_tokens is not False, max_tokens=max_tokens
        )
    )
    texts = []
    for text in body.input:
        if isinstance(text, str):
            texts.append(next(encoded) if text else [])
            continue
        call.check_token_ids(text, param="input")
        texts.append(text[:max_tokens])
    _check_lengths(call, texts, limit)
    return texts


def _check_lengths(call: Call, texts: Sequence[Sequence[int]], limit: int) -> None:
    for index, text in enumerate(texts):
        if not text:
            raise InvalidRequest(
                f"input: text {index} is empty; send at least one token", param="input"
            )
        if len(text) > limit:
            raise ContextLengthExceeded(
                f"input: text {index} has {len(text)} tokens and {call.function.name!r} takes "
                f"{limit}; shorten it, or send truncate_prompt_tokens",
                param="input",
            )
    num_tokens = sum(map(len, texts))
    if num_tokens > MAX_INPUT_TOKENS:
        raise InvalidRequest(
            f"input: has {num_tokens} tokens; at most {MAX_INPUT_TOKENS} are allowed in a call",
            param="input",
        )


async def _content(
    vectors: Sequence[bytes], model: str, num_tokens: int, *, is_base64: bool
) -> bytes:
    """Write the answer; megabytes of numbers must not hold up every stream."""
    pieces = []
    num_bytes = 0
    for index, vector in enumerate(vectors):
        shown = _base64(vector) if is_base64 else _numbers(vector)
        pieces.append(f'{{"object":"embedding","index":{index},"embedding":{shown}}}')
        num_bytes += len(vector)
        if num_bytes >= PAUSE_BYTES:
            num_bytes = 0
            await asyncio.sleep(0)
    usage = f'{{"prompt_tokens":{num_tokens},"total_tokens":{num_tokens}}}'
    head = f'{{"object":"list","model":{json.dumps(model)},"usage":{usage},"data":['
    return f"{head}{','.join(pieces)}]}}".encode()


def _base64(vector: bytes) -> str:
    return f'"{base64.b64encode(vector).decode()}"'


def _numbers(vector: bytes) -> str:
    """Write float32 with the nine digits that give back every one of them."""
    return f"[{','.join([format(number, '.9g') for number in array('f', vector)])}]"
