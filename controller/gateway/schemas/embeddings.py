"""Bodies of /v1/embeddings."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator

from controller.gateway.schemas.base import ApiBody, Neutral, wrong_field
from controller.gateway.schemas.completions import Prompt, checked_prompts

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000  # both as OpenAI has them


class EmbeddingsRequest(ApiBody):
    """Texts to embed, as strings or as token ids."""

    ignored: ClassVar[frozenset[str]] = frozenset({"cache_salt", "request_id", "user"})
    unsupported: ClassVar[dict[str, Neutral]] = {
        "messages": (),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "truncation_side": ("right",),
        "padding": (False,),
        "use_activation": (True,),
        "normalize": (True,),
        "priority": (0,),
        "mm_processor_kwargs": ({},),
    }

    model: str = Field(min_length=1, max_length=256, description="A function's served name.")
    input: list[Prompt] = Field(
        description=f"One text or a list of up to {MAX_INPUTS}; {MAX_INPUT_TOKENS} tokens in all."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="A list of numbers, or little-endian float32 in base64."
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="Numbers to keep of each vector, where the model allows it."
    )
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        description="Cut texts to this many tokens; -1 to what the model takes. Left out, a text "
        "that is too long is refused.",
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Whether the tokenizer adds its own special tokens to strings; true by default.",
    )

    @field_validator(
        "input", mode="plain", json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    )
    @classmethod
    def _check_input(cls, value: Any) -> list[Prompt]:
        if isinstance(value, list) and len(value) > MAX_INPUT_TOKENS:
            raise wrong_field(f"has {len(value)} entries; at most {MAX_INPUT_TOKENS} are allowed")
        texts = checked_prompts(value)
        if len(texts) > MAX_INPUTS:
            raise wrong_field(f"has {len(texts)} texts; at most {MAX_INPUTS} are allowed in a call")
        return texts


class EmbeddingObject(BaseModel):
    """One text's vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of one call, over all its texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The vectors of a call, in the order of its texts."""

    object: Literal["list"] = "list"
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage
