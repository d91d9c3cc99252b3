"""Tools in words, for models whose chat template does not know of them.

They are told of the tools, and shown earlier calls, as Hermes and Qwen models are.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from controller.gateway.tool_calls.shape import CallShape


def in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], shape: CallShape
) -> list[dict[str, Any]]:
    """Return a conversation without tools: they are in the system message, calls are text.

    Args:
        messages: The conversation; calls' arguments are JSON text.
        tools: What may be called now.
        shape: How calls are written.
    """
    plain = [_plain(message, shape) for message in messages]
    if not tools:
        return plain
    told = _describe(tools, shape)
    if plain[0]["role"] != "system":
        return [{"role": "system", "content": told}, *plain]
    return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]


def _plain(message: Mapping[str, Any], shape: CallShape) -> dict[str, Any]:
    content = message["content"] or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if calls:
        written = shape.write([(call["name"], call["arguments"]) for call in calls])
        content = f"{content}\n{written}".strip()
    return {**rest, "content": content}


def _describe(tools: Sequence[Mapping[str, Any]], shape: CallShape) -> str:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = shape.write([("NAME", '{"ARGUMENT": VALUE}')])
    return (
        "You may call functions to help with the user's request. These are described between "
        f"<tools></tools>:\n<tools>\n{lines}\n</tools>\n\n"
        f"To call a function, answer in this form, with nothing after it:\n{example}"
    )
