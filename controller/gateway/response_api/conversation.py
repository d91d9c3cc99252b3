"""Items of the Responses API to messages of a conversation, as chat templates read them."""

from collections.abc import Iterable
from typing import Any

from controller.gateway.schemas.response_input import (
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
    MessageItem,
    ReasoningItem,
)

Message = dict[str, Any]


def messages_of(instructions: str | None, items: Iterable[Item]) -> list[Message]:
    """Return a conversation as messages; calls' arguments are JSON text.

    What the assistant thinks, says and calls without a word of anybody else is one message. What
    the system says at the beginning is one too, since many templates take no second.
    """
    messages: list[Message] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        if isinstance(item, FunctionCallOutputItem):
            output = "\n".join(item.output)
            messages.append({"role": "tool", "content": output, "tool_call_id": item.call_id})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            _say(messages, "user" if item.role == "user" else "system", "\n".join(item.content))
        else:
            _go_on(_assistant(messages), item)
    return messages


def _say(messages: list[Message], role: str, text: str) -> None:
    if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
        messages[0]["content"] += f"\n\n{text}"
    else:
        messages.append({"role": role, "content": text})


def _assistant(messages: list[Message]) -> Message:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _go_on(message: Message, item: MessageItem | FunctionCallItem | ReasoningItem) -> None:
    if isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        message.setdefault("tool_calls", []).append(call)
        return
    field = "content" if isinstance(item, MessageItem) else "reasoning_content"
    texts = [message.get(field), *(item.content or ())]
    message[field] = "\n".join(text for text in texts if text)
