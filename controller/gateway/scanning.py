"""Text that arrives in pieces, read by generators that pause where it ends so far.

A reader written this way says the same of a text however it is cut. It reads forward only, so its
work is linear in the text.
"""

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from controller.gateway.detokenizer import beginning_of

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Reads on and returns T; yields where it needs more text."""

SPACE = " \t\r\n"
_BRACKETS = {"{": "}", "[": "]"}


class MalformedText(Exception):  # never leaves the parsers
    """The text is not what the reader is made for; it stands before what does not fit."""


class Scanner:
    """A text and how far it has been read.

    Attributes:
        text: All of it so far.
        at: Where the next character is.
        is_ended: Whether no more text comes.
    """

    __slots__ = ("at", "is_ended", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.is_ended = False

    def peek(self) -> Steps[str]:
        """Return the next character; an empty string at the end."""
        while self.at >= len(self.text) and not self.is_ended:
            yield
        return self.text[self.at : self.at + 1]

    def skip_space(self) -> Steps[None]:
        """Read whitespace, as JSON has it."""
        while (char := (yield from self.peek())) and char in SPACE:
            self.at += 1

    def accept(self, literal: str) -> Steps[bool]:
        """Read a literal, if it comes next."""
        while True:
            coming = self.text[self.at : self.at + len(literal)]
            if coming == literal:
                self.at += len(literal)
                return True
            if self.is_ended or not literal.startswith(coming):
                return False
            yield

    def expect(self, literal: str) -> Steps[None]:
        """Read a literal.

        Raises:
            MalformedText: Something else comes.
        """
        if not (yield from self.accept(literal)):
            raise MalformedText

    def word(self, is_part: Callable[[str], bool]) -> Steps[str]:
        """Read characters as long as they belong; the word may be empty."""
        start = self.at
        while (char := (yield from self.peek())) and is_part(char):
            self.at += 1
        return self.text[start : self.at]

    def string(self, quote: str = '"') -> Steps[str]:
        """Read a quoted string with backslash escapes; return it with its quotes.

        Raises:
            MalformedText: None comes, or it does not end.
        """
        start = self.at
        yield from self.expect(quote)
        while (char := (yield from self.peek())) != quote:
            if not char:
                raise MalformedText
            self.at += 1
            if char == "\\" and (yield from self.peek()):
                self.at += 1
        self.at += 1
        return self.text[start : self.at]

    def value(self) -> Steps[None]:
        """Read a JSON value by its strings and brackets; scalars are not looked at.

        Raises:
            MalformedText: Brackets do not match, or it does not end.
        """
        closing: list[str] = []
        while True:
            char = yield from self.peek()
            if char == '"':
                yield from self.string()
            elif char in _BRACKETS:
                closing.append(_BRACKETS[char])
                self.at += 1
            elif closing and char == closing[-1]:
                closing.pop()
                self.at += 1
            elif closing and char and char not in "]}":
                self.at += 1
                continue
            elif closing or not (yield from self.word(_is_scalar)):
                raise MalformedText
            if not closing:
                return

    def sliced(self, steps: Steps[None], take: Callable[[str], None]) -> Steps[None]:
        """Read on by `steps` and hand over what they read as soon as it is there."""
        start = self.at
        try:
            for _ in steps:
                take(self.text[start : self.at])
                start = self.at
                yield
        finally:
            take(self.text[start : self.at])

    def until(self, markers: tuple[str, ...], take: Callable[[str], None]) -> Steps[str]:
        """Hand over the text before the first of some markers, read that and return it.

        Returns:
            The marker; an empty string if the text ends without one.
        """
        while True:
            text = self.text
            hits = [(at, marker) for marker in markers if (at := text.find(marker, self.at)) >= 0]
            if hits:
                at, marker = min(hits)
                take(text[self.at : at])
                self.at = at + len(marker)
                return marker
            end = len(text)
            if not self.is_ended:
                tail = text[self.at :]
                end = self.at + min(beginning_of(marker, tail) for marker in markers)
            take(text[self.at : end])
            self.at = end
            if self.is_ended:
                return ""
            yield


class Trim:
    """Text without whitespace at its beginning, and with that at its end held back."""

    __slots__ = ("held", "is_begun")

    def __init__(self, *, is_begun: bool = False) -> None:
        self.is_begun = is_begun
        self.held = ""

    def feed(self, text: str) -> str:
        """Take more text; return what is certain not to be at the end."""
        text = self.held + text
        if not self.is_begun:
            text = text.lstrip()
        certain = text.rstrip()
        self.held = text[len(certain) :]
        self.is_begun = self.is_begun or bool(certain)
        return certain


class Pump:
    """Drives a reader with text as it arrives.

    Args:
        scanner: What the reader reads from.
        reader: Returns when it wants no more text.
    """

    __slots__ = ("_reader", "_scanner", "is_done")

    def __init__(self, scanner: Scanner, reader: Iterator[None]) -> None:
        self._scanner = scanner
        self._reader = reader
        self.is_done = False

    def feed(self, text: str) -> None:
        """Let the reader go as far as it can with more text."""
        if not self.is_done and text:
            self._scanner.text += text
            self._go_on()

    def finish(self) -> None:
        """Let the reader come to its end."""
        self._scanner.is_ended = True
        if not self.is_done:
            self._go_on()

    def _go_on(self) -> None:
        try:
            next(self._reader)
        except StopIteration:
            self.is_done = True


def _is_scalar(char: str) -> bool:
    return char not in '",:[]{}' and not char.isspace()
