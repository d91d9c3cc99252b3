"""A runtime in place of runtime.main: it runs the Python statements its socket is sent.

One connection, one piece of source, which may set `answer`; the connection closes when it has run.
Started from its text, so that it needs nothing but an interpreter.
"""

import argparse
import os
import signal
import socket
import sys
from types import FrameType


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runtime-id")
    parser.add_argument("--socket")
    parser.add_argument("--store")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, leave)
    os.umask(0o077)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(options.socket)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as stream:
                names: dict[str, object] = {"answer": ""}
                exec(compile(stream.read(), "<told>", "exec"), names)
                stream.write(str(names["answer"]))


def leave(number: int, frame: FrameType | None) -> None:
    sys.stdout.write("leaving\n")
    sys.exit(0)


main()
