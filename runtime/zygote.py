"""The fork server: a process with torch and the engine imported that never touched a GPU.

It waits for fork requests of the runtime server and reports when an engine ends. It owns no model
and no state. It stays single-threaded, because a fork copies only the calling thread.
"""

import argparse
import contextlib
import gc
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import structlog

from runtime.engine_api import EngineFactory
from runtime.engine_process import run_engine
from runtime.linux import die_with_parent, num_threads, set_process_name
from runtime.logs import configure_logs
from runtime.named import find_named
from runtime.zygote_messages import (
    MAX_MESSAGE_BYTES,
    Exited,
    Forked,
    ForkRefused,
    Prepared,
    Preparing,
    Ready,
    ZygoteMessage,
    encode_message,
)

PREPARE_AFTER_S = 0.25
"""A zygote that was started for a request gets it before; the engine then prepares itself."""

log = structlog.get_logger()


class Zygote:
    """Forks engines on request and reaps them.

    Args:
        control: The socket to the runtime server.
        factory: Builds the engine in the forked process.
        store: Directory of snapshots.
    """

    def __init__(self, *, control: socket.socket, factory: EngineFactory[Any], store: Path) -> None:
        self._control = control
        self._factory = factory
        self._store = store

    def serve(self) -> None:
        """Answer fork requests until the server closes the control socket."""
        wake_reader, wake_writer = socket.socketpair()
        with wake_reader, wake_writer, selectors.DefaultSelector() as selector:
            wake_reader.setblocking(False)
            wake_writer.setblocking(False)
            signal.signal(signal.SIGCHLD, _interrupt)
            signal.set_wakeup_fd(wake_writer.fileno())
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wake_reader, selectors.EVENT_READ)
            is_open, is_prepared = True, False
            while is_open:
                timeout_s = None if is_prepared else PREPARE_AFTER_S
                ready = {key.fileobj for key, _ in selector.select(timeout_s)}
                if not ready and not is_prepared:
                    self._prepare()
                    is_prepared = True
                if wake_reader in ready:
                    wake_reader.recv(4096)
                    self._reap()
                if self._control in ready:
                    is_open = self._answer()

    def _prepare(self) -> None:
        started = time.monotonic()
        self._send(Preparing())
        try:
            self._factory.prepare()
        except Exception:
            log.exception("not_prepared")  # an engine will meet it, and say so to somebody
        else:
            log.info("prepared", seconds=round(time.monotonic() - started, 3))
        self._send(Prepared())

    def _answer(self) -> bool:
        """Handle one request; return whether the server is still there."""
        packet, descriptors, _, _ = socket.recv_fds(
            self._control, MAX_MESSAGE_BYTES, 2, socket.MSG_CMSG_CLOEXEC
        )
        if not packet:
            return False
        engine_socket, stderr = descriptors
        try:
            self._send(self._fork(engine_socket, stderr))
        finally:
            os.close(engine_socket)
            os.close(stderr)
        return True

    def _fork(self, engine_socket: int, stderr: int) -> Forked | ForkRefused:
        if (count := num_threads()) > 1:
            reason = f"the zygote has {count} threads and a fork would lose all but one"
            log.error("fork_refused", reason=reason)
            return ForkRefused(reason=reason)
        zygote_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            log.exception("fork_failed")
            return ForkRefused(reason=f"fork failed: {error}")
        if pid == 0:
            self._become_engine(zygote_pid, engine_socket, stderr)
        return Forked(pid=pid)

    def _become_engine(self, zygote_pid: int, engine_socket: int, stderr: int) -> NoReturn:
        """Turn the forked process into an engine; never returns into the zygote's code."""
        code = 1
        try:
            die_with_parent(zygote_pid)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            set_process_name("engine")
            os.dup2(stderr, sys.stdout.fileno())
            os.dup2(stderr, sys.stderr.fileno())
            os.close(stderr)
            self._control.close()
            run_engine(
                socket.socket(fileno=engine_socket), factory=self._factory, store=self._store
            )
            code = 0
        except Exception:  # the process's root; the exit code tells the server
            log.exception("engine_crashed")
        finally:
            # Skips the zygote's exit handlers, and leaves the socket to the kernel: the server
            # sees it close only when the exit status is settled.
            os._exit(code)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._send(Exited(pid=pid, status=status))

    def _send(self, message: ZygoteMessage) -> None:
        with contextlib.suppress(ConnectionError):  # the server left; `serve` sees that next
            self._control.send(encode_message(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Import the engine, say so, and serve forks."""
    started = time.monotonic()
    options = _parse(argv)
    die_with_parent(options.parent_pid)
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which ends us itself
        signal.signal(number, signal.SIG_IGN)
    set_process_name("zygote")
    configure_logs(options.log_level, runtime_id=options.runtime_id)
    control = socket.socket(fileno=options.control_fd)
    factory: EngineFactory[Any] = find_named(options.engine_factory)()
    gc.collect()
    gc.freeze()  # keeps collections in the engine from copying every page shared with us
    ready = Ready(import_s=time.monotonic() - started)
    log.info("zygote_ready", import_s=round(ready.import_s, 3))
    control.send(encode_message(ready))
    Zygote(control=control, factory=factory, store=options.store).serve()
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m runtime.zygote", description=__doc__)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--runtime-id", required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--engine-factory", required=True, help="module:class")
    parser.add_argument("--log-level", default="info")
    return parser.parse_args(argv)


def _interrupt(_number: int, _frame: object) -> None:
    """Exist, so that the signal writes to the wakeup descriptor instead of being ignored."""


if __name__ == "__main__":
    sys.exit(main())
