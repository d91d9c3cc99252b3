"""Bodies of /v1/completions."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator

from controller.gateway.schemas.base import Neutral, wrong_field
from controller.gateway.schemas.common import FinishReason, Usage
from controller.gateway.schemas.sampling import UNSUPPORTED, SamplingBody

Prompt = str | list[int]


class CompletionRequest(SamplingBody):
    """Prompts to continue, as text or as token ids."""

    unsupported: ClassVar[dict[str, Neutral]] = {
        **UNSUPPORTED,
        "best_of": (1,),
        "logprobs": (),
        "suffix": ("",),
        "prompt_embeds": (),
        "add_special_tokens": (True,),
    }

    prompt: list[Prompt] = Field(
        description="One prompt or a list of them; each is answered by the choice of its index."
    )

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
    logprobs: None = None
    finish_reason: FinishReason


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
    if _all_of(value, str) or (_all_of(value, list) and all(map(_is_token_ids, value))):
        return value
    if _is_token_ids(value):
        return [value]
    raise wrong_field(
        "must be a string, a list of strings, a list of token ids, or a list of such lists"
    )


def _all_of(values: list[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


def _is_token_ids(values: list[Any]) -> bool:
    return _all_of(values, int) and all(value >= 0 for value in values)
