"""The Linux calls Python does not wrap: who dies with whom, who adopts orphans, who holds what."""

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent is gone.

    NOTE: the kernel watches the parent's *thread* that started us, so that must be one that lives
    as long as the parent: its main thread.

    Args:
        parent_pid: The parent we were started by; if it is gone already, this call does not return.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, so that they can be waited for."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_process_name(name: str) -> None:
    """Set what `ps -o comm` and `top` show; the kernel keeps 15 bytes."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()))


def num_threads() -> int:
    """Return how many threads this process has, those of native libraries included."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def resident_bytes() -> int:
    """Return the resident set of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def private_bytes(pid: int) -> int:
    """Return what a process and its descendants hold of the memory: what only they can give back.

    That is what no file and no shared memory backs. A page that a fork shares with its parent is
    counted for both. What is gone meanwhile holds nothing.
    """
    process = Path("/proc", str(pid))
    try:
        _, resident, shared, *_ = map(int, (process / "statm").read_text().split())
        lists = [(thread / "children").read_text() for thread in (process / "task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    children = (int(child) for some in lists for child in some.split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE") + sum(map(private_bytes, children))


def describe_exit(code: int) -> str:
    """Return an exit code as words; a negative one is a signal's number."""
    if code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}"


def _prctl(option: int, argument: object) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
