"""Linux processes, told apart from later ones with the same number.

Facts come from /proc; ends are awaited through pidfds, which works for processes of any parent.
"""

import asyncio
import os
import select
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROC = Path("/proc")
KILL_ROUND_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRef:
    """One process, for as long as the machine's memory of it lasts.

    `start_ticks` is field 22 of /proc/<pid>/stat: clock ticks between boot and start.
    """

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> "ProcessRef":
        """Return the process that has this number now.

        Raises:
            ProcessLookupError: There is none.
        """
        return cls(pid=pid, start_ticks=int(_stat(pid)[19]), boot_id=boot_id())

    def open(self) -> int | None:
        """Return a pidfd of this very process, or None if it has ended."""
        if self.boot_id != boot_id():
            return None
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        try:
            is_same = ProcessRef.of(self.pid) == self
        except ProcessLookupError:
            is_same = False
        if is_same:
            return pidfd
        os.close(pidfd)
        return None


class ExitWatch:
    """Calls back once when a process has ended, with its exit code where that can be known.

    Only a parent learns the exit code; death by signal N is 128 + N, as shells and containers
    have it. Event loop only.

    Args:
        pidfd: The process, owned by this object from now on.
        on_exit: Called from the event loop.
    """

    def __init__(self, pidfd: int, on_exit: Callable[[int | None], None]) -> None:
        self.exited = asyncio.Event()
        self._pidfd = pidfd
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._ended)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a process that has ended gets none."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return

    def close(self) -> None:
        """Stop watching; the process is left alone."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _ended(self) -> None:
        exit_code = _reap(self._pidfd)
        self.close()
        self.exited.set()
        self._on_exit(exit_code)


def marked(mark: str) -> list[ProcessRef]:
    """Return the living processes whose environment has the entry `mark` ("NAME=value").

    Children inherit their parent's environment, so this finds a whole tree, whatever sessions and
    parents its members have got themselves. Processes of other users are not seen.
    """
    entry = mark.encode()
    found = []
    for pid in _pids():
        try:
            if entry in (PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                found.append(ProcessRef.of(pid))
        except (OSError, ValueError):
            continue  # ended meanwhile, or not ours to read
    return found


def is_session_leader(process: ProcessRef) -> bool:
    """Return whether a living process began its own session."""
    try:
        return int(_stat(process.pid)[3]) == process.pid
    except ProcessLookupError:
        return False


def kill_marked(mark: str, *, num_rounds: int = 10) -> list[ProcessRef]:
    """Kill every marked process and those they start meanwhile; blocks until they have ended.

    Returns:
        What does not die, because the kernel is busy on its behalf.
    """
    for _ in range(num_rounds):
        processes = marked(mark)
        if not processes:
            return []
        pidfds = [pidfd for process in processes if (pidfd := process.open()) is not None]
        try:
            _kill(pidfds)
        finally:
            for pidfd in pidfds:
                os.close(pidfd)
    return marked(mark)


@cache
def boot_id() -> str:
    """Return what distinguishes this boot of the machine from all others."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def _kill(pidfds: list[int]) -> None:
    poll = select.poll()
    waiting = set(pidfds)
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            continue
    while waiting and (ended := poll.poll(KILL_ROUND_S * 1000)):
        for pidfd, _ in ended:
            poll.unregister(pidfd)
            waiting.discard(pidfd)


def _reap(pidfd: int) -> int | None:
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status


def _pids() -> Iterator[int]:
    return (int(path.name) for path in PROC.iterdir() if path.name.isdigit())


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat from the third, the state, on."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    return text[text.rindex(")") + 2 :].split()
