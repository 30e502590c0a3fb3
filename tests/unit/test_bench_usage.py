"""What processes take: nothing of what a descendant took is lost, and a port tells whose it is."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.errors import BenchError
from bench.usage import TICK_S, Meter, cpu_s, free_port, listener, memory_bytes

BUSY_S = 0.3
BUSY = f"import time\nwhile time.process_time() < {BUSY_S}: pass\n"
#: A process that has waited for a busy child, says so, and lives on.
PARENT = (
    f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY!r}])\nprint('done', flush=True)\ninput()\n"
)


@contextmanager
def parent_of_an_ended_child() -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        yield process.pid
        process.communicate("\n")


def test_what_an_ended_child_took_counts() -> None:
    with parent_of_an_ended_child() as pid:
        assert cpu_s(pid) >= BUSY_S * 0.9


def test_cpu_is_told_finer_than_in_clock_ticks() -> None:
    code = "import time; print(time.process_time(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told_s = float(process.stdout.readline())

        assert told_s <= cpu_s(process.pid) < told_s + TICK_S / 2
        process.communicate(b"\n")


def test_what_a_living_child_takes_counts() -> None:
    meter = Meter(us=os.getpid())

    with parent_of_an_ended_child():
        assert meter.read()["us"] >= BUSY_S * 0.9


def test_a_process_that_is_gone_is_not_measured() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()

    with pytest.raises(BenchError, match="has ended"):
        cpu_s(process.pid)


def test_memory_peaks_at_least_where_it_stands() -> None:
    resident, peak = (memory_bytes(os.getpid(), field) for field in ("VmRSS", "VmHWM"))

    assert 0 < resident <= peak


def test_a_port_tells_who_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert listener(server.getsockname()[1]) == os.getpid()


def test_nobody_listens_on_a_free_port() -> None:
    with pytest.raises(BenchError, match="nothing of this machine"):
        listener(free_port())
