"""Metrics of many processes in one answer: ended ones count on without their files, killed parents leave nothing."""

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.mmap_dict import MmapedDict, mmap_key

from runtime.merged_metrics import MergedMetrics, environment, remove_abandoned

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where directories are made, with nobody else's in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def metrics(temporary: Path) -> Iterator[MergedMetrics]:
    made = MergedMetrics(CollectorRegistry())
    yield made
    made.close()


def count(share: Path, name: str, value: float, *, kind: str = "counter", timestamp: float = 0.0) -> None:
    """What a process of prometheus_client writes for a metric without labels."""
    sample = f"{name}_total" if kind == "counter" else name
    write(share, kind, mmap_key(name, sample, [], [], "Help."), value, timestamp)


def observe(share: Path, name: str) -> None:
    """What it writes for a histogram after three observations: buckets are not added up yet."""
    for bound, observed in (("0.1", 2.0), ("+Inf", 1.0)):
        write(share, "histogram", mmap_key(name, f"{name}_bucket", ["le"], [bound], "Help."), observed)
    write(share, "histogram", mmap_key(name, f"{name}_sum", [], [], "Help."), 0.5)


def write(share: Path, kind: str, key: str, value: float, timestamp: float = 0.0) -> None:
    values = MmapedDict(str(share / f"{kind}_7.db"))  # type: ignore[no-untyped-call]
    values.write_value(key, value, timestamp)  # type: ignore[no-untyped-call]
    values.close()  # type: ignore[no-untyped-call]


def shown(metrics: MergedMetrics) -> dict[str, float]:
    """Values by series, as they are written."""
    lines = metrics.render().decode().splitlines()
    return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def files(metrics: MergedMetrics) -> list[str]:
    return sorted(path.name for path in metrics.directory.rglob("*.db"))


# ---------------------------------------------------------------- processes that end


def test_ended_processes_count_on_in_one_set_of_files(metrics: MergedMetrics) -> None:
    living = metrics.share()
    for share in (living, *(metrics.share() for _ in range(20))):
        count(share, "rows", 3)
        count(share, "open", 1, kind="gauge_livesum")
        observe(share, "seconds")
        if share is not living:
            metrics.forget(share)
    assert shown(metrics) == {
        "rows_total": 63,
        "open": 1,
        'seconds_bucket{le="0.1"}': 42,
        'seconds_bucket{le="+Inf"}': 63,
        "seconds_count": 63,
        "seconds_sum": 10.5,
    }
    of_one = ["counter_7.db", "gauge_livesum_7.db", "histogram_7.db"]
    assert files(metrics) == sorted([*of_one, "counter_ended.db", "histogram_ended.db"])
    assert len(list(metrics.directory.iterdir())) == 2


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("sum", {"state": 9}),
        ("min", {"state": 2}),
        ("max", {"state": 4}),
        ("mostrecent", {"state": 3}),
        ("all", {}),
        ("liveall", {}),
        ("livesum", {}),
        ("livemin", {}),
        ("livemax", {}),
        ("livemostrecent", {}),
    ],
)
def test_a_gauge_of_ended_processes_stays_if_its_mode_says_so(
    metrics: MergedMetrics, mode: str, expected: dict[str, float]
) -> None:
    for value, timestamp in ((4.0, 10.0), (3.0, 30.0), (2.0, 20.0)):
        share = metrics.share()
        count(share, "state", value, kind=f"gauge_{mode}", timestamp=timestamp)
        metrics.forget(share)
    assert shown(metrics) == expected


def test_no_scrape_misses_or_doubles_what_is_being_folded(metrics: MergedMetrics) -> None:
    shares = [metrics.share() for _ in range(60)]
    for share in shares:
        count(share, "rows", 1)
    seen: set[float] = set()
    done = threading.Event()

    def scrape() -> None:
        while not done.is_set():
            seen.add(shown(metrics)["rows_total"])

    with ThreadPoolExecutor(2) as pool:
        scrapes = [pool.submit(scrape) for _ in range(2)]
        for share in shares:
            metrics.forget(share)
        done.set()
        for scraped in scrapes:
            scraped.result()
    assert seen == {60}


