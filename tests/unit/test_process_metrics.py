"""What /proc knows of a parent's children, by slot: counters that survive a replacement, labels that do not grow."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from runtime.process_metrics import ProcessMetrics

BUSY = """
import sys, time
while time.process_time() < 0.2:
    pass
print(flush=True)
sys.stdin.read()
"""
NAMES = [
    "cpu_seconds_total",
    "max_fds",
    "open_fds",
    "resident_memory_bytes",
    "start_time_seconds",
    "virtual_memory_bytes",
]


@contextmanager
def busy() -> Iterator[int]:
    """A process that has used a fifth of a second of CPU time and waits."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid


class Slots:
    """Two slots of which the first has a process of the test."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self._registry = CollectorRegistry()
        self._registry.register(ProcessMetrics(lambda: [self.pid, None]))

    def get(self, name: str, process: str = "0") -> float | None:
        return self._registry.get_sample_value(f"process_{name}", {"process": process})

    def series(self) -> set[tuple[str, str]]:
        return {
            (sample.name, sample.labels["process"])
            for metric in self._registry.collect()
            for sample in metric.samples
        }


def test_every_process_has_what_prometheus_client_gives_of_one() -> None:
    slots = Slots()
    assert slots.series() == {(f"process_{name}", "parent") for name in NAMES}
    with busy() as slots.pid:
        assert slots.series() == {(f"process_{name}", process) for name in NAMES for process in ("parent", "0")}
        memory, files = slots.get("resident_memory_bytes"), slots.get("open_fds")
        assert memory is not None
        assert 1_000_000 < memory < 100_000_000
        assert files == len(os.listdir(f"/proc/{slots.pid}/fd"))


def test_cpu_time_of_a_slot_goes_on_with_its_next_process() -> None:
    slots = Slots()
    with busy() as slots.pid:
        first, started = slots.get("cpu_seconds_total"), slots.get("start_time_seconds")
        assert first is not None
        assert started is not None
        assert first >= 0.19
    slots.pid = None
    assert slots.get("cpu_seconds_total") == first
    assert slots.get("start_time_seconds") is None
    with busy() as slots.pid:
        second, restarted = slots.get("cpu_seconds_total"), slots.get("start_time_seconds")
        assert second is not None
        assert restarted is not None
        assert second >= first + 0.19
        assert restarted > started


def test_a_process_that_has_just_ended_is_no_error() -> None:
    slots = Slots()
    with busy() as slots.pid:
        pass
    assert slots.series() == {(f"process_{name}", "parent") for name in NAMES}
