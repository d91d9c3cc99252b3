"""Log-probabilities in the shapes of OpenAI's two endpoints."""

from collections.abc import Sequence
from typing import Any

from controller.gateway.pieces import TokenReport
from controller.gateway.token_bytes import TokenBytes

NEVER = -9999.0  # JSON has no minus infinity; what OpenAI writes instead


class LogprobWriter:
    """Writes tokens and how likely they were.

    Args:
        token_bytes: Of the model's tokens.
        as_ids: Whether to write `token_id:42` instead of text.
    """

    def __init__(self, token_bytes: TokenBytes, *, as_ids: bool) -> None:
        self._token_bytes = token_bytes
        self._as_ids = as_ids

    def chat(self, tokens: Sequence[TokenReport]) -> dict[str, Any]:
        """Return `logprobs` of a chat completion's choice."""
        content = [
            {
                **self._entry(token.token_id, token.logprobs.logprob),
                "top_logprobs": [
                    self._entry(token_id, logprob)
                    for token_id, logprob in zip(
                        token.logprobs.top_token_ids, token.logprobs.top_logprobs, strict=True
                    )
                ],
            }
            for token in tokens
            if token.logprobs is not None
        ]
        return {"content": content, "refusal": None}

    def completion(self, tokens: Sequence[TokenReport]) -> dict[str, Any]:
        """Return `logprobs` of a completion's choice."""
        return {
            "text_offset": [token.offset for token in tokens],
            "token_logprobs": [
                None if token.logprobs is None else _finite(token.logprobs.logprob)
                for token in tokens
            ],
            "tokens": [self._text(token.token_id) for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
        }

    def prompt(self, tokens: Sequence[TokenReport]) -> list[dict[str, Any] | None]:
        """Return vLLM's `prompt_logprobs`."""
        return [self._in_place(token) for token in tokens]

    def _in_place(self, token: TokenReport) -> dict[str, Any] | None:
        found = token.logprobs
        if found is None:
            return None
        ranked = enumerate(zip(found.top_token_ids, found.top_logprobs, strict=True), start=1)
        entries = {
            str(token_id): self._ranked(token_id, logprob, rank)
            for rank, (token_id, logprob) in ranked
        }
        entries.setdefault(str(token.token_id), self._ranked(token.token_id, found.logprob, None))
        return entries

    def _ranked(self, token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
        return {
            "logprob": _finite(logprob),
            "rank": rank,
            "decoded_token": self._text(token_id),
        }

    def _likeliest(self, token: TokenReport) -> dict[str, float] | None:
        """Return the likeliest tokens and the chosen one; of those with one text, the likeliest."""
        found = token.logprobs
        if found is None:
            return None
        likeliest: dict[str, float] = {}
        for token_id, logprob in zip(found.top_token_ids, found.top_logprobs, strict=True):
            likeliest.setdefault(self._text(token_id), _finite(logprob))
        likeliest.setdefault(self._text(token.token_id), _finite(found.logprob))
        return likeliest

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._token_bytes[token_id]),
        }

    def _text(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._token_bytes[token_id].decode("utf-8", errors="replace")


def _finite(logprob: float) -> float:
    return logprob if logprob > NEVER else NEVER  # nor has it NaN
