"""Tools in requests, and calls of them in messages."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from controller.gateway.schemas.base import ApiBody, wrong_field
from controller.gateway.tool_calls.names import NAME_PATTERN
from controller.gateway.tool_calls.shape import ToolFunction

MAX_TOOLS = 128
MAX_CALLS = 1024  # in one message


class FunctionDefinition(ApiBody):
    """A function the model may call."""

    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        default=None, description="JSON Schema of the arguments; none if it is left out."
    )
    strict: bool | None = Field(
        default=None,
        description="Arguments follow the schema whenever a call is required or named, whatever "
        "this says.",
    )


class Tool(ApiBody):
    """A tool: a function."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(ApiBody):
    """A function by its name."""

    name: str


class NamedToolChoice(ApiBody):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(ApiBody):
    """Some of the tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolChoice(ApiBody):
    """The tools that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolChoice


class CalledFunction(ApiBody):
    """A function that was called."""

    ignored: ClassVar[frozenset[str]] = frozenset({"parsed_arguments"})

    name: str
    arguments: str = Field(description="JSON text.")


class SentToolCall(ApiBody):
    """A call of an earlier answer, sent back."""

    ignored: ClassVar[frozenset[str]] = frozenset({"index"})

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class FunctionCall(BaseModel):
    """A function that the model calls."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call the model makes; the caller carries it out."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class OfferedTools:
    """What may be called in one answer.

    Args:
        tools: All that were sent.
        choice: What was said of them.
        is_parallel: Whether one answer may have several calls.

    Raises:
        PydanticCustomError: They do not go together.

    Attributes:
        tools: Those that may be called.
        is_required: Whether at least one must be.
    """

    def __init__(
        self, tools: Sequence[Tool], choice: ToolChoice | None, *, is_parallel: bool
    ) -> None:
        names = [tool.function.name for tool in tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise wrong_field(f"has two functions named {twice!r}", field="tools")
        if choice not in (None, "none", "auto") and not tools:
            raise wrong_field("needs 'tools'", field="tool_choice")
        self.is_parallel = is_parallel
        self.is_required = choice == "required"
        wanted: list[str] | None = [] if choice == "none" else None
        if isinstance(choice, NamedToolChoice):
            wanted, self.is_required, self.is_parallel = [choice.function.name], True, False
        elif isinstance(choice, AllowedToolChoice):
            wanted = [tool.function.name for tool in choice.allowed_tools.tools]
            self.is_required = choice.allowed_tools.mode == "required"
        unknown = next((name for name in wanted or () if name not in names), None)
        if unknown is not None:
            raise wrong_field(
                f"names {unknown[:64]!r}, which is not in 'tools'", field="tool_choice"
            )
        self.tools = [tool for tool in tools if wanted is None or tool.function.name in wanted]

    @property
    def names(self) -> frozenset[str]:
        """The names of those that may be called."""
        return frozenset(tool.function.name for tool in self.tools)

    @property
    def functions(self) -> list[ToolFunction]:
        """Those that may be called, as grammars are made of them."""
        return [
            ToolFunction(
                name=tool.function.name,
                parameters=tool.function.parameters
                or {"type": "object", "properties": {}, "additionalProperties": False},
            )
            for tool in self.tools
        ]

    @property
    def descriptions(self) -> list[Mapping[str, Any]]:
        """Those that may be called, as chat templates read them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]
