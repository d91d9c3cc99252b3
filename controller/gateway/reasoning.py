"""What a model thinks between `<think>` and `</think>`, apart from what it answers."""

from typing import NamedTuple

from controller.gateway.scanning import Pump, Scanner, Steps, Trim

OPEN = "<think>"
CLOSE = "</think>"


class Thought(NamedTuple):
    """What is new of an answer."""

    reasoning: str
    content: str


class ReasoningParser:
    """Splits one answer, the same way however it is cut.

    Whitespace beside the tags is dropped. Only the beginning of an answer can be thought.

    Args:
        is_open: Whether the prompt has opened the tag.
    """

    markers = (OPEN, CLOSE)

    def __init__(self, *, is_open: bool) -> None:
        self.is_thinking = is_open
        self._scanner = Scanner()
        self._pump = Pump(self._scanner, self._read())
        self._trim = Trim()
        self._reasoning: list[str] = []
        self._content: list[str] = []

    def feed(self, text: str) -> Thought:
        """Take more of the answer; return what has become certain."""
        self._pump.feed(text)
        return self._take()

    def finish(self) -> Thought:
        """Return what was held back."""
        self._pump.finish()
        return self._take()

    def _read(self) -> Steps[None]:
        scanner = self._scanner
        yield from scanner.skip_space()
        is_opened = yield from scanner.accept(OPEN)
        if not (self.is_thinking or is_opened):
            self._content.append(scanner.text[: scanner.at])
        else:
            self.is_thinking = True
            yield from scanner.until((CLOSE,), self._think)
            self.is_thinking = False
            yield from scanner.skip_space()
        while (yield from scanner.peek()):
            self._content.append(scanner.text[scanner.at :])
            scanner.at = len(scanner.text)

    def _think(self, text: str) -> None:
        self._reasoning.append(self._trim.feed(text))

    def _take(self) -> Thought:
        thought = Thought("".join(self._reasoning), "".join(self._content))
        self._reasoning, self._content = [], []
        return thought


def is_opened_by(prompt: str) -> bool:
    """Return whether the end of a prompt has opened the tag and not closed it."""
    return prompt.rstrip().endswith(OPEN)
