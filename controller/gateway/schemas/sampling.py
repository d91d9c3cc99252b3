"""Fields that steer generation, common to chat and text completions."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from controller.gateway.schemas.base import ApiBody, Neutral, wrong_field
from controller.gateway.schemas.structure import ResponseFormat, StructuredOutputs

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
INT64_MAX = (1 << 63) - 1

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
UNSUPPORTED: dict[str, Neutral] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "echo": (False,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "priority": (0,),
    "cache_salt": (),
}


class StreamOptions(ApiBody):
    """What a stream carries besides text."""

    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})
    unsupported: ClassVar[dict[str, Neutral]] = {"continuous_usage_stats": (False,)}

    include_usage: bool | None = Field(
        default=None, description="Send one more chunk at the end, with the usage and no choices."
    )


class SamplingBody(ApiBody):
    """A request for generated tokens."""

    ignored: ClassVar[frozenset[str]] = IGNORED
    unsupported: ClassVar[dict[str, Neutral]] = UNSUPPORTED

    model: str = Field(min_length=1, max_length=256, description="A function's served name.")
    max_tokens: int | None = Field(
        default=None, ge=1, le=INT64_MAX, description="Most tokens to generate."
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="0 is greedy; null takes the model author's recommendation, else 1.",
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Sample from the smallest set of tokens with this much probability.",
    )
    top_k: int | None = Field(
        default=None,
        ge=-1,
        le=(1 << 31) - 1,
        description="Sample from this many tokens; 0 and -1 mean all.",
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Drop tokens less probable than this share of the most probable one.",
    )
    seed: int | None = Field(default=None, ge=-INT64_MAX - 1, le=INT64_MAX)
    stop: tuple[str, ...] = Field(
        default=(),
        description=f"Up to {MAX_STOPS} strings that end the answer; they are not part of it.",
    )
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = Field(
        default=None, description="Tokens that end the answer."
    )
    ignore_eos: bool | None = Field(
        default=None, description="Generate on after the end-of-sequence token."
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="Text by default; or JSON, valid under a schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="What the answer must match, if `response_format` leaves it free."
    )
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(
        default=None, description="Only with `stream: true`."
    )

    @field_validator("stop", mode="plain", json_schema_input_type=str | list[str] | None)
    @classmethod
    def _check_stop(cls, value: Any) -> tuple[str, ...]:
        stops = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(stops, list):
            raise wrong_field("must be a string or a list of strings")
        if len(stops) > MAX_STOPS:
            raise wrong_field(f"has {len(stops)} entries; at most {MAX_STOPS} are allowed")
        for stop in stops:
            if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise wrong_field(f"must contain strings of 1 to {MAX_STOP_CHARS} characters only")
        return tuple(stops)

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _check_num_stop_token_ids(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) > MAX_STOP_TOKEN_IDS:  # before it is walked
            raise wrong_field(f"has {len(value)} ids; at most {MAX_STOP_TOKEN_IDS} are allowed")
        return value

    @model_validator(mode="after")
    def _check_stream_options(self) -> "SamplingBody":
        if self.stream_options is not None and not self.stream:
            raise wrong_field("only allowed with 'stream': true", field="stream_options")
        return self

    @model_validator(mode="after")
    def _check_structure(self) -> "SamplingBody":
        formatted = self.response_format
        if formatted and formatted.type != "text" and self.structured_outputs:
            raise wrong_field("excludes a response_format", field="structured_outputs")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """The limit the client asked for, if it did."""
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        """The field that the limit is in."""
        return "max_tokens"

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)
