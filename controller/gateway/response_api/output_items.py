"""Pieces of an answer to items of a response, and the events that tell of them.

The items are the same however the answer is cut into pieces; the events between the first and the
last of an item are as many as its pieces.
"""

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from controller.gateway.pieces import Piece, TokenReport
from controller.gateway.schemas.common import ChosenLogprob
from controller.gateway.schemas.response_object import (
    ItemStatus,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
)

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
Logprobs = Callable[[Sequence[TokenReport]], list[dict[str, Any]]]


class Event(NamedTuple):
    """Something that happened to a response; the fields are JSON."""

    type: str
    fields: dict[str, Any]

    def written(self, number: int) -> str:
        """Return it as a server-sent event with its place in the stream."""
        data = {"type": self.type, **self.fields, "sequence_number": number}
        return f"event: {self.type}\ndata: {_encode(data)}\n\n"


class Delta(NamedTuple):
    """Text that an item has grown by: what comes with every token, so most of it is prepared."""

    head: str
    text: str
    tail: str = ""

    def written(self, number: int) -> str:
        """Return it as a server-sent event with its place in the stream."""
        return f'{self.head}{_encode(self.text)}{self.tail},"sequence_number":{number}}}\n\n'


Happening = Event | Delta


class _OpenItem(ABC):
    """An item that grows.

    Args:
        index: Its place in the output.
    """

    prefix: ClassVar[str]
    events: ClassVar[str]
    part_index: ClassVar[dict[str, int]] = {}

    def __init__(self, index: int) -> None:
        self._id = f"{self.prefix}_{uuid.uuid4().hex}"
        self._place = {"item_id": self._id, "output_index": index, **self.part_index}
        self._index = index
        self._texts: list[str] = []
        kind = f"{self.events}.delta"
        opening = _encode({"type": kind, **self._place})[:-1]
        self._delta_head = f'event: {kind}\ndata: {opening},"delta":'

    @property
    def text(self) -> str:
        """All of its text so far."""
        return "".join(self._texts)

    def begin(self) -> Iterator[Event]:
        """Yield what tells of the new item."""
        item = self.item("in_progress").model_dump(mode="json")
        yield Event("response.output_item.added", {"output_index": self._index, "item": item})

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """Yield what tells that the item is over."""
        item = self.item(status).model_dump(mode="json")
        yield Event("response.output_item.done", {"output_index": self._index, "item": item})

    @abstractmethod
    def item(self, status: ItemStatus) -> OutputItem:
        """Return the item as it is now."""


class _TextItem(_OpenItem):
    """An item whose content is one part of text."""

    part_index: ClassVar[dict[str, int]] = {"content_index": 0}

    @abstractmethod
    def part(self) -> OutputText | ReasoningText:
        """Return the part as it is now."""

    def begin(self) -> Iterator[Event]:
        """Yield what tells of the new item and of its part."""
        item = {**self.item("in_progress").model_dump(mode="json"), "content": []}
        yield Event("response.output_item.added", {"output_index": self._index, "item": item})
        part = self.part().model_dump(mode="json")
        yield Event("response.content_part.added", {**self._place, "part": part})

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """Yield what tells that the part is over, and the item."""
        part = self.part().model_dump(mode="json")
        told = {name: value for name, value in part.items() if name in ("text", "logprobs")}
        yield Event(f"{self.events}.done", {**self._place, **told})
        yield Event("response.content_part.done", {**self._place, "part": part})
        yield from super().end(status)


class _Message(_TextItem):
    prefix = "msg"
    events = "response.output_text"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._logprobs: list[dict[str, Any]] = []

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Delta:
        """Add text; return what tells of it."""
        self._texts.append(text)
        self._logprobs += logprobs
        tail = f',"logprobs":{_encode(logprobs)}' if logprobs else ',"logprobs":[]'
        return Delta(self._delta_head, text, tail)

    def part(self) -> OutputText:
        """Return the text as it is now."""
        logprobs = [ChosenLogprob.model_validate(one) for one in self._logprobs]
        return OutputText(text=self.text, logprobs=logprobs)

    def item(self, status: ItemStatus) -> OutputMessage:
        """Return the message as it is now."""
        return OutputMessage(id=self._id, status=status, content=[self.part()])


