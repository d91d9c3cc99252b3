"""Bodies of /v1/chat/completions."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, FailFast, Field, field_validator, model_validator

from controller.gateway.schemas.base import ApiBody, Neutral, wrong_field
from controller.gateway.schemas.common import FinishReason, Usage
from controller.gateway.schemas.sampling import INT64_MAX, UNSUPPORTED, SamplingBody

MAX_MESSAGES = 10_000  # validated on the event loop, so a body of nothing else must stay cheap


class TextPart(BaseModel):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(ApiBody):
    """One message of the conversation.

    The refused fields are those of an earlier answer, so that it can be sent back as it came.
    """

    ignored: ClassVar[frozenset[str]] = frozenset({"reasoning", "reasoning_content"})
    unsupported: ClassVar[dict[str, Neutral]] = {
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: str | None = Field(
        default=None, description="Text, or text parts; may be null for the assistant."
    )
    name: str | None = None

    @field_validator("content", mode="plain", json_schema_input_type=str | list[TextPart] | None)
    @classmethod
    def _check_content(cls, value: Any) -> str | None:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise wrong_field("must be a string or a list of text parts")
        return "\n".join(_text_of(part) for part in value)

    @model_validator(mode="after")
    def _check_presence(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise wrong_field(f"required for the role {self.role!r}", field="content")
        return self

    def variables(self) -> dict[str, str]:
        """Return the message as chat templates read it."""
        role = "system" if self.role == "developer" else self.role
        fields = {"role": role, "content": self.content or ""}
        return fields if self.name is None else {**fields, "name": self.name}


class ChatCompletionRequest(SamplingBody):
    """A conversation to continue."""

    unsupported: ClassVar[dict[str, Neutral]] = {
        **UNSUPPORTED,
        "logprobs": (False,),
        "top_logprobs": (0,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "documents": ([],),
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), FailFast()]
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=INT64_MAX, description="Goes before `max_tokens`, its older name."
    )

    @property
    def max_new_tokens(self) -> int | None:
        """The limit the client asked for, if it did."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_field(self) -> str:
        """The field that the limit is in."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class AssistantMessage(BaseModel):
    """The generated message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """A whole answer to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


def _text_of(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text":
        raise wrong_field(f"has a part of type {str(kind)[:64]!r}; only text is supported")
    if not isinstance(text, str):
        raise wrong_field("has a text part without a string 'text'")
    return text
