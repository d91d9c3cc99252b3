"""A process that keeps what a runtime prints, within bounds, whether or not a controller lives.

Run as `python -I -S log_writer.py PATH`, with the runtime's output as standard input. It ends when
the last process that could print has ended. Standard library only, and little of it: one runs
beside every runtime.
"""

import os
import sys

MAX_LINE_BYTES = 8192
MAX_FILE_BYTES = 8 << 20
CHUNK_BYTES = 1 << 16


class CappedLog:
    """A log file of bounded size beside its predecessor, `<path>.1`, with lines of bounded length.

    What cannot be written, because the disk is full say, is lost: it must never hold up a runtime.
    """

    def __init__(
        self,
        path: str,
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self._path = path
        self._max_file_bytes = max_file_bytes
        self._max_line_bytes = max_line_bytes
        self._line_bytes = 0
        self._file = -1
        self._num_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Append output as it came, from anywhere within a line to anywhere within another."""
        *ended, begun = chunk.split(b"\n")
        kept = bytearray()
        for line in ended:
            kept += self._cut(line) + b"\n"
            self._line_bytes = 0
        kept += self._cut(begun)
        try:
            self._append(kept)
        except OSError:
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _cut(self, part: bytes) -> bytes:
        kept = part[: max(0, self._max_line_bytes - self._line_bytes)]
        self._line_bytes += len(part)
        return kept

    def _append(self, data: bytearray) -> None:
        if self._file >= 0 and self._num_bytes + len(data) > self._max_file_bytes:
            self.close()
            os.replace(self._path, f"{self._path}.1")  # noqa: PTH105  # pathlib doubles our start
        if self._file < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(self._path, flags, 0o600)
            self._num_bytes = os.fstat(self._file).st_size
        self._num_bytes += os.write(self._file, data)


def main() -> None:
    """Copy standard input into the log until it ends."""
    log = CappedLog(sys.argv[1])
    while chunk := os.read(0, CHUNK_BYTES):
        log.write(chunk)
    log.close()


if __name__ == "__main__":
    main()