def test_a_sum_of_fractions_does_not_go_back_by_a_last_digit(metrics: MergedMetrics) -> None:
    chance = random.Random(1)
    before = 0.0
    for _ in range(200):
        share = metrics.share()
        count(share, "seconds", chance.random())
        now = shown(metrics)["seconds_total"]
        assert now >= before
        before = now
        if chance.random() < 0.5:
            metrics.forget(share)
            assert shown(metrics)["seconds_total"] >= before


def test_a_full_disk_loses_no_count(metrics: MergedMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    first, second, third = (metrics.share() for _ in range(3))
    for share in (first, second, third):
        count(share, "rows", 1)
        count(share, "open", 1, kind="gauge_livesum")
    metrics.forget(first)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        metrics.forget(second)
        assert shown(metrics) == {"rows_total": 3, "open": 1}
    metrics.forget(third)
    assert shown(metrics) == {"rows_total": 3}
    assert files(metrics) == ["counter_ended.db"]


def test_a_process_killed_while_it_made_its_file_spoils_no_scrape(metrics: MergedMetrics) -> None:
    share = metrics.share()
    (share / "counter_7.db").touch()
    assert shown(metrics) == {}
    metrics.forget(share)
    assert (shown(metrics), files(metrics)) == ({}, [])


def test_more_series_than_a_new_file_has_room_for(metrics: MergedMetrics) -> None:
    for start in (0, 400):
        share = metrics.share()
        for number in range(start, start + 600):
            count(share, f"rows_{number:0200}", 1)
        metrics.forget(share)
    assert sorted(shown(metrics).values()) == [1] * 800 + [2] * 200


# ---------------------------------------------------------------- directories of parents that were killed

PARENT = """
import time
from prometheus_client import CollectorRegistry
from runtime.merged_metrics import MergedMetrics

metrics = MergedMetrics(CollectorRegistry())
metrics.share()
print(metrics.directory, flush=True)
time.sleep(60)
"""


def test_the_directory_of_a_parent_that_was_killed_goes_and_that_of_a_living_one_stays(temporary: Path) -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(
        command, cwd=CHECKOUT, env=os.environ | {"TMPDIR": str(temporary)}, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        directory = Path(parent.stdout.readline().strip())
        assert directory.parent == temporary
        beside = MergedMetrics(CollectorRegistry())
        assert directory.is_dir()
        parent.send_signal(signal.SIGKILL)
    after = MergedMetrics(CollectorRegistry())
    assert set(temporary.iterdir()) == {beside.directory, after.directory}
    beside.close()
    after.close()
    assert not list(temporary.iterdir())


def test_another_users_directory_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / "sluice-metrics-theirs").mkdir()
    us = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: us + 1)
    remove_abandoned()
    assert (temporary / "sluice-metrics-theirs").is_dir()


def test_a_link_leads_nowhere(temporary: Path, metrics: MergedMetrics) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (temporary / "sluice-metrics-link").symlink_to(elsewhere)
    (temporary / "sluice-metrics-file").touch()
    MergedMetrics(CollectorRegistry()).close()
    assert elsewhere.is_dir()


def test_parents_that_start_together_leave_each_other_alone(temporary: Path) -> None:
    for number in range(100):
        (temporary / f"sluice-metrics-{number}" / "0").mkdir(parents=True)

    def start(_: int) -> MergedMetrics:
        made = MergedMetrics(CollectorRegistry())
        count(made.share(), "rows", 1)
        return made

    with ThreadPoolExecutor(8) as pool:
        parents = list(pool.map(start, range(200)))
    assert {parent.directory for parent in parents} == set(temporary.iterdir())
    assert all(shown(parent) == {"rows_total": 1} for parent in parents)
    for parent in parents:
        parent.close()


def test_a_process_is_told_its_own_share(metrics: MergedMetrics) -> None:
    one, other = metrics.share(), metrics.share()
    assert one != other
    assert environment(one)["PROMETHEUS_MULTIPROC_DIR"] == str(one)
