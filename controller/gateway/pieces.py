"""What is new of a choice: text, and what was asked to be told of its tokens."""

from collections.abc import Sequence
from typing import NamedTuple

from runtime.rpc import inference_pb2 as pb


class TokenReport(NamedTuple):
    """One token of a choice.

    Attributes:
        logprobs: How likely it was; None if nobody asked, or for a prompt's first token.
        offset: Where its text begins, in characters of the text it is in.
    """

    token_id: int
    logprobs: pb.TokenLogprobs | None
    offset: int


class Piece(NamedTuple):
    """Text that follows the pieces before.

    Attributes:
        text: Empty only at the end.
        finish_reason: Set in the last piece: "stop" or "length".
        stop_reason: The stop string or token that ended the choice; None for the model's own end.
        tokens: Those whose text has become known with this piece; empty unless asked for.
    """

    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    tokens: Sequence[TokenReport] = ()
