"""Bodies of /tokenize and /detokenize, in vLLM's shapes."""

from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, FailFast, Field, model_validator

from controller.gateway.schemas.base import ApiBody, Neutral, wrong_field
from controller.gateway.schemas.chat import MAX_MESSAGES, ChatMessage
from controller.gateway.schemas.tools import MAX_TOOLS, OfferedTools, Tool
from controller.gateway.schemas.turn import Turn

MAX_TOKENS = 1 << 20
OptionalModel = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=256,
        description="A function's served name; may be left out where only one is served.",
    ),
]


class TokenizeRequest(ApiBody):
    """A prompt or a conversation to count and split."""

    unsupported: ClassVar[dict[str, Neutral]] = {
        "chat_template": (),
        "mm_processor_kwargs": ({},),
    }

    model: OptionalModel = None
    prompt: str | None = Field(default=None, description="Text as it is; or send `messages`.")
    messages: list[ChatMessage] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_MESSAGES,
        description="A conversation, written out by the model's template.",
    )
    tools: list[Tool] | None = Field(
        default=None, max_length=MAX_TOOLS, description="Tools that the template tells of."
    )
    add_generation_prompt: bool | None = Field(
        default=None,
        description="Whether `messages` end with what opens the next answer; true by default.",
    )
    continue_final_message: bool | None = Field(
        default=None, description="Leave the last message open, as if its answer went on."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Variables for the model's chat template."
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Whether the tokenizer adds its own special tokens; null means so for a "
        "prompt only, since a template writes them itself.",
    )
    return_token_strs: bool | None = Field(
        default=None, description="Whether to return the tokens as the tokenizer spells them too."
    )

    @model_validator(mode="after")
    def _check_input(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise wrong_field("send either `prompt` or `messages`")
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong_field(
                "excludes 'add_generation_prompt': true", field="continue_final_message"
            )
        return self

    @cached_property
    def offered(self) -> OfferedTools:
        """The tools."""
        return OfferedTools(self.tools or (), None, is_parallel=True)

    @model_validator(mode="after")
    def _check_tools(self) -> "TokenizeRequest":
        _ = self.offered  # raises what is wrong with them
        return self

    @property
    def turn(self) -> Turn:
        """The conversation."""
        return Turn(
            messages=[message.variables() for message in self.messages or ()],
            offered=self.offered,
            field="messages",
            variables=self.chat_template_kwargs or {},
            is_continued=bool(self.continue_final_message),
            is_prompted=self.add_generation_prompt is not False,
            has_special_tokens=bool(self.add_special_tokens),
        )


class Tokens(BaseModel):
    """A text in tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(ApiBody):
    """Token ids to put together again."""

    model: OptionalModel = None
    tokens: Annotated[list[int], Field(max_length=MAX_TOKENS), FailFast()]

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, body: Any) -> Any:
        tokens = body.get("tokens") if isinstance(body, dict) else None
        if isinstance(tokens, list) and len(tokens) > MAX_TOKENS:  # before they are walked
            raise wrong_field(
                f"has {len(tokens)} ids; at most {MAX_TOKENS} are allowed", field="tokens"
            )
        return body


class Detokenized(BaseModel):
    """The text of some tokens, special ones included."""

    prompt: str
