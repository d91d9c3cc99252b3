"""Bodies of /v1/completions."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from controller.gateway.schemas.base import Neutral, wrong_field
from controller.gateway.schemas.common import (
    CompletionLogprobs,
    FinishReason,
    PromptLogprobs,
    Usage,
)
from controller.gateway.schemas.generation import GenerationBody
from controller.gateway.schemas.sampling import (
    INT64_MAX,
    MAX_CHOICES,
    MAX_LOGPROBS,
    UNSUPPORTED,
)

Prompt = str | list[int]


class CompletionRequest(GenerationBody):
    """Prompts to continue, as text or as token ids."""

    unsupported: ClassVar[dict[str, Neutral]] = {
        **UNSUPPORTED,
        "prompt_embeds": (),
    }

    prompt: list[Prompt] = Field(
        description="One prompt or a list of them; each is answered by the choice of its index."
    )

    max_tokens: int | None = Field(
        default=None,
        ge=0,
        le=INT64_MAX,
        description="Most tokens to generate, 16 by default; 0 only with `echo`.",
    )
    echo: bool | None = Field(default=None, description="Put the prompt before the answer.")
    suffix: str | None = Field(
        default=None,
        description="What follows the answer, for models that can fill in; refused for others.",
    )
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CHOICES,
        description="Generate so many answers to each prompt and return the `n` likeliest.",
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Tell how likely each token was, beside so many of the likeliest.",
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Whether the tokenizer adds special tokens to text prompts; true by default.",
    )

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise wrong_field(f"must be at least n, which is {self.n or 1}", field="best_of")
        if self.picks_best and self.stream:
            raise wrong_field("cannot be streamed: the best is known at the end", field="best_of")
        return self

    @model_validator(mode="after")
    def _check_max_tokens(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise wrong_field(
                "must be greater than or equal to 1, unless 'echo' is true", field="max_tokens"
            )
        return self

    @model_validator(mode="after")
    def _check_suffix(self) -> "CompletionRequest":
        if not self.suffix:
            return self
        if not all(isinstance(prompt, str) for prompt in self.prompt):
            raise wrong_field("only goes with prompts that are text", field="suffix")
        for name in ("echo", "truncate_prompt_tokens"):
            if getattr(self, name):
                raise wrong_field(f"excludes {name!r}", field="suffix")
        return self

    @property
    def echoes_prompt(self) -> bool:
        """Whether the prompt's text goes before the answer."""
        return bool(self.echo)

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens to know beside each of the prompt's; None for none."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in wanted if number is not None), default=None)

    @property
    def picks_best(self) -> bool:
        """Whether more answers are generated than returned."""
        return self.best_of is not None and self.best_of > (self.n or 1)

    @property
    def num_choices(self) -> int:
        """How many answers are generated to each prompt."""
        return self.best_of or self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to know beside each token; None tells nothing."""
        return 0 if self.logprobs is None and self.picks_best else self.logprobs

    @field_validator(
        "prompt", mode="plain", json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    )
    @classmethod
    def _check_prompt(cls, value: Any) -> list[Prompt]:
        return checked_prompts(value)


class CompletionChoice(BaseModel):
    """The continuation of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    """Whole continuations."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


def checked_prompts(value: Any) -> list[Prompt]:
    """Return the prompts of a field that is one or a list of them, as text or as token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong_field("must be a string, token ids, or a list of either, not empty")
    kinds = set(map(type, value))
    if kinds == {str} or (kinds == {list} and all(map(_is_token_ids, value))):
        return value
    if kinds == {int} and min(value) >= 0:
        return [value]
    raise wrong_field(
        "must be a string, a list of strings, a list of token ids, or a list of such lists"
    )


def _is_token_ids(values: list[Any]) -> bool:
    return set(map(type, values)) <= {int} and min(values, default=0) >= 0
