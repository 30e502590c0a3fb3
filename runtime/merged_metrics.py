"""The metrics of a parent's processes, added up: each keeps its values in mapped files, in a directory of its own
below one that the parent owns (prometheus_client's multiprocess mode).

What ended processes left is folded into one set of files: neither the directory nor a scrape grows with the number
of processes that ever ran. Left out: how metrics are served, and what the system knows of a process
(`runtime.process_metrics`).
"""

import contextlib
import fcntl
import itertools
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Final

import prometheus_client
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.samples import Sample

_log = logging.getLogger("sluice.metrics")

#: Where a process leaves its values; has to be set before prometheus_client is first imported there.
DIRECTORY_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
_PREFIX: Final = "sluice-metrics-"
#: What an entry of a mapped file takes beside its key, at most: a length, padding, a value and a time.
_ENTRY_BYTES: Final = 4 + 8 + 8 + 8
_HEAD_BYTES: Final = 8

#: A value, and when it was set if its gauge wants to know.
_Value = tuple[float, float]


def _sum(one: _Value, other: _Value) -> _Value:
    return one[0] + other[0], 0.0


def _later(one: _Value, other: _Value) -> _Value:
    return max(one, other, key=itemgetter(1))


#: How values of ended processes are joined, by the kind of their file. What is not here ends with its process: gauges
#: of the living (`live…`), and those of mode `all`, of which every process that ever ran would keep a series.
_JOINS: Final[Mapping[str, Callable[[_Value, _Value], _Value]]] = {
    "counter": _sum,
    "histogram": _sum,
    "summary": _sum,
    "gauge_sum": _sum,
    "gauge_min": min,
    "gauge_max": max,
    "gauge_mostrecent": _later,
}


class MergedMetrics:
    """The metrics of all processes of a parent, and those in `own`. Any thread may ask for them."""

    def __init__(self, own: CollectorRegistry) -> None:
        remove_abandoned()
        self.directory, self._owned = _make_owned()
        self._own = own
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._shares: set[Path] = set()
        #: Ended processes that could not be folded yet, and those that were.
        self._left: list[Path] = []
        self._folded = self._make()
        self._shown: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        own.register(self)

    def share(self) -> Path:
        """A directory for the values of a process that is about to start; `forget` it when that has ended."""
        with self._lock:
            share = self._make()
            self._shares.add(share)
            return share

    def forget(self, share: Path) -> None:
        """The process of `share` has ended: its counts stay for ever, its gauges as long as their mode says."""
        with self._lock:
            self._shares.discard(share)
            self._left.append(share)
            try:
                self._fold()
            except OSError:
                _log.exception("what an ended process counted stays in its files until the next one ends")

    def render(self) -> bytes:
        return prometheus_client.generate_latest(self._own)

    def collect(self) -> list[Metric]:
        """For the registry: the metrics of processes that live, and what others left."""
        with self._lock:
            living = (str(path) for share in self._shares for path in _files(share))
            ended = (str(path) for path in _lasting([self._folded, *self._left]))
            merged = MultiProcessCollector.merge([*living, *ended])  # type: ignore[no-untyped-call]
            return [self._never_less(metric) for metric in merged]

    def close(self) -> None:
        with self._lock:
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._owned)

    def _make(self) -> Path:
        # Not named by pid: a new process may get the pid of one that is not folded yet.
        made = self.directory / str(next(self._numbers))
        made.mkdir()
        return made

    def _fold(self) -> None:
        """Put what ended processes left into one new set of files; until that is complete, the old ones count."""
        old = [self._folded, *self._left]
        new = self._make()
        try:
            for kind, values in _joined(_lasting(old)).items():
                _write(new / f"{kind}_ended.db", values)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            raise
        self._folded, self._left = new, []
        for directory in old:
            shutil.rmtree(directory, ignore_errors=True)

    def _never_less(self, metric: Metric) -> Metric:
        """Added in another order, fractions differ in a last digit: to Prometheus, less is a counter begun anew."""
        if metric.type != "gauge":
            metric.samples = [self._at_least_as_shown(sample) for sample in metric.samples]
        return metric

    def _at_least_as_shown(self, sample: Sample) -> Sample:
        series = sample.name, tuple(sample.labels.items())
        value = self._shown[series] = max(sample.value, self._shown.get(series, 0.0))
        return sample._replace(value=value)


def environment(share: Path) -> dict[str, str]:
    """The environment of a process whose metrics are merged."""
    return os.environ | {DIRECTORY_VARIABLE: str(share)}


# ---------------------------------------------------------------- files of values


def _files(directory: Path) -> list[Path]:
    # An empty one was only just made, or is all that its process came to.
    return [path for path in directory.glob("*.db") if path.stat().st_size]


def _lasting(directories: Iterable[Path]) -> Iterator[Path]:
    """The files of ended processes that still count."""
    return (path for directory in directories for path in _files(directory) if _kind(path) in _JOINS)


def _kind(path: Path) -> str:
    return path.stem.rpartition("_")[0]


def _joined(files: Iterable[Path]) -> dict[str, dict[str, _Value]]:
    """Values by the kind of their file and their key in it."""
    joined: dict[str, dict[str, _Value]] = {}
    for path in files:
        join, values = _JOINS[_kind(path)], joined.setdefault(_kind(path), {})
        for key, *value, _ in MmapedDict.read_all_values_from_file(str(path)):  # type: ignore[no-untyped-call]
            found: _Value = (value[0], value[1])
            values[key] = join(values[key], found) if key in values else found
    return joined


def _write(path: Path, values: Mapping[str, _Value]) -> None:
    with path.open("wb") as file:
        # A mapped page that a full disk has no room for kills the process; room asked for first is only an `OSError`.
        size = _HEAD_BYTES + sum(len(key.encode()) + _ENTRY_BYTES for key in values)
        os.posix_fallocate(file.fileno(), 0, size)
    mapped = MmapedDict(str(path))  # type: ignore[no-untyped-call]
    try:
        for key, (value, timestamp) in values.items():
            mapped.write_value(key, value, timestamp)  # type: ignore[no-untyped-call]
    finally:
        mapped.close()  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- whose directory it is


def _make_owned() -> tuple[Path, int]:
    """A new directory, and the descriptor that makes it ours until it is closed."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # taken for an abandoned one by another parent
            return made, _own(made)


def remove_abandoned() -> None:
    """Remove directories that parents left behind which were killed."""
    removed = sum(_remove_if_abandoned(path) for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"))
    if removed:
        _log.info("metrics of parents that were killed are removed", extra={"directories": removed})


def _remove_if_abandoned(path: Path) -> bool:
    try:
        descriptor = _own(path)
    except OSError:  # its parent lives, or another one removes it
        return False
    try:
        shutil.rmtree(path)
    except OSError:  # children that outlive their parent by a moment write to it: the next start removes it
        return False
    finally:
        os.close(descriptor)
    return True


def _own(path: Path) -> int:
    """Lock the directory; raises `OSError` if it is another's or gone.

    The kernel gives the lock back when its holder ends in whatever way, and children do not inherit it. Held on the
    directory itself, it also keeps systemd-tmpfiles from removing old files in it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        opened = os.fstat(descriptor)
        if opened.st_uid != os.geteuid():
            raise PermissionError(f"{path} is another user's")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another parent may have removed it between the opening and the lock.
        if not os.path.samestat(opened, path.lstat()):
            raise FileNotFoundError(f"{path} is another one by now")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
