"""A stream of bytes as lines of text of bounded length."""

from controller.backends.log_writer import MAX_LINE_BYTES


class LineSplitter:
    """Cuts what it is fed into lines, keeping no more of a line than may be shown."""

    def __init__(self) -> None:
        self._begun = bytearray()

    def feed(self, chunk: bytes) -> list[str]:
        """Return the lines that ended in this chunk, without their ends."""
        *ended, begun = chunk.split(b"\n")
        lines = []
        for part in ended:
            self._keep(part)
            lines.append(self._take())
        self._keep(begun)
        return lines

    def rest(self) -> list[str]:
        """Return the line that never ended, if one was begun."""
        return [self._take()] if self._begun else []

    def _keep(self, part: bytes) -> None:
        self._begun += part[: MAX_LINE_BYTES - len(self._begun)]

    def _take(self) -> str:
        text = self._begun.decode(errors="replace").rstrip("\r")
        self._begun.clear()
        return text
