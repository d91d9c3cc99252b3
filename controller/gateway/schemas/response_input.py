"""Items of a conversation, as the Responses API takes them: what was said, called and thought.

An item of an answer can be sent back as it came.
"""

import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter

from controller.gateway.schemas.base import ApiBody, Neutral, wrong_field
from controller.gateway.schemas.chat import MAX_MESSAGES

Status = Literal["in_progress", "completed", "incomplete"]
Json = dict[str, Any]


class InputText(ApiBody):
    """Text that the model reads; of an earlier answer, as it came."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"annotations", "cache_control", "logprobs", "prompt_cache_breakpoint"}
    )

    type: Literal["input_text", "output_text", "text", "reasoning_text"]
    text: str


class _Refusal(ApiBody):
    type: Literal["refusal"]
    refusal: str


def _texts(value: Any) -> list[str]:
    """Return the texts of a content, which is one or a list of parts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong_field("must be a string or a list of text parts")
    return [_text_of(part) for part in value]


def _text_of(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in _TEXT_FIELDS:
        raise wrong_field(f"has a part of type {str(kind)[:64]!r}; only text is supported")
    text = part.get(_TEXT_FIELDS[kind])
    if not isinstance(text, str):
        raise wrong_field(f"has a part of type {kind!r} without a string {_TEXT_FIELDS[kind]!r}")
    if len(part) > len(_Refusal.model_fields):
        (_Refusal if kind == "refusal" else InputText).screened(part)
    return text


_TEXT_FIELDS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "refusal": "refusal",
    "reasoning_text": "text",
}
Texts = Annotated[
    list[str],
    BeforeValidator(_texts, json_schema_input_type=str | list[InputText]),
    Field(description="Text, or text parts."),
]


class _Item(ApiBody):
    """What all items have.

    The ignored fields are those of an answer that say nothing about the conversation.
    """

    ignored: ClassVar[frozenset[str]] = frozenset({"status"})
    prefix: ClassVar[str]

    id: str | None = Field(default=None, max_length=128)

    def to_json(self) -> Json:
        """Return the item as the API lists it."""
        return {"id": self.id or f"{self.prefix}_{uuid.uuid4().hex}", **self._fields()}

    def _fields(self) -> Json:
        raise NotImplementedError


class MessageItem(_Item):
    """A message of the user, of the system, or of the assistant."""

    ignored: ClassVar[frozenset[str]] = frozenset({"status", "phase"})
    prefix: ClassVar[str] = "msg"

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts

    def _fields(self) -> Json:
        if self.role == "assistant":
            parts = [
                {"type": "output_text", "text": one, "annotations": []} for one in self.content
            ]
        else:
            parts = [{"type": "input_text", "text": one} for one in self.content]
        status = "completed"
        return {"type": "message", "role": self.role, "status": status, "content": parts}


class FunctionCallItem(_Item):
    """A call that the model made."""

    ignored: ClassVar[frozenset[str]] = frozenset({"status", "parsed_arguments"})
    unsupported: ClassVar[dict[str, Neutral]] = {
        "async": (False,),
        "caller": ({"type": "direct"},),
        "namespace": (),
    }
    prefix: ClassVar[str] = "fc"

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str = Field(description="JSON text.")

    def _fields(self) -> Json:
        return {**self.model_dump(exclude={"id"}), "status": "completed"}


class FunctionCallOutputItem(_Item):
    """What a call returned."""

    unsupported: ClassVar[dict[str, Neutral]] = {
        "caller": ({"type": "direct"},),
        "namespace": (),
    }
    ignored: ClassVar[frozenset[str]] = frozenset({"status", "name"})
    prefix: ClassVar[str] = "fco"

    type: Literal["function_call_output"]
    call_id: str
    output: Texts

    def _fields(self) -> Json:
        output = "\n".join(self.output)
        return {"type": self.type, "call_id": self.call_id, "output": output, "status": "completed"}


class ReasoningItem(_Item):
    """What the model thought."""

    ignored: ClassVar[frozenset[str]] = frozenset({"status", "summary"})
    unsupported: ClassVar[dict[str, Neutral]] = {"encrypted_content": ()}
    prefix: ClassVar[str] = "rs"

    type: Literal["reasoning"]
    content: Texts | None = None

    def _fields(self) -> Json:
        parts = [{"type": "reasoning_text", "text": text} for text in self.content or ()]
        return {"type": self.type, "summary": [], "content": parts, "status": "completed"}


def _kind(item: object) -> str:
    """Return the tag of an item; one without a type is a message."""
    kind = item.get("type", "message") if isinstance(item, dict) else "none"
    return f"<{kind}>"


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(
        _kind,
        custom_error_type="wrong_field",
        custom_error_message="type of item",
        custom_error_context={
            "reason": "must be an item of type message, function_call, function_call_output or "
            "reasoning",
            "field": "type",
        },
    ),
]
"""One item; the tags are in angle brackets so that error messages can leave them out."""


def _items(value: Any) -> Any:
    """Read a text as what the user says; check the number of items before they are walked."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and not 1 <= len(value) <= MAX_MESSAGES:
        raise wrong_field(f"has {len(value)} items; 1 to {MAX_MESSAGES} are allowed")
    return value


Items = Annotated[list[Item], BeforeValidator(_items, json_schema_input_type=str | list[Item])]

STORED_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
"""Reads what `to_json` has written, and the items of answers."""
