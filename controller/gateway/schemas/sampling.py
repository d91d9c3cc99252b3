"""Fields that steer generation, common to all bodies that ask for it."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from controller.gateway.schemas.base import ApiBody, Neutral, wrong_field
from controller.gateway.schemas.structure import ResponseFormat, StructuredOutputs

MAX_CHOICES = 128  # of one prompt
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 1 << 18
INT64_MAX = (1 << 63) - 1

IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "user",
    }
)
UNSUPPORTED: dict[str, Neutral] = {
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "spaces_between_special_tokens": (True,),
    "logits_processors": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": ({},),
    "logprob_token_ids": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "stream_interval": (1,),
    "thinking_token_budget": (),
    "vllm_xargs": ({},),
}
REPLACED = {name: "structured_outputs" for name in UNSUPPORTED if name.startswith("guided_")}
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, le=(1 << 32) - 1)]


class SamplingBody(ApiBody):
    """A request for generated tokens."""

    ignored: ClassVar[frozenset[str]] = IGNORED
    unsupported: ClassVar[dict[str, Neutral]] = UNSUPPORTED
    replaced: ClassVar[dict[str, str]] = REPLACED
    prompt_field: ClassVar[str] = "prompt"
    format_field: ClassVar[str] = "response_format"

    model: str = Field(min_length=1, max_length=256, description="A function's served name.")
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description="0 is greedy; null takes the model author's recommendation, else 1.",
    )
    top_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Sample from the smallest set of tokens with this much probability; 0 takes "
        "the likeliest.",
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
    seed: int | None = Field(
        default=None,
        ge=-INT64_MAX - 1,
        le=INT64_MAX,
        description="Makes sampling repeatable; of several answers, each gets its own.",
    )
    presence_penalty: Penalty | None = Field(
        default=None, description="Taken from the logits of tokens that are in the answer."
    )
    frequency_penalty: Penalty | None = Field(
        default=None, description="The same, for every time they are."
    )
    repetition_penalty: float | None = Field(
        default=None,
        gt=0,
        le=100,
        allow_inf_nan=False,
        description="Makes tokens of prompt and answer less likely above 1, more below.",
    )
    logit_bias: dict[str, float] | None = Field(
        default=None,
        max_length=MAX_BIASES,
        description="Added to the logits of these token ids; between -100 and 100.",
    )
    allowed_token_ids: list[TokenId] | None = Field(
        default=None, min_length=1, description="The only tokens to choose from."
    )
    bad_words: list[str] | None = Field(
        default=None, max_length=MAX_BAD_WORDS, description="Never in the answer."
    )
    min_tokens: int | None = Field(
        default=None,
        ge=0,
        le=INT64_MAX,
        description="Tokens before the model's own end, stop tokens and stop strings count.",
    )
    stop: tuple[str, ...] = Field(
        default=(),
        description=f"Up to {MAX_STOPS} strings that end the answer; they are not part of it.",
    )
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = Field(
        default=None, description="Tokens that end the answer."
    )
    include_stop_str_in_output: bool | None = Field(
        default=None, description="Keep the stop string that ended the answer."
    )
    skip_special_tokens: bool | None = Field(
        default=None, description="Leave special tokens out of the text; true by default."
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        le=INT64_MAX,
        description="Keep at most so many tokens of the prompt; -1 keeps what leaves room for the "
        "answer.",
    )
    truncation_side: Literal["left", "right"] | None = Field(
        default=None, description="Where a prompt is cut; `left`, its beginning, by default."
    )
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description="Write tokens as `token_id:42` in log-probabilities."
    )
    priority: int | None = Field(
        default=None,
        ge=-(1 << 31),
        le=(1 << 31) - 1,
        description="Inside a replica, lower ones start first; 0 by default.",
    )
    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Cached prefixes are shared with calls of the same salt only.",
    )
    request_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9._:-]+$",
        description="Becomes the end of the answer's id.",
    )
    ignore_eos: bool | None = Field(
        default=None, description="Generate on after the end-of-sequence token."
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None,
        description="What the answer must match: JSON, a regular expression, a choice, a grammar.",
    )
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")

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

    @field_validator("stop_token_ids", "allowed_token_ids", mode="before")
    @classmethod
    def _check_num_token_ids(cls, value: Any, info: ValidationInfo) -> Any:
        most = MAX_STOP_TOKEN_IDS if info.field_name == "stop_token_ids" else MAX_ALLOWED_TOKEN_IDS
        if isinstance(value, list) and len(value) > most:  # before it is walked
            raise wrong_field(f"has {len(value)} ids; at most {most} are allowed")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _check_logit_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token_id, bias in (value or {}).items():
            if not (token_id.isascii() and token_id.isdecimal() and len(token_id) <= 10):
                raise wrong_field(f"has {token_id[:32]!r}, which is no token id")
            if not -100 <= bias <= 100:
                raise wrong_field(f"has {bias!r} for {token_id}; between -100 and 100 is allowed")
        return value

    @field_validator("bad_words")
    @classmethod
    def _check_bad_words(cls, value: list[str] | None) -> list[str] | None:
        if not all(1 <= len(word) <= MAX_STOP_CHARS for word in value or ()):
            raise wrong_field(f"must contain strings of 1 to {MAX_STOP_CHARS} characters only")
        return value

    @model_validator(mode="after")
    def _check_structure(self) -> "SamplingBody":
        if self.is_formatted and self.structured_outputs:
            raise wrong_field(f"excludes {self.format_field}", field="structured_outputs")
        return self

    @property
    def formatted(self) -> ResponseFormat | None:
        """The form of the answer, as OpenAI's fields ask for it."""
        return None

    @property
    def is_formatted(self) -> bool:
        """Whether those fields ask for anything but text."""
        return self.formatted is not None and self.formatted.type != "text"

    @property
    def max_new_tokens(self) -> int | None:
        """The limit the client asked for, if it did."""
        return None

    @property
    def limit_field(self) -> str:
        """The field that the limit is in."""
        return "max_tokens"

    @property
    def num_choices(self) -> int:
        """How many answers are generated to each prompt."""
        return 1

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell beside each token; None tells nothing."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens to know beside each of the prompt's; None for none."""
        return None

    @property
    def echoes_prompt(self) -> bool:
        """Whether the prompt's text goes before the answer."""
        return False

    @property
    def echoes_tokens(self) -> bool:
        """Whether the prompt's tokens are told with those of every answer."""
        return self.echoes_prompt and self.num_logprobs is not None

    @property
    def reports_tokens(self) -> bool:
        """Whether something is to be told of the answer's tokens."""
        return self.num_logprobs is not None
