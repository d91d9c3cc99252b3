"""Starting the zygote process. Standard library only, so that it can come before all imports."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

# Native libraries start thread pools at import, and a fork would lose them. The engine sets its
# own number of threads after the fork.
NATIVE_THREADING: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # A thread that spins for its team takes the core of the controller or of the team's last
    # member: on two busy cores a step took ten times as long.
    "OMP_WAIT_POLICY": "passive",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ZygoteOptions:
    """What a zygote is told at its start."""

    runtime_id: str
    store: Path
    engine_factory: str  # module:class
    log_level: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ZygoteProcess:
    """A started zygote, its control socket (non-blocking) and the read end of its output."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    output: int


def spawn_zygote(options: ZygoteOptions) -> ZygoteProcess:
    """Start a zygote; it dies with the calling thread, which must be the main one.

    Raises:
        OSError: The system has no descriptors, processes or memory left.
    """
    with ExitStack() as ours, ExitStack() as theirs:
        control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.callback(control.close)
        theirs.callback(their_control.close)
        control.setblocking(False)
        output, their_output = os.pipe()
        ours.callback(os.close, output)
        theirs.callback(os.close, their_output)
        process = subprocess.Popen(
            _command(options, their_control.fileno()),
            stdin=subprocess.DEVNULL,
            stdout=their_output,
            stderr=their_output,
            pass_fds=[their_control.fileno()],
            env={**os.environ, **NATIVE_THREADING},
        )
        ours.pop_all()
    return ZygoteProcess(process=process, control=control, output=output)


def _command(options: ZygoteOptions, control: int) -> list[str]:
    isolation = ["-P"] if sys.flags.safe_path else []  # looks for modules where we did
    command = [sys.executable, *isolation, "-m", "runtime.zygote"]
    command += ["--control-fd", str(control), "--parent-pid", str(os.getpid())]
    command += ["--runtime-id", options.runtime_id, "--store", str(options.store)]
    command += ["--engine-factory", options.engine_factory, "--log-level", options.log_level]
    return command
