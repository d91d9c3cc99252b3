"""Entry point of the runtime server: `python -m runtime.main`. Free of torch and numpy.

The zygote is started first, because its imports take seconds; the server's own come meanwhile.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from runtime.spawn import ZygoteOptions, spawn_zygote

MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un.sun_path, less the final zero
LOG_LEVELS = ("debug", "info", "warning", "error")


class UsageError(Exception):
    """The command line asks for what cannot be done; the message says what to change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    options = _parse(argv)
    # Until the server listens for them; as process 1 of a container we would not even be killed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    os.umask(0o077)  # the socket is for this user alone
    try:
        _prepare_socket(options.socket)
        _check_store(options.store)
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    zygote_options = ZygoteOptions(
        runtime_id=options.id,
        store=options.store.resolve(),
        engine_factory=options.engine_factory,
        log_level=options.log_level,
    )
    zygote = spawn_zygote(zygote_options)
    # Late on purpose: gRPC and structlog import while the zygote does the same with torch.
    from runtime.server import serve

    try:
        asyncio.run(serve(options.socket, zygote_options, zygote, checkpoints=options.checkpoints))
    finally:
        options.socket.unlink(missing_ok=True)
    return 0


def _exit(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; the twin of --some-flag is $COLDSPARK_RUNTIME_SOME_FLAG."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.main", description="Serve one replica of a model over gRPC."
    )
    flags = [
        parser.add_argument("--runtime-id", dest="id", help="its name in status and logs"),
        parser.add_argument("--socket", type=Path, help="path of the Unix socket to serve on"),
        parser.add_argument("--store", type=Path, help="directory of built snapshots"),
        parser.add_argument("--log-level", choices=LOG_LEVELS, default="info"),
        parser.add_argument(
            "--engine-factory",
            default="runtime.engine_factory:TorchEngineFactory",
            help="module:class that builds the engine",
        ),
        parser.add_argument(
            "--checkpoints",
            default="runtime.memory.checkpoint:ProcessCheckpoints.open",
            help="module:callable that opens what takes engines off their GPUs",
        ),
    ]
    for flag in flags:
        flag.default = os.environ.get(f"COLDSPARK_RUNTIME_{flag.dest.upper()}", flag.default)
        flag.required = flag.default is None
    return parser.parse_args(argv)


def _prepare_socket(path: Path) -> None:
    """Create the socket's directory, private, and clear the way of what a dead server left."""
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH_BYTES:
        raise UsageError(
            f"the socket path {str(path)!r} has {size} bytes, over the system's limit of "
            f"{MAX_SOCKET_PATH_BYTES}: choose a shorter directory"
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        return
    if not path.is_socket():
        raise UsageError(f"{path} exists and is no socket: remove it or choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise UsageError(f"another runtime is serving on {path}: stop it first")


def _check_store(path: Path) -> None:
    if not path.is_dir():
        raise UsageError(f"the snapshot store {str(path)!r} is no directory")


if __name__ == "__main__":
    sys.exit(main())
