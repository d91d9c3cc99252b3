"""Checkpoints that stop and continue a process instead of moving its memory; and a fake driver."""

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

from runtime.memory.checkpoint import CheckpointFailed
from runtime.rpc import inference_pb2 as pb

RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_STATE, NOT_SUPPORTED = 0, 1, 2, 401, 801


class StoppingCheckpoints:
    """Suspends with SIGSTOP and resumes with SIGCONT.

    A file called like a method in the runtime's home directory has that method fail, and as long
    as there is one called `hang` the driver does not answer.
    """

    def suspend(self, pid: int) -> list[pb.Phase]:
        self._check("suspend", is_fatal=False)
        os.kill(pid, signal.SIGSTOP)
        self._hang()
        return [pb.Phase(name="checkpoint", seconds=0.25)]

    def resume(self, pid: int) -> list[pb.Phase]:
        self._check("resume", is_fatal=True)
        os.kill(pid, signal.SIGCONT)
        self._hang()
        return [pb.Phase(name="restore", seconds=0.125)]

    def _hang(self) -> None:
        while (Path.home() / "hang").exists():
            time.sleep(0.01)

    def _check(self, name: str, *, is_fatal: bool) -> None:
        if (Path.home() / name).exists():
            raise CheckpointFailed(f"told to refuse {name}", is_fatal=is_fatal)


class FakeDriver:
    """The part of libcuda that checkpoints, with its state machine.

    `answers` has the result of the next call of a function, by name, instead of the right one.
    """

    def __init__(self) -> None:
        self.states: dict[int, int] = {}
        self.answers: dict[str, int] = {}
        self.lock_timeout_ms = 0
        self.is_initialized = False

    def cuInit(self, flags: int) -> int:  # the driver's name
        assert flags == 0
        self.is_initialized = True
        return self.answers.pop("cuInit", SUCCESS)

    def cuCheckpointProcessLock(self, pid: Any, arguments: Any) -> int:
        self.lock_timeout_ms = _words(arguments)[0]
        return self._move("Lock", pid, RUNNING, LOCKED)

    def cuCheckpointProcessCheckpoint(self, pid: Any, arguments: Any) -> int:
        assert _words(arguments) == [0] * 8
        return self._move("Checkpoint", pid, LOCKED, CHECKPOINTED)

    def cuCheckpointProcessRestore(self, pid: Any, arguments: Any) -> int:
        assert _words(arguments) == [0] * 8
        return self._move("Restore", pid, CHECKPOINTED, LOCKED)

    def cuCheckpointProcessUnlock(self, pid: Any, arguments: Any) -> int:
        assert _words(arguments) == [0] * 8
        return self._move("Unlock", pid, LOCKED, RUNNING)

    def _move(self, name: str, pid: Any, source: int, target: int) -> int:
        assert self.is_initialized, "cuInit comes first"
        if name in self.answers:
            return self.answers.pop(name)
        if pid.value not in self.states:
            return INVALID_VALUE
        if self.states[pid.value] != source:
            return ILLEGAL_STATE
        self.states[pid.value] = target
        return SUCCESS


def _words(arguments: Any) -> list[int]:
    """Return the 64 bytes that a pointer points to, as eight numbers."""
    return list(ctypes.cast(arguments, ctypes.POINTER(ctypes.c_uint64 * 8)).contents)
