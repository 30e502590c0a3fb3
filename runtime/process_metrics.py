"""`process_*` of a parent and its children: CPU, memory, open files and start, read from /proc at each scrape.

Left out: a process alone, of which prometheus_client itself gives the same names without a label.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client import Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_CPU: Final = "process_cpu_seconds"
_START: Final = "process_start_time_seconds"
_LABELS: Final = ("process",)
_PARENT: Final = "parent"


@dataclass
class _Cpu:
    """CPU seconds of the processes of one slot, one after another, as far as they were seen."""

    process: tuple[int, float] | None = None
    ended_s: float = 0.0
    living_s: float = 0.0

    def see(self, process: tuple[int, float], seconds: float) -> None:
        """`process`, told from a later one with its pid by its start, has used `seconds`."""
        if process != self.process:
            self.process, self.ended_s = process, self.ended_s + self.living_s
        self.living_s = seconds


class ProcessMetrics:
    """Series with a label `process`: the number of a child's slot, whichever process has it, or `parent`.

    CPU time goes on from where the slot's last process was seen, so it never goes back; what that one used between
    the last scrape and its end is missing. `process_start_time_seconds` tells when a slot got a new process.
    """

    def __init__(self, pids: Callable[[], Iterable[int | None]]) -> None:
        """`pids` gives the process of each slot, None where there is none."""
        self._pids = pids
        self._pid = os.getpid()
        self._reader = ProcessCollector(pid=lambda: self._pid, registry=None)
        self._cpu: dict[str, _Cpu] = {}
        self._lock = threading.Lock()

    def collect(self) -> list[Metric]:
        """For the registry."""
        with self._lock:
            gauges: dict[str, GaugeMetricFamily] = {}
            for process, pid in self._processes():
                for found in self._read(process, pid):
                    empty = GaugeMetricFamily(found.name, found.documentation, labels=_LABELS)
                    gauges.setdefault(found.name, empty).add_metric((process,), found.samples[0].value)
            return [*gauges.values(), self._cpu_seconds()]

    def _processes(self) -> Iterator[tuple[str, int]]:
        yield _PARENT, os.getpid()
        for slot, pid in enumerate(self._pids()):
            if pid is not None:
                yield str(slot), pid

    def _read(self, process: str, pid: int) -> list[Metric]:
        """What /proc knows of it now, but for its CPU time, which is added up; nothing if it has just ended."""
        self._pid = pid
        found = {family.name: family for family in self._reader.collect()}
        if (cpu := found.pop(_CPU, None)) is not None:
            start = found[_START].samples[0].value
            self._cpu.setdefault(process, _Cpu()).see((pid, start), cpu.samples[0].value)
        return list(found.values())

    def _cpu_seconds(self) -> CounterMetricFamily:
        family = CounterMetricFamily(
            _CPU, "CPU seconds, user and system, of a slot's processes one after another.", labels=_LABELS
        )
        for process, cpu in self._cpu.items():
            family.add_metric((process,), cpu.ended_s + cpu.living_s)
        return family
