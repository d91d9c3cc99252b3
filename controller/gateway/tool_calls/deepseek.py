"""DeepSeek: V3 and R1 write arguments in a fenced block, V3.1 right after the separator.

BEGIN function SEPARATOR name, newline, ```json, newline, {…}, newline, ``` END
BEGIN name SEPARATOR {…} END
"""

from controller.gateway.scanning import Steps
from controller.gateway.tool_calls.base import ToolCallParser
from controller.gateway.tool_calls.names import is_name
from controller.gateway.tool_calls.shape import CallShape

_BAR = "\N{FULLWIDTH VERTICAL LINE}"
ALL_BEGIN = f"<{_BAR}tool▁calls▁begin{_BAR}>"
ALL_END = f"<{_BAR}tool▁calls▁end{_BAR}>"
BEGIN = f"<{_BAR}tool▁call▁begin{_BAR}>"
END = f"<{_BAR}tool▁call▁end{_BAR}>"
SEPARATOR = f"<{_BAR}tool▁sep{_BAR}>"
FENCE = "```"
FENCED_SHAPE = CallShape(
    opening=ALL_BEGIN,
    before_name=f"{BEGIN}function{SEPARATOR}",
    before_arguments=f"\n{FENCE}json\n",
    after_arguments=f"\n{FENCE}{END}",
    separator="\n",
    closing=ALL_END,
)
PLAIN_SHAPE = CallShape(
    opening=ALL_BEGIN,
    before_name=BEGIN,
    before_arguments=SEPARATOR,
    after_arguments=END,
    separator="",
    closing=ALL_END,
)


class DeepSeekParser(ToolCallParser):
    """Reads calls between tags; the tags around all calls say nothing."""

    markers = (ALL_BEGIN, ALL_END, BEGIN, END, SEPARATOR)

    def _read(self) -> Steps[None]:
        while marker := (yield from self._say_until(ALL_BEGIN, ALL_END, BEGIN)):
            if marker == BEGIN:
                yield from self._attempt(self._scanner.at - len(BEGIN), self._call())
                if self._has_enough:
                    return

    def _call(self) -> Steps[None]:
        scanner = self._scanner
        name = yield from scanner.word(is_name)
        yield from scanner.expect(SEPARATOR)
        if name == "function" and (yield from scanner.peek()) != "{":
            name = yield from scanner.word(is_name)
            yield from scanner.skip_space()
            yield from scanner.expect(FENCE + "json")
        self._check_name(name)
        yield from scanner.skip_space()
        yield from self._arguments(name)
        yield from scanner.skip_space()
        if (yield from scanner.accept(FENCE)):
            yield from scanner.skip_space()
        yield from scanner.accept(END)
