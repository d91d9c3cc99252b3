"""Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, text around it."""

from controller.gateway.scanning import Steps
from controller.gateway.tool_calls.base import ToolCallParser
from controller.gateway.tool_calls.shape import CallShape

BEGIN = "<tool_call>"
END = "</tool_call>"
SHAPE = CallShape(
    before_name=f'{BEGIN}\n{{"name": "',
    before_arguments='", "arguments": ',
    after_arguments=f"}}\n{END}",
    separator="\n",
)


class HermesParser(ToolCallParser):
    """Reads calls between tags."""

    markers = (BEGIN, END)

    def _read(self) -> Steps[None]:
        while (yield from self._say_until(BEGIN)):
            yield from self._attempt(self._scanner.at - len(BEGIN), self._call())
            if self._has_enough:
                return

    def _call(self) -> Steps[None]:
        yield from self._scanner.skip_space()
        yield from self._call_object()
        yield from self._scanner.skip_space()
        yield from self._scanner.accept(END)
