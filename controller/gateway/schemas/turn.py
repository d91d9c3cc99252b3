"""The next turn of a conversation, whichever endpoint it was asked of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.gateway.schemas.tools import OfferedTools


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A conversation, and how it goes on.

    Attributes:
        messages: As chat templates read them; calls' arguments are JSON text.
        offered: The tools that may be called.
        field: Of the request, that the conversation is in.
        variables: What else the template may read.
        is_continued: Whether the last message is left open: the answer goes on with it.
        is_prompted: Whether the prompt ends with what opens an answer.
        has_special_tokens: Whether the tokenizer adds its own special tokens.
        tells_thoughts: Whether the answer has what the model thinks.
        is_cut: Whether the oldest turns are left out if there is no room for all.
    """

    messages: Sequence[Mapping[str, Any]]
    offered: OfferedTools
    field: str
    variables: Mapping[str, Any]
    is_continued: bool = False
    is_prompted: bool = True
    has_special_tokens: bool = False
    tells_thoughts: bool = True
    is_cut: bool = False
