"""The next turn of a conversation: its prompt, how it is read, and what it must match."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from controller.errors import InvalidRequest
from controller.gateway import reasoning
from controller.gateway.answers import Answer
from controller.gateway.calls import Call, requested_grammar
from controller.gateway.grammars import check_grammar
from controller.gateway.reply import ReplyPlan
from controller.gateway.schemas.sampling import SamplingBody
from controller.gateway.schemas.turn import Turn

TAIL_TOKENS = 16  # enough of a prompt to see a tag at its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A prompt, and whether it has begun a thought; None if the model does not think."""

    token_ids: list[int]
    is_thought_open: bool | None


async def answer_turn(call: Call, body: SamplingBody, turn: Turn) -> Answer:
    """Prepare the next messages of a conversation; nothing is admitted yet.

    Raises:
        InvalidRequest: The template, the model or a grammar cannot follow the request.
    """
    grammar = await requested_grammar(body)
    dialect = call.dialect
    prompt = await _fitting(call, body, turn) if turn.is_cut else await render(call, turn)
    offered, is_open = turn.offered, bool(prompt.is_thought_open)
    if offered.is_required:
        grammar = dialect.calls_grammar(
            offered.functions, is_parallel=offered.is_parallel, is_open=is_open
        )
        await check_grammar(grammar, param="tools")
    elif grammar:
        grammar = dialect.after_thought(grammar, is_open=is_open)
    is_bound = not offered.is_required and (
        body.is_formatted or body.structured_outputs is not None
    )
    plan = ReplyPlan(
        is_thought_open=prompt.is_thought_open,
        parser=dialect.format.parser if offered.tools and not is_bound else None,
        tool_names=offered.names,
        max_calls=None if offered.is_parallel else 1,
        tells_thoughts=turn.tells_thoughts,
    )
    return await call.answer(
        [prompt.token_ids], body, default_max_tokens=None, grammar=grammar, plan=plan
    )


async def render(call: Call, turn: Turn) -> Rendered:
    """Return the prompt of a conversation, by the model's chat template.

    Raises:
        InvalidRequest: The template cannot write it.
    """
    dialect = call.dialect
    try:
        messages, variables = dialect.conversation(turn.messages, turn.offered.descriptions)
        token_ids = await call.text.encode_chat(
            messages,
            add_generation_prompt=turn.is_prompted and not turn.is_continued,
            continue_final_message=turn.is_continued,
            add_special_tokens=turn.has_special_tokens,
            variables={**variables, **turn.variables},
        )
    except InvalidRequest as error:
        if error.param == "messages":  # which is what templates call a conversation
            error.param = turn.field
        raise
    if not dialect.reasons:
        return Rendered(token_ids=token_ids, is_thought_open=None)
    tail = await call.text.decode(token_ids[-TAIL_TOKENS:])
    return Rendered(token_ids=token_ids, is_thought_open=reasoning.is_opened_by(tail))


async def _fitting(call: Call, body: SamplingBody, turn: Turn) -> Rendered:
    """Return the prompt without as many of the oldest turns as there is no room for.

    What the system says and the last turn always stay; a turn begins with what the user says.
    """
    room = call.function.max_model_len - (body.max_new_tokens or 1)
    prompt = await render(call, turn)
    cuts = _turn_starts(turn.messages)
    low, high = 1, len(cuts) - 1
    if len(prompt.token_ids) <= room or high < low:
        return prompt
    fewest = await render(call, _cut(turn, cuts[high]))
    while low < high:
        middle = (low + high) // 2
        tried = await render(call, _cut(turn, cuts[middle]))
        if len(tried.token_ids) <= room:
            high, fewest = middle, tried
        else:
            low = middle + 1
    return fewest


def _turn_starts(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    return [at for at, message in enumerate(messages) if message["role"] == "user"]


def _cut(turn: Turn, start: int) -> Turn:
    kept = [
        message
        for at, message in enumerate(turn.messages)
        if at >= start or message["role"] == "system"
    ]
    return replace(turn, messages=kept)
