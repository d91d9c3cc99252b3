"""Answers of calls with tools or reasoning: thoughts, content and tool calls apart."""

from collections.abc import Collection
from dataclasses import dataclass

from controller.gateway.pieces import Piece, TokenReport
from controller.gateway.reader import AnswerReader
from controller.gateway.reasoning import ReasoningParser
from controller.gateway.tool_calls.base import CallDelta, ToolCallParser
from controller.scaling.generation import TokenChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyPlan:
    """How the answers of one call are read.

    Attributes:
        is_thought_open: Whether the prompt has begun a thought; None if the model does not think.
        parser: Of the tools' format; None if no tool may be called.
        tool_names: Of the tools that may be.
        max_calls: How many; None for any number.
        tells_thoughts: Whether pieces have what the model thinks.
    """

    is_thought_open: bool | None = None
    parser: type[ToolCallParser] | None = None
    tool_names: Collection[str] = ()
    max_calls: int | None = None
    tells_thoughts: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to look for."""
        return self.is_thought_open is None and self.parser is None

    def reader(self, reader: AnswerReader) -> "ReplyReader":
        """Return a fresh reader of one answer."""
        is_open, parser = self.is_thought_open, self.parser
        return ReplyReader(
            reader,
            None if is_open is None else ReasoningParser(is_open=is_open),
            None if parser is None else parser(self.tool_names, max_calls=self.max_calls),
            tells_thoughts=self.tells_thoughts,
        )


class ReplyReader:
    """Reads one answer's tokens as `AnswerReader` does, and takes its text apart.

    Attributes:
        num_reasoning_tokens: Tokens of the thought.
    """

    def __init__(
        self,
        reader: AnswerReader,
        reasoning: ReasoningParser | None,
        calls: ToolCallParser | None,
        *,
        tells_thoughts: bool,
    ) -> None:
        self.num_reasoning_tokens = 0
        self._reader = reader
        self._reasoning = reasoning
        self._calls = calls
        self._tells_thoughts = tells_thoughts
        self._tokens: list[TokenReport] = []

    def read(self, chunk: TokenChunk) -> Piece:
        """Take a chunk; return its piece, which ends the answer if no more calls are wanted."""
        piece = self._reader.read(chunk)
        is_last = piece.finish_reason is not None
        thought, content = self._split(piece.text, is_last)
        if self._reasoning is not None and self._reasoning.is_thinking:
            self.num_reasoning_tokens += len(chunk.token_ids)
        if not self._tells_thoughts:
            thought = ""
        deltas: tuple[CallDelta, ...] = ()
        reason = piece.finish_reason
        if self._calls is not None:
            said = self._calls.feed(content)
            if is_last:
                said = said.then(self._calls.finish())
            content, deltas = said
            if self._calls.is_complete or (reason == "stop" and self._calls.num_calls):
                reason = "tool_calls"
        self._tokens += piece.tokens
        if not (content or thought or deltas or reason):
            return Piece("")
        tokens, self._tokens = self._tokens, []
        return Piece(content, reason, piece.stop_reason, tokens, thought, deltas)

    def _split(self, text: str, is_last: bool) -> tuple[str, str]:
        if self._reasoning is None:
            return "", text
        thought, content = self._reasoning.feed(text)
        if is_last:
            rest = self._reasoning.finish()
            return thought + rest.reasoning, content + rest.content
        return thought, content
