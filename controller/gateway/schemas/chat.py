"""Bodies of /v1/chat/completions."""

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    FailFast,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from controller.gateway.schemas.base import ApiBody, Neutral, wrong_field
from controller.gateway.schemas.common import (
    ChatLogprobs,
    FinishReason,
    PromptLogprobs,
    Usage,
)
from controller.gateway.schemas.generation import GenerationBody
from controller.gateway.schemas.sampling import (
    IGNORED,
    INT64_MAX,
    MAX_LOGPROBS,
    REPLACED,
    UNSUPPORTED,
)
from controller.gateway.schemas.tools import (
    MAX_CALLS,
    MAX_TOOLS,
    OfferedTools,
    SentToolCall,
    Tool,
    ToolCall,
    ToolChoice,
)
from controller.gateway.schemas.turn import Turn

MAX_MESSAGES = 10_000  # validated on the event loop, so a body of nothing else must stay cheap


class TextPart(ApiBody):
    """One part of a message's content."""

    ignored: ClassVar[frozenset[str]] = frozenset({"cache_control", "prompt_cache_breakpoint"})

    type: Literal["text"]
    text: str


class ChatMessage(ApiBody):
    """One message of the conversation.

    The refused fields are those of an earlier answer, so that it can be sent back as it came.
    """

    ignored: ClassVar[frozenset[str]] = frozenset({"parsed"})
    unsupported: ClassVar[dict[str, Neutral]] = {
        "function_call": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = Field(
        default=None, description="Text, or text parts; may be null for the assistant."
    )
    name: str | None = None
    reasoning_content: str | None = Field(
        default=None, description="What the assistant thought, for templates that read it."
    )
    reasoning: str | None = Field(
        default=None, description="The same, as vLLM calls it; `reasoning_content` goes before it."
    )
    tool_calls: list[SentToolCall] | None = Field(
        default=None, max_length=MAX_CALLS, description="The calls the assistant made."
    )
    tool_call_id: str | None = Field(
        default=None, description="The call that a `tool` message has the result of."
    )

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
        if self.tool_calls and self.role != "assistant":
            raise wrong_field(f"not for the role {self.role!r}", field="tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise wrong_field("goes with the role 'tool'", field="tool_call_id")
        return self

    def variables(self) -> dict[str, Any]:
        """Return the message as chat templates read it; calls' arguments are JSON text.

        A message of calls only has no content: some templates look at that to find the calls.
        """
        role = "system" if self.role == "developer" else self.role
        calls = [call.model_dump() for call in self.tool_calls or ()]
        optional = {
            "name": self.name,
            "reasoning_content": self.reasoning_content or self.reasoning,
            "tool_calls": calls or None,
            "tool_call_id": self.tool_call_id,
        }
        content = self.content or (None if calls else "")
        fields = {name: value for name, value in optional.items() if value is not None}
        return {"role": role, "content": content, **fields}


class ChatCompletionRequest(GenerationBody):
    """A conversation to continue."""

    ignored: ClassVar[frozenset[str]] = IGNORED | {"prompt_cache_options"}
    unsupported: ClassVar[dict[str, Neutral]] = {
        **UNSUPPORTED,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "chat_template": (),
        "echo": (False,),
        "moderation": (),
    }
    replaced: ClassVar[dict[str, str]] = {
        **REPLACED,
        "functions": "tools",
        "function_call": "tool_choice",
    }
    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[
        list[ChatMessage],
        Field(min_length=1, max_length=MAX_MESSAGES, description="The conversation to continue."),
        FailFast(),
    ]
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=INT64_MAX, description="Goes before `max_tokens`, its older name."
    )
    logprobs: bool | None = Field(default=None, description="Tell how likely each token was.")
    top_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Likeliest tokens to tell beside each; needs `logprobs`.",
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="End the prompt with what opens an answer; true by default."
    )
    continue_final_message: bool | None = Field(
        default=None, description="Leave the last message open: the answer goes on with it."
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Whether the tokenizer adds special tokens; false by default, since templates "
        "write them themselves.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Variables for the model's chat template."
    )
    tools: list[Tool] | None = Field(
        default=None, max_length=MAX_TOOLS, description="What the model may call."
    )
    tool_choice: ToolChoice | None = Field(
        default=None,
        description="Whether it may (`auto`, the default), must (`required`, or one by name) or "
        "must not (`none`). That it must is enforced, and so are the arguments' schemas then.",
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="Whether one answer may have several calls; true by default."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        default=None, description="A variable of the model's chat template, if that reads it."
    )
    include_reasoning: bool | None = Field(
        default=None, description="Whether to tell what the model thought; true by default."
    )
    documents: list[dict[str, Any]] | None = Field(
        default=None, description="The chat template's `documents`."
    )

    @model_validator(mode="after")
    def _check_together(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong_field("only allowed with 'logprobs': true", field="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong_field(
                "excludes 'add_generation_prompt': true", field="continue_final_message"
            )
        return self

    @cached_property
    def offered(self) -> OfferedTools:
        """The tools that may be called."""
        is_parallel = self.parallel_tool_calls is not False
        return OfferedTools(self.tools or (), self.tool_choice, is_parallel=is_parallel)

    @model_validator(mode="after")
    def _check_tools(self) -> "ChatCompletionRequest":
        if self.offered.is_required and (self.is_formatted or self.structured_outputs is not None):
            raise wrong_field("a required call excludes a form of the text", field="tool_choice")
        return self

    @property
    def turn(self) -> Turn:
        """The conversation, and how it goes on."""
        variables: dict[str, Any] = {
            "documents": self.documents,
            "reasoning_effort": self.reasoning_effort,
        }
        known = {name: value for name, value in variables.items() if value is not None}
        return Turn(
            messages=[message.variables() for message in self.messages],
            offered=self.offered,
            field=self.prompt_field,
            variables={**known, **(self.chat_template_kwargs or {})},
            is_continued=bool(self.continue_final_message),
            is_prompted=self.add_generation_prompt is not False,
            has_special_tokens=bool(self.add_special_tokens),
            tells_thoughts=self.include_reasoning is not False,
        )

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell beside each token; None tells nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

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
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(default=None, description="The same, as vLLM calls it.")
    tool_calls: list[ToolCall] | None = None

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave fields out that say nothing, as OpenAI does."""
        fields: dict[str, Any] = handler(self)
        optional = ("reasoning_content", "reasoning", "tool_calls")
        return {name: value for name, value in fields.items() if value or name not in optional}


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """A whole answer to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


def _text_of(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text":
        raise wrong_field(f"has a part of type {str(kind)[:64]!r}; only text is supported")
    if not isinstance(text, str):
        raise wrong_field("has a text part without a string 'text'")
    if isinstance(part, dict) and len(part) > len(TextPart.model_fields):
        TextPart.screened(part)
    return text
