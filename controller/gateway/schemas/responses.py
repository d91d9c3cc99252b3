"""Body of POST /v1/responses."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from controller.gateway.response_api.conversation import messages_of
from controller.gateway.schemas.base import ApiBody, Neutral, wrong_field
from controller.gateway.schemas.batches import checked_metadata
from controller.gateway.schemas.response_input import Item, Items
from controller.gateway.schemas.sampling import (
    IGNORED,
    INT64_MAX,
    MAX_LOGPROBS,
    UNSUPPORTED,
    SamplingBody,
)
from controller.gateway.schemas.structure import JsonSchema, ResponseFormat
from controller.gateway.schemas.tools import (
    MAX_TOOLS,
    AllowedToolChoice,
    AllowedTools,
    FunctionDefinition,
    FunctionName,
    NamedToolChoice,
    OfferedTools,
    Tool,
    ToolChoice,
)
from controller.gateway.schemas.turn import Turn

LOGPROBS = "message.output_text.logprobs"


class FunctionTool(FunctionDefinition):
    """A function the model may call."""

    unsupported: ClassVar[dict[str, Neutral]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]

    @property
    def tool(self) -> Tool:
        """The tool as chat completions have it."""
        fields = {name: getattr(self, name) for name in FunctionDefinition.model_fields}
        return Tool(type="function", function=FunctionDefinition(**fields))


class FunctionChoice(ApiBody):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class AllowedFunctions(ApiBody):
    """Some of the tools, and whether one must be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1, max_length=MAX_TOOLS)


ResponseToolChoice = Literal["none", "auto", "required"] | FunctionChoice | AllowedFunctions


