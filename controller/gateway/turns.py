"""The next turn of a conversation: its prompt, how it is read, and what it must match."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controller.gateway import reasoning
from controller.gateway.answers import Answer
from controller.gateway.calls import Call, requested_grammar
from controller.gateway.grammars import check_grammar
from controller.gateway.reply import ReplyPlan
from controller.gateway.schemas.chat import ChatCompletionRequest

TAIL_TOKENS = 16  # enough of a prompt to see a tag at its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A prompt, and whether it has begun a thought; None if the model does not think."""

    token_ids: list[int]
    is_thought_open: bool | None


async def answer_turn(call: Call, body: ChatCompletionRequest) -> Answer:
    """Prepare the next messages of a conversation; nothing is admitted yet.

    Raises:
        InvalidRequest: The template, the model or a grammar cannot follow the request.
    """
    grammar = await requested_grammar(body)
    dialect = call.dialect
    prompt = await render(call, body)
    offered, is_open = body.offered, bool(prompt.is_thought_open)
    if offered.is_required:
        grammar = dialect.calls_grammar(
            offered.functions, is_parallel=offered.is_parallel, is_open=is_open
        )
        await check_grammar(grammar, param="tools")
    elif grammar:
        grammar = dialect.after_thought(grammar, is_open=is_open)
    plan = ReplyPlan(
        is_thought_open=prompt.is_thought_open,
        parser=dialect.format.parser if offered.tools and not _is_bound(body) else None,
        tool_names=offered.names,
        max_calls=None if offered.is_parallel else 1,
    )
    return await call.answer(
        [prompt.token_ids], body, default_max_tokens=None, grammar=grammar, plan=plan
    )


async def render(call: Call, body: ChatCompletionRequest) -> Rendered:
    """Return the prompt of a conversation, by the model's chat template."""
    dialect = call.dialect
    is_continued = bool(body.continue_final_message)
    messages, variables = dialect.conversation(
        [message.variables() for message in body.messages], body.offered.descriptions
    )
    token_ids = await call.text.encode_chat(
        messages,
        add_generation_prompt=body.add_generation_prompt is not False and not is_continued,
        continue_final_message=is_continued,
        add_special_tokens=bool(body.add_special_tokens),
        variables={**variables, **_variables(body)},
    )
    if not dialect.reasons:
        return Rendered(token_ids=token_ids, is_thought_open=None)
    tail = await call.text.decode(token_ids[-TAIL_TOKENS:])
    return Rendered(token_ids=token_ids, is_thought_open=reasoning.is_opened_by(tail))


def _variables(body: ChatCompletionRequest) -> Mapping[str, Any]:
    documents = {} if body.documents is None else {"documents": body.documents}
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return {**documents, **effort, **(body.chat_template_kwargs or {})}


def _is_bound(body: ChatCompletionRequest) -> bool:
    """Return whether the answer's form leaves no room for calls."""
    is_formatted = body.response_format is not None and body.response_format.type != "text"
    return not body.offered.is_required and (is_formatted or body.structured_outputs is not None)
