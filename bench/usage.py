"""What processes take: CPU and memory of a process and of everything that it started, as the kernel counts it.

What an ended child took is added to the parent that waits for it, so a database session that came and went within a
run is not lost, and an ended thread stays in its process's sum. Left out: processes that a parent never waits for.
"""

import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from bench.errors import BenchError

TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
#: Of a process's clocks, the one by which it is scheduled: in nanoseconds, where /proc has ticks of 10 ms.
CPU_CLOCK: Final = 2
TRIES_MAX: Final = 100
LISTEN: Final = "0A"
PROC: Final = Path("/proc")
#: Below what Linux gives to outgoing connections (net.ipv4.ip_local_port_range).
PORTS: Final = range(20_000, 32_000)


class Stat(NamedTuple):
    """The fields of /proc/PID/stat that count here."""

    parent: int
    ended_children_ticks: int


def read_stat(pid: int) -> Stat | None:
    """None for a process that is no more."""
    try:
        # The name, which comes first, may itself hold spaces and brackets.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Stat(int(fields[1]), int(fields[13]) + int(fields[14]))


def own_cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process, the ended ones included; 0 for a process that is no more."""
    try:
        # What clock_getcpuclockid(3) gives; Python has it for threads only.
        return time.clock_gettime(~pid << 3 | CPU_CLOCK)
    except OSError:
        return 0.0


def pids() -> Iterator[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal())


def family(root: int) -> dict[int, Stat]:
    """`root` and all its living descendants. Raises `BenchError` when it is gone."""
    known = {pid: stat for pid in pids() if (stat := read_stat(pid)) is not None}
    if root not in known:
        raise BenchError(f"process {root} has ended: what it took is not known")
    members = {root}
    grown = 0
    while grown != len(members):
        grown = len(members)
        members |= {pid for pid, stat in known.items() if stat.parent in members}
    return {pid: known[pid] for pid in members}


def cpu_s(root: int) -> float:
    """CPU seconds, user's and system's, of `root` and all its descendants, the ended ones included."""
    found = family(root)
    for _ in range(TRIES_MAX):
        own_s = sum(map(own_cpu_s, found))
        again = family(root)
        # Whoever ended between two looks could be counted twice, or not at all.
        if found.keys() == again.keys() and found[root].ended_children_ticks == again[root].ended_children_ticks:
            return own_s + sum(stat.ended_children_ticks for stat in again.values()) * TICK_S
        found = again
    raise BenchError(f"the descendants of process {root} change too fast to be measured")


def memory_bytes(root: int, field: str) -> int:
    """`VmRSS` or `VmHWM` (the peak), added up over `root` and its living descendants."""
    total = 0
    for pid in family(root):
        try:
            lines = (PROC / str(pid) / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    return total


def forget_peak(root: int) -> None:
    """`VmHWM` of a process, whatever its start took, begins again from what it has now."""
    (PROC / str(root) / "clear_refs").write_text("5")


def listener(port: int) -> int:
    """The process that listens on TCP port `port` of this machine. Raises `BenchError` when there is none."""
    inodes = {f"socket:[{inode}]" for table in ("tcp", "tcp6") for inode in _listening(table, port)}
    for pid in sorted(pids()):
        if any(link in inodes for link in _links(pid)):
            return pid
    raise BenchError(f"nothing of this machine listens on port {port}: CPU of another machine cannot be measured")


def _listening(table: str, port: int) -> Iterator[str]:
    path = PROC / "net" / table
    for line in path.read_text().splitlines()[1:] if path.exists() else ():
        fields = line.split()
        if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
            yield fields[9]


def _links(pid: int) -> Iterator[str]:
    try:
        descriptors = list((PROC / str(pid) / "fd").iterdir())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return
    for descriptor in descriptors:
        try:
            yield str(descriptor.readlink())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


def free_port() -> int:
    """A TCP port of loopback that nobody has at this moment.

    None of those that the system gives to outgoing connections, which may take it before it is listened on.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            # Closed by a reset, it leaves no TIME_WAIT behind.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            probe.bind(("127.0.0.1", port))
            return port
    raise BenchError("no port is free")


def machine_cpu_s() -> float:
    """CPU seconds of the whole machine since it started, what the hypervisor gave to others included."""
    user, nice, system, _, _, irq, softirq, steal = map(int, (PROC / "stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) * TICK_S


class Meter:
    """CPU seconds by part, between its making and `read`; `others` is everything else on the machine."""

    def __init__(self, **roots: int) -> None:
        self._roots = roots
        self._began = self._now()

    def read(self) -> dict[str, float]:
        now = self._now()
        taken = {part: now[part] - began for part, began in self._began.items()}
        machine = taken.pop("others")
        return {**taken, "others": max(0.0, machine - sum(taken.values()))}

    def _now(self) -> dict[str, float]:
        roots = {part: cpu_s(root) for part, root in self._roots.items()}
        return {**roots, "load": time.process_time(), "others": machine_cpu_s()}
