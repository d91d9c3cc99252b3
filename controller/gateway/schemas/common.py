"""Parts of several answers: usage and the error envelope."""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """What the generated tokens were."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens of one call, counted here; each prompt once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TokenLogprob(BaseModel):
    """One token, how likely it was, and its bytes: its text may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token of the answer beside the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """How likely the tokens of a message were: natural logarithms, by the model alone."""

    content: list[ChosenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """How likely the tokens of a text were; the lists go together."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(BaseModel):
    """How likely a token was in its place of a prompt; `rank` is None below the likeliest told."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt but the first: itself and the likeliest ones, by token id."""


def json_of(body: BaseModel, **written: bytes | None) -> bytes:
    """Return a body as JSON, with the fields that are JSON already put in as they are."""
    fields = {name: value for name, value in written.items() if value is not None}
    parts = [body.model_dump_json(exclude=set(fields)).encode()[:-1]]
    for name, value in fields.items():
        parts += [b',"%b":' % name.encode(), value]
    return b"".join([*parts, b"}"])


def json_list(items: Iterable[bytes]) -> bytes:
    """Return a list of what is JSON already."""
    return b"[%b]" % b",".join(items)


class ErrorDetails(BaseModel):
    """OpenAI's error fields."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorDetails
