"""What is new of a choice: text, and what was asked to be told of its tokens."""

from collections.abc import Sequence
from typing import NamedTuple

from controller.gateway.tool_calls.base import CallDelta
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
        text: Empty only at the end, or beside reasoning and calls.
        finish_reason: Set in the last piece: "stop", "length" or "tool_calls".
        stop_reason: The stop string or token that ended the choice; None for the model's own end.
        tokens: Those whose text has become known with this piece; empty unless asked for.
        reasoning: What the model thinks before its text.
        calls: Parts of the tool calls it makes.
    """

    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    tokens: Sequence[TokenReport] = ()
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
