"""Answers read by parsers, whole or in pieces."""

from collections.abc import Iterable
from typing import NamedTuple

from controller.gateway.tool_calls.base import Said, ToolCallParser


class Message(NamedTuple):
    """An answer put together: its content, and its calls as names and arguments."""

    content: str
    calls: list[tuple[str, str]]


def together(said: Iterable[Said]) -> Message:
    """Put parts together as clients do."""
    content = ""
    calls: list[tuple[str, str]] = []
    ids: set[str] = set()
    for part in said:
        content += part.content
        for delta in part.calls:
            if delta.call_id is not None:
                assert delta.name is not None
                assert delta.number == len(calls)
                ids.add(delta.call_id)
                calls.append((delta.name, ""))
            name, arguments = calls[delta.number]
            calls[delta.number] = (name, arguments + delta.arguments)
    assert len(ids) == len(calls)
    return Message(content, calls)


def read(parser: ToolCallParser, *pieces: str) -> Message:
    """Return what a parser makes of an answer that comes in these pieces."""
    return together([*map(parser.feed, pieces), parser.finish()])
