"""Tokens of one generation to pieces of its text."""

from collections.abc import Set as AbstractSet
from itertools import zip_longest

from controller.gateway.detokenizer import Detokenizer, StopFilter
from controller.gateway.pieces import Piece, TokenReport
from controller.gateway.prompt_echo import PromptEcho
from controller.scaling.generation import TokenChunk


class AnswerReader:
    """Detokenizes, applies stop strings, and keeps what is to be told of tokens.

    Args:
        detokenizer: Fresh, of the generation's model.
        stop_filter: Fresh, with the call's stop strings.
        stop_token_ids: The call's stop tokens.
        min_tokens: Stop strings that are complete within so many tokens do not count. One that
            begins there and ends later does, and is cut off from where it begins (as in vLLM).
        reports_tokens: Whether pieces carry their tokens.
        echo: Puts the prompt before the answer, if that is to be told.
    """

    num_reasoning_tokens = 0

    __slots__ = (
        "_detokenizer", "_echo", "_min_tokens", "_num_chars", "_num_read", "_reports", "_stop_filter",
        "_stop_token_ids",
    )  # fmt: skip

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop_filter: StopFilter,
        *,
        stop_token_ids: AbstractSet[int] = frozenset(),
        min_tokens: int = 0,
        reports_tokens: bool = False,
        echo: PromptEcho | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._stop_filter = stop_filter
        self._stop_token_ids = stop_token_ids
        self._min_tokens = min_tokens
        self._num_read = 0
        self._num_chars = 0 if echo is None else len(echo.prompt.text)
        self._echo = echo
        self._reports: list[TokenReport] | None = [] if reports_tokens else None

    def read(self, chunk: TokenChunk) -> Piece:
        """Take a chunk; return its piece, which says nothing if all of it is held back."""
        if self._echo is None:
            return self._read(chunk)
        echo, self._echo = self._echo, None
        return echo.put_before(self._read(chunk), chunk.prompt_logprobs)

    def _read(self, chunk: TokenChunk) -> Piece:
        stop_filter = self._stop_filter
        parts: list[str] = []
        if self._reports is not None:
            self._report(chunk, parts)
        else:
            for token_id in chunk.token_ids:
                parts.append(self._filtered(self._detokenizer.feed(token_id)))
                if stop_filter.is_hit:
                    break
        if chunk.finish_reason is None and not stop_filter.is_hit:
            return self._piece("".join(parts))
        if not stop_filter.is_hit:
            parts.append(stop_filter.feed(self._detokenizer.finish()))
        if not stop_filter.is_hit:
            parts.append(stop_filter.finish())
        return self._last("".join(parts), chunk)

    def _filtered(self, text: str) -> str:
        self._num_read += 1
        if self._num_read <= self._min_tokens:
            return self._stop_filter.pass_over(text)
        return self._stop_filter.feed(text)

    def _report(self, chunk: TokenChunk, parts: list[str]) -> None:
        """Read tokens and keep what is to be told of them."""
        assert self._reports is not None
        for token_id, logprobs in zip_longest(chunk.token_ids, chunk.logprobs):
            self._reports.append(TokenReport(token_id, logprobs, self._num_chars))
            text = self._detokenizer.feed(token_id)
            self._num_chars += len(text)
            parts.append(self._filtered(text))
            if self._stop_filter.is_hit:
                break

    def _piece(self, text: str) -> Piece:
        if not text or not self._reports:
            return Piece(text)
        tokens, self._reports = self._reports, []
        return Piece(text, tokens=tokens)

    def _last(self, text: str, chunk: TokenChunk) -> Piece:
        stop: str | int | None = self._stop_filter.hit
        last = chunk.token_ids[-1] if chunk.token_ids else None
        if stop is None and chunk.finish_reason == "stop" and last in self._stop_token_ids:
            stop = last
        reason = "stop" if self._stop_filter.is_hit else chunk.finish_reason
        return Piece(text, reason, stop, self._reports or ())
