"""Llama 3: `{"name": …, "parameters": {…}}`, several with `;` between, maybe after a tag."""

from controller.gateway.scanning import Steps
from controller.gateway.tool_calls.base import ToolCallParser
from controller.gateway.tool_calls.shape import CallShape

TAG = "<|python_tag|>"
SHAPE = CallShape(
    before_name='{"name": "',
    before_arguments='", "parameters": ',
    after_arguments="}",
    separator="; ",
)


class Llama3JsonParser(ToolCallParser):
    """Reads calls at the answer's beginning and after a tag; objects elsewhere are content."""

    markers = (TAG,)

    def _read(self) -> Steps[None]:
        tag = yield from self._scanner.accept(TAG)
        yield from self._calls(len(TAG) if tag else 0)
        while not self._has_enough and (yield from self._say_until(TAG)):
            yield from self._calls(len(TAG))

    def _calls(self, num_read: int) -> Steps[None]:
        scanner = self._scanner
        start = scanner.at - num_read
        yield from scanner.skip_space()
        while (yield from scanner.peek()) == "{":
            if not (yield from self._attempt(start, self._call_object())) or self._has_enough:
                return
            start = scanner.at
            yield from scanner.skip_space()
            yield from scanner.accept(";")
            yield from scanner.skip_space()
        rest = scanner.text[start : scanner.at]
        if rest.strip() != ";":
            self._say(rest)
