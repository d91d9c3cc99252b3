"""Llama 3.2 and 4: `[name(key=value, …), …]`, with Python's literals."""

import ast
import json
import warnings
from typing import Any

from controller.gateway.scanning import MalformedText, Steps
from controller.gateway.tool_calls.base import ToolCallParser
from controller.gateway.tool_calls.names import is_name
from controller.gateway.tool_calls.shape import CallShape

BEGIN = "<|python_start|>"
END = "<|python_end|>"
MAX_CALL_CHARS = 1 << 18
SHAPE = CallShape(
    opening="[",
    before_name="",
    before_arguments="(",
    after_arguments=")",
    separator=", ",
    closing="]",
    has_keywords=True,
)
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_JSON_NAMES = {"true": True, "false": False, "null": None}


class PythonicParser(ToolCallParser):
    """Reads a list of calls at the answer's beginning; each is known when it is complete."""

    markers = (BEGIN, END)

    def _read(self) -> Steps[None]:
        scanner = self._scanner
        yield from scanner.skip_space()
        if (yield from scanner.accept(BEGIN)):
            yield from scanner.skip_space()
        if (yield from scanner.accept("[")):
            yield from self._list()
        else:
            self._say(scanner.text[: scanner.at])
        if not self._has_enough:
            yield from self._say_rest()

    def _list(self) -> Steps[None]:
        scanner, start = self._scanner, 0
        while True:
            yield from scanner.skip_space()
            if not (yield from self._attempt(start, self._call())) or self._has_enough:
                return
            start = scanner.at
            yield from scanner.skip_space()
            if not (yield from scanner.accept(",")):
                if (yield from scanner.accept("]")):
                    yield from scanner.skip_space()
                    yield from scanner.accept(END)
                return

    def _call(self) -> Steps[None]:
        name = yield from self._scanner.word(is_name)
        self._check_name(name)
        start = self._scanner.at
        yield from self._parenthesized()
        self._begin(name, _arguments(self._scanner.text[start : self._scanner.at]))

    def _parenthesized(self) -> Steps[None]:
        """Read from a parenthesis to the one that closes it."""
        scanner = self._scanner
        yield from scanner.expect("(")
        closing = [")"]
        while closing:
            char = yield from scanner.peek()
            if not char:
                raise MalformedText
            if char in "\"'":
                yield from scanner.string(char)
                continue
            scanner.at += 1
            if char in _BRACKETS:
                closing.append(_BRACKETS[char])
            elif char in ")]}" and char != closing.pop():
                raise MalformedText


def _arguments(source: str) -> str:
    """Return the keyword arguments in a pair of parentheses as a JSON object."""
    if len(source) > MAX_CALL_CHARS:
        raise MalformedText
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            call = ast.parse("f" + source, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not all(k.arg for k in call.keywords):
            raise MalformedText
        values = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MalformedText from error


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise MalformedText


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise MalformedText
