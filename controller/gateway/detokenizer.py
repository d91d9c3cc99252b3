"""Token ids to text as they arrive, and stop strings in that text.

Both are fed piece by piece and give the same whole however the pieces are cut.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from tokenizers import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A character is at most four bytes and a token at least one, so more tokens than this that end
# in a replacement character are not an unfinished character but bytes that will never make one.
MAX_PENDING = 16


class TokenTexts(dict[int, str]):
    """The text of each token on its own, decoded once; at most a vocabulary of them.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str:
        text: str = self.tokenizer.decode([token_id], skip_special_tokens=False)
        self[token_id] = text
        return text


class Detokenizer:
    """Incremental detokenization of one sequence.

    A token's text depends on its neighbours: characters are split over tokens and decoders drop
    the first leading space. So the window [context | pending] is decoded with and without the
    pending tokens, and their difference is the new text. The context is what was emitted last.

    Args:
        texts: Of the model's tokens, shared by all its sequences.
        hidden_token_ids: Tokens without text, i.e. special ones and ends of sequence.
    """

    __slots__ = ("_context_text", "_hidden", "_num_context", "_texts", "_tokenizer", "_window")

    def __init__(self, texts: TokenTexts, hidden_token_ids: AbstractSet[int]) -> None:
        self._texts = texts
        self._tokenizer = texts.tokenizer
        self._hidden = hidden_token_ids
        self._window: list[int] = []
        self._num_context = 0
        self._context_text = ""

    def feed(self, token_id: int) -> str:
        """Take one token; return the text that is now certain, often its own."""
        if token_id in self._hidden:
            return ""
        window = self._window
        window.append(token_id)
        text: str = self._tokenizer.decode(window, skip_special_tokens=False)
        num_pending = len(window) - self._num_context
        if len(text) <= len(self._context_text):
            return ""
        if text.endswith(INCOMPLETE) and num_pending < MAX_PENDING:
            return ""
        new_text = text[len(self._context_text) :]
        del window[: self._num_context]
        self._num_context = len(window)
        if self._num_context == 1:  # nearly always
            self._context_text = self._texts[token_id]
        else:
            self._context_text = self._tokenizer.decode(window, skip_special_tokens=False)
        return new_text

    def finish(self) -> str:
        """Return what is still held back; unfinished characters become U+FFFD."""
        text: str = self._tokenizer.decode(self._window, skip_special_tokens=False)
        new_text = text[len(self._context_text) :]
        self._window.clear()
        self._num_context, self._context_text = 0, ""
        return new_text


class StopFilter:
    """Cuts a text at the first stop string to be completed and holds back possible beginnings.

    Args:
        stops: Non-empty strings.
        is_kept: Whether the stop string stays in the text.

    Attributes:
        hit: The stop string that was completed, if one was.
    """

    __slots__ = ("_held", "_is_kept", "_stops", "hit", "is_hit")

    def __init__(self, stops: Sequence[str], *, is_kept: bool = False) -> None:
        self._stops = stops
        self._is_kept = is_kept
        self._held = ""
        self.is_hit = False
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """Take more text; return what can be sent. After a hit there is nothing more to send."""
        if not self._stops:
            return text
        num_old, held = len(self._held), self._held + text
        # The stop that ends first wins, else the cut would depend on how the text arrives. One
        # that ended in the old text was passed over.
        hits = (
            (at + len(stop), at, stop)
            for stop in self._stops
            if (at := held.find(stop, max(0, num_old - len(stop) + 1))) >= 0
        )
        first = min(hits, default=None)
        if first is not None:
            end, start, self.hit = first
            self.is_hit, self._held = True, ""
            return held[: end if self._is_kept else start]
        return self.pass_over(text)

    def pass_over(self, text: str) -> str:
        """Take more text, in which no stop string ends that counts; return what can be sent.

        One that begins here and ends later counts, so its beginning is held back as ever.
        """
        if not self._stops:
            return text
        held = self._held + text
        cut = min(beginning_of(stop, held) for stop in self._stops)
        self._held = held[cut:]
        return held[:cut]

    def finish(self) -> str:
        """Return what was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def beginning_of(stop: str, text: str) -> int:
    """Return where the longest end of `text` begins that is a proper beginning of `stop`."""
    at = max(0, len(text) - len(stop) + 1)
    while (at := text.find(stop[0], at)) >= 0:
        if stop.startswith(text[at:]):
            return at
        at += 1
    return len(text)
