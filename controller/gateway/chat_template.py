"""Messages to prompt text, by the template that comes with the model.

Templates are foreign code: they run in a sandbox, with the globals and filters model authors
expect of Hugging Face's renderer, and whatever they raise is an answer to the client.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from controller.errors import InvalidRequest


class ChatTemplate:
    """One compiled template with the special tokens it may name.

    Args:
        source: Jinja source; a syntax error raises jinja2.TemplateSyntaxError.
        special_tokens: Token text by name, e.g. `bos_token`.
        strftime_now: Formats the current time; some templates print a date.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        strftime_now: Callable[[str], str],
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, LoopControlExtension],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = strftime_now
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Return the prompt that asks for the assistant's next message.

        Args:
            messages: The conversation.
            add_generation_prompt: Whether it ends with what opens that message.
            variables: What else the template may read, e.g. `tools`.

        Raises:
            InvalidRequest: The template refuses these messages, with its own words.
        """
        context: dict[str, Any] = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(context)
        except Exception as error:  # a template can raise anything at all
            reason = str(error) or type(error).__name__
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {reason}", param="messages"
            ) from error


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks training targets; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  # declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace Jinja's own filter, which escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
