"""What the parsers of all formats share.

A parser is pure: text in as it arrives, content and parts of calls out, the same whole however
the text is cut. What does not begin a call of an offered tool is content. Arguments are the model's
own text, never written anew; where they break off or break, the call ends and what follows is
content. So nothing is lost and nothing raised.
"""

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import ClassVar, NamedTuple

from controller.gateway.scanning import MalformedText, Pump, Scanner, Steps, Trim


class CallDelta(NamedTuple):
    """What is new of a call.

    Attributes:
        number: Which of the answer's calls.
        call_id: Only with its first part.
        name: Only with its first part.
        arguments: JSON text that follows the parts before.
        after: With its first part: how many characters of the content that is new too come before.
    """

    number: int
    call_id: str | None
    name: str | None
    arguments: str
    after: int = 0


class Said(NamedTuple):
    """What is new of an answer."""

    content: str
    calls: tuple[CallDelta, ...]

    def then(self, rest: "Said") -> "Said":
        """Return this with what came later."""
        shift = len(self.content)
        calls = (call._replace(after=call.after + shift) for call in rest.calls)
        return Said(self.content + rest.content, (*self.calls, *calls))


class ToolCallParser(ABC):
    """Finds calls in one answer.

    Args:
        names: Of the tools that were offered.
        max_calls: How many calls to read; None reads all. What follows the last is dropped.
    """

    markers: ClassVar[tuple[str, ...]] = ()
    """Tokens the format is made of, which may be special in the tokenizer."""

    def __init__(self, names: Collection[str], *, max_calls: int | None = None) -> None:
        self.num_calls = 0
        self._names = names
        self._max_calls = max_calls
        self._scanner = Scanner()
        self._pump = Pump(self._scanner, self._read())
        self._trim = Trim(is_begun=True)
        self._content: list[str] = []
        self._deltas: list[CallDelta] = []

    @property
    def is_complete(self) -> bool:
        """Whether all calls that were wanted have been read."""
        return self._pump.is_done and self.num_calls == self._max_calls

    def feed(self, text: str) -> Said:
        """Take more of the answer; return what has become certain."""
        self._pump.feed(text)
        return self._take()

    def finish(self) -> Said:
        """Return what was held back."""
        self._pump.finish()
        if self._trim.is_begun:
            self._content.append(self._trim.held)
        return self._take()

    @abstractmethod
    def _read(self) -> Steps[None]:
        """Read the answer, saying content and calls; return early if there are enough."""

    @property
    def _has_enough(self) -> bool:
        return self.num_calls == self._max_calls

    def _say(self, text: str) -> None:
        """Add content; whitespace beside calls is dropped."""
        self._content.append(self._trim.feed(text))

    def _say_until(self, *markers: str) -> Steps[str]:
        return (yield from self._scanner.until(markers, self._say))

    def _say_rest(self) -> Steps[None]:
        while (yield from self._scanner.peek()):
            self._say(self._scanner.text[self._scanner.at :])
            self._scanner.at = len(self._scanner.text)

    def _attempt(self, start: int, steps: Steps[None]) -> Steps[bool]:
        """Read one call; if it does not even begin, what was read since `start` is content."""
        num_calls = self.num_calls
        try:
            yield from steps
        except MalformedText:
            if self.num_calls == num_calls:
                self._say(self._scanner.text[start : self._scanner.at])
            return False
        return True

    def _begin(self, name: str, arguments: str = "") -> None:
        """Begin a call; what its text was preceded by is content as it stands."""
        self._trim = Trim()
        after = sum(map(len, self._content))
        self._deltas.append(CallDelta(self.num_calls, self._new_id(), name, arguments, after))
        self.num_calls += 1

    def _go_on(self, arguments: str) -> None:
        if arguments:
            self._deltas.append(CallDelta(self.num_calls - 1, None, None, arguments))

    def _new_id(self) -> str:
        return f"call_{uuid.uuid4().hex[:24]}"

    def _check_name(self, name: str) -> None:
        if name not in self._names:
            raise MalformedText

    def _call_object(self) -> Steps[None]:
        """Read a call as a JSON object of name and arguments, in any order."""
        scanner = self._scanner
        name: str | None = None
        early: str | None = None
        is_begun = False
        yield from scanner.expect("{")
        while True:
            yield from scanner.skip_space()
            key = _unquoted((yield from scanner.string()))
            yield from scanner.skip_space()
            yield from scanner.expect(":")
            yield from scanner.skip_space()
            if key == "name" and name is None:
                name = _unquoted((yield from scanner.string()))
                self._check_name(name)
            elif key in ("arguments", "parameters") and early is None and not is_begun:
                if name is not None:
                    yield from self._arguments(name)
                    is_begun = True
                else:
                    early = yield from self._whole_value()
            else:
                yield from scanner.value()
            yield from scanner.skip_space()
            if not (yield from scanner.accept(",")):
                break
        if name is None:
            raise MalformedText
        yield from scanner.expect("}")
        if not is_begun:
            self._begin(name, _as_object(early or "{}"))

    def _arguments(self, name: str) -> Steps[None]:
        """Read the arguments of a call, and begin it with them."""
        scanner = self._scanner
        if (yield from scanner.peek()) == "{":
            self._begin(name)
            yield from scanner.sliced(scanner.value(), self._go_on)
        else:
            self._begin(name, _as_object((yield from self._whole_value())))

    def _whole_value(self) -> Steps[str]:
        start = self._scanner.at
        yield from self._scanner.value()
        return self._scanner.text[start : self._scanner.at]

    def _take(self) -> Said:
        said = Said("".join(self._content), tuple(self._deltas))
        self._content, self._deltas = [], []
        return said


def _unquoted(text: str) -> str:
    try:
        string: str = json.loads(text, strict=False)
    except ValueError as error:
        raise MalformedText from error
    return string


def _as_object(text: str) -> str:
    """Return arguments as an object: some models write its text as a string, or null for none."""
    if text.startswith('"'):
        text = _unquoted(text)
    if text == "null":
        return "{}"
    if not text.lstrip().startswith("{"):
        raise MalformedText
    return text
