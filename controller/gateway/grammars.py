"""What an answer must match, as a grammar the engine follows.

A grammar is a string that llguidance reads: its JSON form, or its dialect of Lark. It goes to the
runtime as it is. It is made and checked here, without the model's tokens, so that a bad one is
refused before anything waits for it.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, grammar_from

from controller.errors import InvalidRequest

LONG_GRAMMAR_CHARS = 4096  # more is checked in a thread: above a millisecond
MAX_GRAMMAR_CHARS = 1 << 20
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def json_grammar(
    schema: Mapping[str, Any] | bool,
    *,
    has_whitespace: bool = False,
    whitespace_pattern: str | None = None,
) -> str:
    """Return a grammar of the JSON texts that are valid under a schema.

    They are compact unless whitespace is asked for: small models can go on with it for ever.

    Args:
        schema: JSON Schema. Keywords that cannot be followed are refused by `check_grammar`.
        has_whitespace: Whether whitespace may stand between tokens of JSON.
        whitespace_pattern: A regular expression for that whitespace.
    """
    options: dict[str, Any] = {"whitespace_flexible": has_whitespace or bool(whitespace_pattern)}
    if whitespace_pattern:
        options["whitespace_pattern"] = whitespace_pattern
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    text = json.dumps(schema)  # the library itself would refuse what JSON has to escape
    return LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]


def regex_grammar(pattern: str) -> str:
    """Return a grammar of the texts that match a regular expression as a whole."""
    return LLMatcher.grammar_from_regex(pattern)


def choice_grammar(choices: Sequence[str]) -> str:
    """Return a grammar of some texts."""
    return "start: " + " | ".join(map(json.dumps, choices))


def text_grammar(text: str) -> str:
    """Return a grammar that is written as Lark or as GBNF.

    Raises:
        ValueError: It is GBNF, and cannot be read.
    """
    return grammar_from("grammar", text)


async def check_grammar(grammar: str, *, param: str) -> None:
    """Refuse a grammar that cannot be followed.

    Args:
        grammar: As the functions above return it.
        param: The request's field that it comes from.

    Raises:
        InvalidRequest: With the reason.
    """
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(f"{param}: is longer than {MAX_GRAMMAR_CHARS} characters", param=param)
    if len(grammar) > LONG_GRAMMAR_CHARS:
        reason = await asyncio.to_thread(LLMatcher.validate_grammar, grammar)
    else:
        reason = LLMatcher.validate_grammar(grammar)
    if reason:
        raise InvalidRequest(f"{param}: cannot be followed: {reason.strip()}", param=param)
