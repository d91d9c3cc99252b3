"""How a model is told of tools and how it writes calls and thoughts; also as grammars."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from controller.errors import InvalidRequest
from controller.gateway import reasoning
from controller.gateway.tool_calls.formats import format_of
from controller.gateway.tool_calls.prompting import in_words
from controller.gateway.tool_calls.shape import ToolFunction
from functions.spec import ModelSpec

_READS_TOOLS = re.compile(r"\btools\b")


class Dialect:
    """What is known of a function's model beside its tokens.

    Args:
        template: Source of its chat template; may be empty.
        tokenizer: Knows which markers are special tokens.
        spec: May name formats.
    """

    def __init__(self, template: str, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        wanted = spec.reasoning_parser
        self.reasons = reasoning.CLOSE in template if wanted == "auto" else wanted == "think"
        self.format = format_of(template, spec.tool_call_parser)
        self._shape = self.format.shape(template)
        self._knows_tools = bool(_READS_TOOLS.search(template))
        markers = (*self.format.parser.markers, reasoning.OPEN, reasoning.CLOSE)
        ids = {marker: tokenizer.token_to_id(marker) for marker in markers}
        self.marker_ids = frozenset(found for found in ids.values() if found is not None)
        special = {
            token.content
            for token in tokenizer.get_added_tokens_decoder().values()
            if token.special
        }
        self._special = {marker: ids[marker] for marker in markers if marker in special}

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return messages and variables for the chat template.

        Args:
            messages: As they came; calls' arguments are JSON text.
            tools: As they came; what may be called now.
        """
        if not self._knows_tools:
            return in_words(messages, tools, self._shape), {}
        if not self.format.has_text_arguments:
            messages = [_with_objects(message) for message in messages]
        return [dict(message) for message in messages], {"tools": list(tools)} if tools else {}

    def calls_grammar(
        self, functions: Sequence[ToolFunction], *, is_parallel: bool, is_open: bool
    ) -> str:
        """Return the grammar of answers that call functions.

        Args:
            functions: Those that may be called; at least one.
            is_parallel: Whether several may be.
            is_open: Whether the prompt has begun a thought.
        """
        rules = self._shape.rules(functions, is_parallel=is_parallel, literal=self._literal)
        return f"start: {self._thought(is_open)} calls\n{rules}\n{self._thought_rules()}"

    def after_thought(self, grammar: str, *, is_open: bool) -> str:
        """Return the grammar of answers that match another one after the model has thought."""
        if not grammar or not self.reasons:
            return grammar
        lark = f"start: {self._thought(is_open)} @answer\n{self._thought_rules()}"
        if grammar.lstrip().startswith("{"):
            (answer,) = json.loads(grammar)["grammars"]
        else:
            answer = {"lark_grammar": grammar}
        return json.dumps({"grammars": [{"lark_grammar": lark}, {**answer, "name": "answer"}]})

    def _thought(self, is_open: bool) -> str:
        if not self.reasons:
            return ""
        return "thought" if is_open else f"({self._literal(reasoning.OPEN)} thought)?"

    def _thought_rules(self) -> str:
        if not self.reasons:
            return ""
        close = self._special.get(reasoning.CLOSE)
        if close is not None:
            return f"thought: /(.|\\n)*/ <[{close}]> /\\n*/"
        return (
            f"thought: thinking /\\n*/\nthinking[suffix={json.dumps(reasoning.CLOSE)}]: /(.|\\n)*/"
        )

    def _literal(self, text: str) -> str:
        """Return a text in Lark, with its special tokens as tokens."""
        if not self._special:
            return json.dumps(text, ensure_ascii=False) if text else ""
        parts = re.split("(" + "|".join(map(re.escape, self._special)) + ")", text)
        written = (
            f"<[{self._special[part]}]>"
            if part in self._special
            else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )
        return " ".join(written)


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose calls have their arguments as objects, which templates expect."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = [
        {**call, "function": {**call["function"], "arguments": _object(call["function"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _object(function: Mapping[str, Any]) -> Any:
    try:
        return json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"the arguments of an earlier call of {function['name']!r} are not JSON",
            param="messages",
        ) from error
