"""Log-probabilities in the shapes of OpenAI's two endpoints, as JSON.

A long prompt has hundreds of thousands of them. So they are written token by token: it takes
little memory, and a thread that does it lets the event loop go on between any two tokens.
"""

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from controller.gateway.pieces import TokenReport
from controller.gateway.schemas.common import json_list
from controller.gateway.token_bytes import TokenBytes

NEVER = -9999.0  # JSON has no minus infinity; what OpenAI writes instead
MANY_TOKENS = 128  # more are written in a thread: about 5 ms, with the likeliest 20 of each

Write = Callable[[Sequence[TokenReport]], bytes]
"""Writes tokens and how likely they were as JSON."""
Result = TypeVar("Result")

_escape = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


async def off_loop(work: Callable[[], Result], *, num_tokens: int) -> Result:
    """Return what work on tokens returns; with many it is done in a thread."""
    return work() if num_tokens <= MANY_TOKENS else await asyncio.to_thread(work)


class LogprobWriter:
    """Writes tokens and how likely they were.

    Args:
        token_bytes: Of the model's tokens.
        as_ids: Whether to write `token_id:42` instead of text.
    """

    def __init__(self, token_bytes: TokenBytes, *, as_ids: bool) -> None:
        self._token_bytes = token_bytes
        self._as_ids = as_ids

    def content(self, tokens: Sequence[TokenReport]) -> Iterator[dict[str, Any]]:
        """Yield tokens as chat completions and responses have them."""
        return (
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
        )

    def chat(self, tokens: Sequence[TokenReport]) -> bytes:
        """Write `logprobs` of a chat completion's choice."""
        return b'{"content":%b,"refusal":null}' % _list(self.content(tokens))

    def completion(self, tokens: Sequence[TokenReport]) -> bytes:
        """Write `logprobs` of a completion's choice."""
        return b'{"text_offset":%b,"token_logprobs":%b,"tokens":%b,"top_logprobs":%b}' % (
            _list(token.offset for token in tokens),
            _list(
                None if token.logprobs is None else _finite(token.logprobs.logprob)
                for token in tokens
            ),
            _list(self._text(token.token_id) for token in tokens),
            _list(self._likeliest(token) for token in tokens),
        )

    def prompt(self, tokens: Sequence[TokenReport]) -> bytes:
        """Write vLLM's `prompt_logprobs`."""
        return _list(self._in_place(token) for token in tokens)

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


def _list(items: Iterable[object]) -> bytes:
    return json_list(_escape(item).encode() for item in items)


def _finite(logprob: float) -> float:
    return logprob if logprob > NEVER else NEVER  # nor has it NaN
