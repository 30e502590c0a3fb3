"""Starting, watching and ending processes by a pid that is proven to be still the same process.

Never signals by name, and never a pid whose process is not the one that was recorded.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import ServicesError

POLL_SECONDS = 0.05
LOG_TAIL_LINES = 15


@dataclass(frozen=True)
class Process:
    """A pid together with what tells it from a later process of the same number."""

    pid: int
    born: str

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        born = _born(pid)
        return None if born is None else cls(pid, born)

    def alive(self) -> bool:
        return _born(self.pid) == self.born


def spawn(argv: Sequence[str], log: Path) -> Process:
    """Start `argv` in a session of its own, so that a terminal's Ctrl-C does not reach it."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process = Process.of(child.pid)
    if process is None:
        raise ServicesError(f"{argv[0]} ended at once:\n{tail(log)}")
    return process


def wait_until(answers: Callable[[], bool], process: Process, log: Path, seconds: float) -> None:
    """Return once `answers()` is true; raise when the process dies first or takes too long."""
    deadline = time.monotonic() + seconds
    while not answers():
        if not process.alive():
            raise ServicesError(f"the process ended while starting; {log} ends with:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise ServicesError(f"no answer within {seconds:g} s; {log} ends with:\n{tail(log)}")
        time.sleep(POLL_SECONDS)


def stop(process: Process, polite: signal.Signals, seconds: float) -> None:
    """Ask with `polite`, wait at most `seconds`, then kill."""
    if not process.alive():
        return
    os.kill(process.pid, polite)
    if not _gone(process, seconds):
        kill(process)


def kill(process: Process) -> None:
    """SIGKILL the process and all its descendants at one moment."""
    if not process.alive():
        return
    # A stopped parent forks no more, so the list of its children is complete.
    os.kill(process.pid, signal.SIGSTOP)
    family = [process, *_descendants(process.pid)]
    for member in family:
        if member.alive():
            os.kill(member.pid, signal.SIGKILL)
    for member in family:
        if not _gone(member, 10):
            raise ServicesError(f"process {member.pid} does not die after SIGKILL")


def tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-LOG_TAIL_LINES:])


def _gone(process: Process, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while process.alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may itself hold spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _born(pid: int) -> str | None:
    """Boot and start time of a living process; None for a dead one, zombies included."""
    fields = _stat(pid)
    if fields is None or fields[0] in "ZX":
        return None
    return f"{_boot()}:{fields[19]}"


def _descendants(pid: int) -> list[Process]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
            parents[int(entry.name)] = int(fields[1])
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found += [process for child in frontier if (process := Process.of(child)) is not None]
    return found
