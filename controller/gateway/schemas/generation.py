"""Fields that chat and text completions share beyond those of sampling."""

from typing import ClassVar

from pydantic import Field, model_validator

from controller.gateway.schemas.base import ApiBody, wrong_field
from controller.gateway.schemas.sampling import (
    INT64_MAX,
    MAX_CHOICES,
    MAX_LOGPROBS,
    SamplingBody,
)
from controller.gateway.schemas.structure import ResponseFormat


class StreamOptions(ApiBody):
    """What a stream carries besides text."""

    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    continuous_usage_stats: bool | None = Field(
        default=None, description="Send the usage so far with every chunk."
    )
    include_usage: bool | None = Field(
        default=None, description="Send one more chunk at the end, with the usage and no choices."
    )


class GenerationBody(SamplingBody):
    """A request for choices."""

    max_tokens: int | None = Field(
        default=None, ge=1, le=INT64_MAX, description="Most tokens to generate."
    )
    n: int | None = Field(
        default=None, ge=1, le=MAX_CHOICES, description="Answers to each prompt; 1 by default."
    )
    return_token_ids: bool | None = Field(
        default=None, description="Return the ids of prompt and answer too."
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Tell how likely the prompt's tokens were, beside so many of the likeliest; "
        "not in streams.",
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="Text by default; or JSON, valid under a schema."
    )
    stream_options: StreamOptions | None = Field(
        default=None, description="Only with `stream: true`."
    )

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise wrong_field("only allowed with 'stream': true", field="stream_options")
        return self

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> "GenerationBody":
        if self.prompt_logprobs is not None and self.stream:
            raise wrong_field("cannot be streamed", field="prompt_logprobs")
        return self

    @property
    def formatted(self) -> ResponseFormat | None:
        """The form of the answer, as OpenAI's fields ask for it."""
        return self.response_format

    @property
    def max_new_tokens(self) -> int | None:
        """The limit the client asked for, if it did."""
        return self.max_tokens

    @property
    def num_choices(self) -> int:
        """How many answers are generated to each prompt."""
        return self.n or 1

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens to know beside each of the prompt's; None for none."""
        return self.prompt_logprobs

    @property
    def reports_tokens(self) -> bool:
        """Whether something is to be told of the answer's tokens."""
        return self.num_logprobs is not None or bool(self.return_token_ids)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continues_usage(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
