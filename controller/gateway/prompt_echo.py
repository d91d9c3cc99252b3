"""A prompt that is told with its answer: put before it, with how likely its tokens were."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from controller.gateway.pieces import Piece, TokenReport
from runtime.rpc import inference_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptText:
    """A prompt as text.

    Attributes:
        offsets: Where the text of each token begins.
    """

    token_ids: Sequence[int]
    text: str
    offsets: Sequence[int]


class PromptEcho:
    """What goes before one answer.

    Args:
        prompt: Its text is empty if it is not to be echoed.
        has_tokens: Whether the first piece carries the prompt's tokens too.
        drops_answer: Whether nothing follows: a model cannot generate no token.
    """

    def __init__(self, prompt: PromptText, *, has_tokens: bool, drops_answer: bool) -> None:
        self.prompt = prompt
        self.drops_answer = drops_answer
        self.tokens: list[TokenReport] = []
        self._has_tokens = has_tokens

    def put_before(self, piece: Piece, logprobs: Iterable[pb.PromptLogprobs]) -> Piece:
        """Return the first piece with the prompt; its tokens are known from now on."""
        self.tokens = self._reports(logprobs)
        told = self.tokens if self._has_tokens else []
        if self.drops_answer:
            return Piece(self.prompt.text, "length", None, told)
        return piece._replace(text=self.prompt.text + piece.text, tokens=[*told, *piece.tokens])

    def _reports(self, parts: Iterable[pb.PromptLogprobs]) -> list[TokenReport]:
        by_position = {
            part.first + index: entry
            for part in parts
            for index, entry in enumerate(_entries(part))
        }
        return [
            TokenReport(token_id, by_position.get(position), offset)
            for position, (token_id, offset) in enumerate(
                zip(self.prompt.token_ids, self.prompt.offsets, strict=True)
            )
        ]


def _entries(part: pb.PromptLogprobs) -> Iterable[pb.TokenLogprobs]:
    num_top = len(part.top_token_ids) // max(1, len(part.logprobs))
    for index, logprob in enumerate(part.logprobs):
        tops = slice(index * num_top, (index + 1) * num_top)
        yield pb.TokenLogprobs(
            logprob=logprob,
            top_token_ids=part.top_token_ids[tops],
            top_logprobs=part.top_logprobs[tops],
        )
