"""Which format a model writes calls in: what the function's spec says, else its chat template."""

from collections.abc import Callable
from dataclasses import dataclass

from controller.gateway.tool_calls import deepseek, hermes, llama3_json, mistral, pythonic
from controller.gateway.tool_calls.base import ToolCallParser
from controller.gateway.tool_calls.shape import CallShape


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One way to write calls.

    Attributes:
        parser: Reads answers.
        shape: Returns how calls are written, given the chat template's source.
        hint: What a chat template of such models has in it.
        has_text_arguments: Whether templates want an earlier call's arguments as JSON text and not
            as an object.
    """

    parser: type[ToolCallParser]
    shape: Callable[[str], CallShape]
    hint: str
    has_text_arguments: bool = False


FORMATS = {
    "deepseek": ToolFormat(
        parser=deepseek.DeepSeekParser,
        shape=lambda source: (
            deepseek.FENCED_SHAPE if deepseek.FENCE in source else deepseek.PLAIN_SHAPE
        ),
        hint=deepseek.ALL_BEGIN,
        has_text_arguments=True,
    ),
    "mistral": ToolFormat(
        parser=mistral.MistralParser,
        shape=lambda source: (
            mistral.NAMED_SHAPE if mistral.ARGUMENTS in source else mistral.LIST_SHAPE
        ),
        hint=mistral.TAG,
    ),
    "pythonic": ToolFormat(
        parser=pythonic.PythonicParser, shape=lambda _: pythonic.SHAPE, hint="[func_name1("
    ),
    "llama3_json": ToolFormat(
        parser=llama3_json.Llama3JsonParser,
        shape=lambda _: llama3_json.SHAPE,
        hint='"parameters": dictionary of argument name',
    ),
    "hermes": ToolFormat(
        parser=hermes.HermesParser, shape=lambda _: hermes.SHAPE, hint=hermes.BEGIN
    ),
}


def format_of(template: str, wanted: str) -> ToolFormat:
    """Return the format of a model.

    Args:
        template: Source of its chat template; may be empty.
        wanted: A format's name, or `auto` for the first whose hint the template has, else hermes.
    """
    if wanted != "auto":
        return FORMATS[wanted]
    found = (one for one in FORMATS.values() if one.hint in template)
    return next(found, FORMATS["hermes"])
