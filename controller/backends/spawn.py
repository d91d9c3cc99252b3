"""Starting a process that outlives us, beside the one that keeps its log. Blocks."""

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from controller.backends import log_writer
from controller.backends.processes import ProcessRef

LOG_WRITER_COMMAND = (sys.executable, "-I", "-S", log_writer.__file__)

STDERR = 2


def spawn_logged(
    command: Sequence[str], env: Mapping[str, str], log: Path
) -> tuple[ProcessRef, ProcessRef]:
    """Start a command whose output goes to a log; return it and the log's writer.

    Raises:
        OSError: One of them cannot be started; neither is left.
    """
    read_end, write_end = os.pipe()
    null_in = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    null_out = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    to_pipe = [(os.POSIX_SPAWN_DUP2, write_end, number) for number in (1, 2)]
    from_pipe = (os.POSIX_SPAWN_DUP2, read_end, 0)
    writer = None
    try:
        writer = _spawn([*LOG_WRITER_COMMAND, str(log)], {}, [from_pipe, null_out])
        process = _spawn(command, env, [null_in, *to_pipe])
    except OSError:
        if writer is not None:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
        raise
    finally:
        os.close(read_end)
        os.close(write_end)
    return ProcessRef.of(process), ProcessRef.of(writer)


def _spawn(
    command: Sequence[str], env: Mapping[str, str], file_actions: Sequence[tuple[object, ...]]
) -> int:
    """Start a session of its own, with no inherited files and with default signals."""
    closing = [(os.POSIX_SPAWN_CLOSE, number) for number in _inherited_files()]
    return os.posix_spawnp(
        command[0],
        list(command),
        env,
        file_actions=[*closing, *file_actions],
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGTERM),
    )


def _inherited_files() -> Iterator[int]:
    """Yield the files, standard streams apart, that were left open for us and our children."""
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        try:
            if number > STDERR and os.get_inheritable(number):
                yield number
        except OSError:
            continue  # the one that listed the directory
