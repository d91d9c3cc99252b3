"""Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, newer `[TOOL_CALLS]name[ARGS]{…}`."""

import secrets
import string

from controller.gateway.scanning import Steps
from controller.gateway.tool_calls.base import ToolCallParser
from controller.gateway.tool_calls.names import is_name
from controller.gateway.tool_calls.shape import CallShape

TAG = "[TOOL_CALLS]"
ARGUMENTS = "[ARGS]"
CALL_ID = "[CALL_ID]"
_ALPHANUMERIC = string.ascii_letters + string.digits
LIST_SHAPE = CallShape(
    opening=f"{TAG}[",
    before_name='{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}",
    separator=", ",
    closing="]",
)
NAMED_SHAPE = CallShape(
    before_name=TAG, before_arguments=ARGUMENTS, after_arguments="", separator=""
)


class MistralParser(ToolCallParser):
    """Reads calls after tags, in a list or each with a tag of its own."""

    markers = (TAG, ARGUMENTS, CALL_ID)

    def _read(self) -> Steps[None]:
        scanner = self._scanner
        while (yield from self._say_until(TAG)):
            start = scanner.at - len(TAG)
            yield from scanner.skip_space()
            if (yield from scanner.accept("[")):
                yield from self._list(start)
            else:
                yield from self._attempt(start, self._named())
            if self._has_enough:
                return

    def _list(self, start: int) -> Steps[None]:
        scanner = self._scanner
        while True:
            yield from scanner.skip_space()
            if not (yield from self._attempt(start, self._call_object())) or self._has_enough:
                return
            start = scanner.at
            yield from scanner.skip_space()
            if not (yield from scanner.accept(",")):
                yield from scanner.accept("]")
                return

    def _named(self) -> Steps[None]:
        scanner = self._scanner
        name = yield from scanner.word(is_name)
        self._check_name(name)
        if (yield from scanner.accept(CALL_ID)):
            yield from scanner.word(str.isalnum)
        yield from scanner.accept(ARGUMENTS)
        yield from scanner.skip_space()
        yield from self._arguments(name)

    def _new_id(self) -> str:
        """Return nine letters and digits: the models' templates take no other ids."""
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