class TextFormat(JsonSchema):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(  # type: ignore[assignment]  # only one of the three has a name
        default=None,
        min_length=1,
        max_length=64,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Required for the type `json_schema`.",
    )

    @model_validator(mode="after")
    def _check_schema(self) -> "TextFormat":
        if self.type == "json_schema":
            missing = "name" if self.name is None else "schema" if self.schema_ is None else None
            if missing is not None:
                raise wrong_field("required for the type 'json_schema'", field=missing)
        elif (self.name, self.schema_, self.strict) != (None, None, None):
            raise wrong_field("goes with the type 'json_schema'", field="schema")
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the form as responses tell it."""
        if self.type != "json_schema":
            return {"type": self.type}
        return self.model_dump(by_alias=True)

    @property
    def response_format(self) -> ResponseFormat:
        """The form as chat completions have it."""
        if self.type != "json_schema":
            return ResponseFormat(type=self.type)
        fields = {"name": self.name, "schema": self.schema_, "strict": self.strict}
        return ResponseFormat(type=self.type, json_schema=JsonSchema.model_validate(fields))


class TextConfig(ApiBody):
    """What the text is like."""

    unsupported: ClassVar[dict[str, Neutral]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ReasoningConfig(ApiBody):
    """How the model thinks.

    Thoughts are told as they are, in the content of reasoning items, so a summary adds nothing.
    """

    ignored: ClassVar[frozenset[str]] = frozenset({"summary", "generate_summary"})
    unsupported: ClassVar[dict[str, Neutral]] = {
        "context": ("auto",),
        "mode": ("standard",),
    }

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="A variable of the model's chat template, if that reads it."
    )


class ResponseStreamOptions(ApiBody):
    """What a stream carries besides its events: nothing that can be chosen."""

    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})


class ResponseRequest(SamplingBody):
    """A conversation to continue."""

    ignored: ClassVar[frozenset[str]] = (IGNORED - {"metadata", "store"}) | {
        "max_tool_calls",
        "prompt_cache_options",
    }
    unsupported: ClassVar[dict[str, Neutral]] = {
        **UNSUPPORTED,
        "access_programs": (),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "moderation": (),
        "prompt": (),
        "request_id": (),
    }
    prompt_field: ClassVar[str] = "input"
    format_field: ClassVar[str] = "text.format"

    input: Items = Field(
        description="What follows the earlier conversation: text of the user, or items: messages, "
        "`function_call`, `function_call_output`, `reasoning`. Content is text."
    )
    instructions: str | None = Field(
        default=None, description="A system message in front; not kept for the next response."
    )
    previous_response_id: str | None = Field(
        default=None, max_length=128, description="A kept response that this one goes on from."
    )
    store: bool | None = Field(
        default=None, description="Whether the response is kept for its caller; true by default."
    )
    background: bool | None = Field(
        default=None,
        description="Accept the request now and answer it later; fetch the response by its id.",
    )
    metadata: dict[str, str] | None = Field(
        default=None, description="Up to 16 pairs of text, kept and shown."
    )
    max_output_tokens: int | None = Field(
        default=None, ge=1, le=INT64_MAX, description="Most tokens to generate, thoughts included."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None,
        description="`auto` leaves out the oldest turns that there is no room for; `disabled`, "
        "the default, refuses.",
    )
    text: TextConfig | None = Field(
        default=None, description="`format`: text by default; or JSON, valid under a schema."
    )
    reasoning: ReasoningConfig | None = Field(
        default=None,
        description="`effort`: a variable of the model's chat template, if it reads it.",
    )
    tools: list[FunctionTool] | None = Field(
        default=None, max_length=MAX_TOOLS, description="Functions the model may call."
    )
    tool_choice: ResponseToolChoice | None = Field(
        default=None,
        description="Whether it may (`auto`, the default), must (`required`, or one by name) or "
        "must not (`none`). That it must is enforced, and so are the arguments' schemas then.",
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="Whether one answer may have several calls; true by default."
    )
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        Field(
            default=None,
            description="`message.output_text.logprobs` tells how likely each token was. "
            "`reasoning.encrypted_content` is accepted and adds nothing: thoughts are told in "
            "plain text and can be sent back so.",
        )
    )
    top_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Likeliest tokens to tell beside each; asks for log-probabilities too.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Variables for the model's chat template."
    )
    stream_options: ResponseStreamOptions | None = Field(
        default=None, description="Only with `stream: true`."
    )

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        return checked_metadata(metadata)

    @model_validator(mode="after")
    def _check_background(self) -> "ResponseRequest":
        if self.background and (self.stream or not self.is_kept):
            raise wrong_field(
                "excludes 'stream': true and 'store': false: the response is fetched by its id",
                field="background",
            )
        return self

    @model_validator(mode="after")
    def _check_stream_options(self) -> "ResponseRequest":
        if self.stream_options is not None and not self.stream:
            raise wrong_field("only allowed with 'stream': true", field="stream_options")
        return self

    @cached_property
    def offered(self) -> OfferedTools:
        """The tools that may be called."""
        return OfferedTools(
            [tool.tool for tool in self.tools or ()],
            _chat_choice(self.tool_choice),
            is_parallel=self.parallel_tool_calls is not False,
        )

    @model_validator(mode="after")
    def _check_tools(self) -> "ResponseRequest":
        if self.offered.is_required and (self.is_formatted or self.structured_outputs is not None):
            raise wrong_field("a required call excludes a form of the text", field="tool_choice")
        return self

    def turn_of(self, items: Iterable[Item]) -> Turn:
        """Return the turn that follows a conversation, this request's own items included."""
        effort = self.reasoning and self.reasoning.effort
        known = {} if effort is None else {"reasoning_effort": effort}
        return Turn(
            messages=messages_of(self.instructions, items),
            offered=self.offered,
            field=self.prompt_field,
            variables={**known, **(self.chat_template_kwargs or {})},
            is_cut=self.truncation == "auto",
        )

    @property
    def is_kept(self) -> bool:
        """Whether the response can be fetched later."""
        return self.store is not False

    @property
    def formatted(self) -> ResponseFormat | None:
        """The form of the answer, as OpenAI's fields ask for it."""
        if self.text is None or self.text.format is None:
            return None
        return self.text.format.response_format

    @property
    def max_new_tokens(self) -> int | None:
        """The limit the client asked for, if it did."""
        return self.max_output_tokens

    @property
    def limit_field(self) -> str:
        """The field that the limit is in."""
        return "max_output_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell beside each token; None tells nothing."""
        is_told = bool(self.top_logprobs) or LOGPROBS in (self.include or ())
        return (self.top_logprobs or 0) if is_told else None


def _chat_choice(choice: ResponseToolChoice | None) -> ToolChoice | None:
    """Return a choice as chat completions have it."""
    if isinstance(choice, FunctionChoice):
        return _named(choice)
    if isinstance(choice, AllowedFunctions):
        allowed = AllowedTools(mode=choice.mode, tools=[_named(one) for one in choice.tools])
        return AllowedToolChoice(type="allowed_tools", allowed_tools=allowed)
    return choice


def _named(choice: FunctionChoice) -> NamedToolChoice:
    return NamedToolChoice(type="function", function=FunctionName(name=choice.name))