class _Thought(_TextItem):
    prefix = "rs"
    events = "response.reasoning_text"

    def add(self, text: str) -> Delta:
        """Add text; return what tells of it."""
        self._texts.append(text)
        return Delta(self._delta_head, text)

    def part(self) -> ReasoningText:
        """Return the text as it is now."""
        return ReasoningText(text=self.text)

    def item(self, status: ItemStatus) -> OutputReasoning:
        """Return the thought as it is now."""
        return OutputReasoning(id=self._id, status=status, content=[self.part()])


class _Call(_OpenItem):
    prefix = "fc"
    events = "response.function_call_arguments"

    def __init__(self, index: int, *, call_id: str, name: str) -> None:
        super().__init__(index)
        self._call_id = call_id
        self._name = name

    def add(self, arguments: str) -> Delta:
        """Add to the arguments; return what tells of it."""
        self._texts.append(arguments)
        return Delta(self._delta_head, arguments)

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """Yield what tells that the arguments are over, and the item."""
        told = {**self._place, "name": self._name, "arguments": self.text}
        yield Event(f"{self.events}.done", told)
        yield from super().end(status)

    def item(self, status: ItemStatus) -> OutputCall:
        """Return the call as it is now."""
        return OutputCall(
            id=self._id,
            status=status,
            call_id=self._call_id,
            name=self._name,
            arguments=self.text,
        )


class OutputItems:
    """The output of one response as it comes.

    Args:
        logprobs: Writes a piece's log-probabilities, if they are asked for.

    Attributes:
        done: The items that are over.
    """

    def __init__(self, logprobs: Logprobs | None = None) -> None:
        self.done: list[OutputItem] = []
        self._logprobs = logprobs
        self._open: _OpenItem | None = None

    def add(self, piece: Piece) -> Iterator[Happening]:
        """Take what is new of the answer; yield what happens by it. To be read to its end."""
        if piece.reasoning:
            if not isinstance(self._open, _Thought):
                yield from self._begin(_Thought(self._next))
            assert isinstance(self._open, _Thought)
            yield self._open.add(piece.reasoning)
        told = 0
        for call in piece.calls:
            if call.call_id is not None:
                yield from self._say(piece, told, call.after)
                told = call.after
                yield from self._begin(
                    _Call(self._next, call_id=call.call_id, name=call.name or "")
                )
            if call.arguments:
                assert isinstance(self._open, _Call), "a call's first part has its id"
                yield self._open.add(call.arguments)
        yield from self._say(piece, told, len(piece.text))

    def end(self, *, is_complete: bool) -> Iterator[Event]:
        """End the answer; yield what happens by it. An answer of nothing is an empty message."""
        if self._open is None and not self.done:
            yield from self._begin(_Message(0))
        yield from self._finish("completed" if is_complete else "incomplete")

    @property
    def _next(self) -> int:
        return len(self.done) + (self._open is not None)

    def _say(self, piece: Piece, start: int, end: int) -> Iterator[Happening]:
        """Add a part of a piece's text; its tokens go with the last."""
        if start == end:
            return
        if not isinstance(self._open, _Message):
            yield from self._begin(_Message(self._next))
        assert isinstance(self._open, _Message)
        tokens = piece.tokens if end == len(piece.text) else ()
        logprobs = self._logprobs(tokens) if self._logprobs is not None and tokens else []
        yield self._open.add(piece.text[start:end], logprobs)

    def _begin(self, item: _OpenItem) -> Iterator[Event]:
        yield from self._finish("completed")
        self._open = item
        yield from item.begin()

    def _finish(self, status: ItemStatus) -> Iterator[Event]:
        item, self._open = self._open, None
        if item is not None:
            self.done.append(item.item(status))
            yield from item.end(status)
