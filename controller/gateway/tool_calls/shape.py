"""How a format writes calls, and the grammar of answers that are such calls."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COMPACT = {"x-guidance": {"whitespace_flexible": False}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFunction:
    """A tool that is offered: its name, and the JSON Schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallShape:
    """The text of calls, around their names and arguments.

    Attributes:
        opening: Before the first call.
        before_name: Begins a call.
        before_arguments: Between name and arguments.
        after_arguments: Ends a call.
        separator: Between calls.
        closing: After the last call.
        has_keywords: Whether arguments are written `key=value, …`.
    """

    opening: str = ""
    before_name: str
    before_arguments: str
    after_arguments: str
    separator: str
    closing: str = ""
    has_keywords: bool = False

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """Return calls, as names and JSON objects, as a model would have written them."""
        written = (
            f"{self.before_name}{name}{self.before_arguments}{arguments}{self.after_arguments}"
            for name, arguments in calls
        )
        return f"{self.opening}{self.separator.join(written)}{self.closing}"

    def rules(
        self,
        functions: Sequence[ToolFunction],
        *,
        is_parallel: bool,
        literal: Callable[[str], str],
    ) -> str:
        """Return the Lark rule `calls`, at least one call of these functions.

        Args:
            functions: At least one.
            is_parallel: Whether there may be more than one call.
            literal: Writes a text that may contain the format's markers.
        """
        more = f" ({_items(literal, self.separator, 'call')})*" if is_parallel else ""
        lines = [
            f"calls: {_items(literal, self.opening, 'call')}{more} {literal(self.closing)}",
            "call: " + " | ".join(f"call_{number}" for number in range(len(functions))),
        ]
        for number, function in enumerate(functions):
            head = literal(f"{self.before_name}{function.name}{self.before_arguments}")
            arguments = f"arguments_{number}"
            lines.append(f"call_{number}: {head} {arguments} {literal(self.after_arguments)}")
            if self.has_keywords:
                lines += _keyword_rules(arguments, function.parameters)
            else:
                lines.append(json_rule(arguments, function.parameters))
        return "\n".join(lines)


def json_rule(name: str, schema: Mapping[str, Any]) -> str:
    """Return a Lark rule for compact JSON that is valid under a schema."""
    return f"{name}: %json {json.dumps({**schema, **COMPACT})}"


def _items(literal: Callable[[str], str], *parts: str) -> str:
    before, rule = parts
    return f"{literal(before)} {rule}".strip()


def _keyword_rules(name: str, schema: Mapping[str, Any]) -> list[str]:
    """Return rules for `key=value, …`: what is required first, then what is not, in order."""
    properties = schema.get("properties") or {}
    required = [key for key in properties if key in (schema.get("required") or ())]
    optional = [key for key in properties if key not in required]
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    numbers = {key: number for number, key in enumerate(properties)}
    lines = [
        json_rule(
            f"{name}_{number}",
            {**(properties[key] if properties[key] is not True else {}), **shared},
        )
        for key, number in numbers.items()
    ]

    def item(key: str) -> str:
        return f"{json.dumps(key + '=')} {name}_{numbers[key]}"

    def tail(keys: Sequence[str]) -> str:
        return " ".join(f'(", " {item(key)})?' for key in keys)

    if required:
        head = ' ", " '.join(map(item, required))
        body = f"{head} {tail(optional)}"
    else:
        starts = [f"{item(key)} {tail(optional[at + 1 :])}" for at, key in enumerate(optional)]
        body = " | ".join(['""', *starts])
    return [f"{name}: {body}", *lines]
