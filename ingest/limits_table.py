"""Counters that the processes of one machine share: mapped files, which outlive them all.

Nothing waits for anybody: each process writes counts into a file of its own (its column), and what was used is the
sum over the columns. So one that is stopped or killed at any instruction holds nobody up, and what it counted stays.
A count carries the window it belongs to, and needs no clearing. Left out: what is counted, and how much is allowed.
"""

import fcntl
import logging
import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from zlib import crc32

from runtime.clock import Clock

_log = logging.getLogger("sluice.limits")

#: Of a subject: an id, or an address.
KEY_BYTES: Final = 16
#: Requests, readings, bytes.
COUNTERS: Final = 3
COUNT_MAX: Final = (1 << 40) - 1
MINUTE_US: Final = 60_000_000
_MINUTES_A_DAY: Final = 24 * 60
_TAG_SHIFT: Final = 40
_TAG_MASK: Final = (1 << 24) - 1
#: The places that a key can have. A set that is full loses the subject that was not seen for longest.
_WAYS: Final = 16
_WAYS_BYTES: Final = _WAYS * KEY_BYTES
_HEADER: Final = struct.Struct("<8sQQ")
_HEADER_BYTES: Final = 64
_MAGIC: Final = b"sluice\0\1"
_COLUMNS: Final = 2
_COLUMNS_MAX: Final = 1024
_LOCK_TIMEOUT_S: Final = 2.0
_LOCK_POLL_S: Final = 0.01


class Table:
    """This process's view of the counters of up to `rows` subjects, with a column of its own."""

    def __init__(self, rows: int, clock: Clock, directory: Path | None = None) -> None:
        """`directory` is shared; without one, what is counted is this process's alone. Raises `OSError`."""
        self._sets = max(1, -(-rows // _WAYS))
        self.rows = self._sets * _WAYS
        self._clock = clock
        self._directory = directory
        self._open: list[memoryview | mmap.mmap | int] = []
        self._others: list[memoryview] = []
        self._number = 0
        self.columns = 0
        """How many processes may be counting."""
        if directory is None:
            self._take_index(mmap.mmap(-1, self._index_bytes))
            self._own = self._words(mmap.mmap(-1, self._column_bytes))
            self.columns = self._head[_COLUMNS] = 1
        else:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(directory / "lock"):
                self._open_index(directory)
                self._claim_column(directory)
            self._join()

    def close(self) -> None:
        """The column is free for another process. Nothing may be counted any more."""
        self._others.clear()
        while self._open:
            thing = self._open.pop()
            if isinstance(thing, int):
                os.close(thing)
            elif isinstance(thing, memoryview):
                thing.release()
            else:
                thing.close()

    # ------------------------------------------------------------ use

    def find(self, key: bytes, now_us: int) -> tuple[int, bool]:
        """The row of a subject, and whether it had none and was given it now.

        Asked again in every minute that the subject is seen in.
        """
        minute = now_us // MINUTE_US
        first = crc32(key) % self._sets * _WAYS
        offset = _HEADER_BYTES + first * KEY_BYTES
        keys = self._index[offset : offset + _WAYS_BYTES]
        place = keys.find(key)
        while place % KEY_BYTES and place >= 0:
            place = keys.find(key, place + 1)
        is_new = place < 0
        row = self._replace(first, key) if is_new else first + place // KEY_BYTES
        self._seen[row] = minute
        self._own[-1] = minute // _MINUTES_A_DAY
        return row, is_new

    def holds(self, row: int, key: bytes) -> bool:
        """Whether the row is still the subject's: another process may have given it away."""
        offset = _HEADER_BYTES + row * KEY_BYTES
        return self._index[offset : offset + KEY_BYTES] == key

    def own(self, slot: int, window: int) -> int:
        """What this process has counted in that window."""
        word = self._own[slot]
        return word & COUNT_MAX if word >> _TAG_SHIFT == window & _TAG_MASK else 0

    def put(self, slot: int, window: int, count: int) -> int:
        """Set what this process has counted in that window. What all have, told after that has become visible."""
        tag = window & _TAG_MASK
        self._own[slot] = tag << _TAG_SHIFT | min(count, COUNT_MAX)
        if self._head[_COLUMNS] > self.columns:
            self._join()
        for column in self._others:
            word = column[slot]
            if word >> _TAG_SHIFT == tag:
                count += word & COUNT_MAX
        return count

    def _replace(self, first: int, key: bytes) -> int:
        """Give the subject the row of the set that was unused for longest.

        Two processes may choose the same row for different subjects: the one that wrote first finds out by `holds`.
        """
        row = min(range(first, first + _WAYS), key=self._seen.__getitem__)
        if self._seen[row]:
            for column in (self._own, *self._others):
                column[row * COUNTERS : (row + 1) * COUNTERS] = _ZEROS
        offset = _HEADER_BYTES + row * KEY_BYTES
        self._index[offset : offset + KEY_BYTES] = key
        return row

    # ------------------------------------------------------------ files

    @property
    def _index_bytes(self) -> int:
        return _HEADER_BYTES + self.rows * (KEY_BYTES + 4)

    @property
    def _column_bytes(self) -> int:
        """The counts, and the day they were last added to."""
        return (self.rows * COUNTERS + 1) * 8

    def _take_index(self, index: mmap.mmap) -> None:
        view = memoryview(index)
        self._index = index
        self._head = view[: _HEADER.size].cast("Q")
        self._seen = view[_HEADER_BYTES + self.rows * KEY_BYTES :].cast("I")
        self._open += [index, view, self._head, self._seen]

    def _words(self, column: mmap.mmap) -> memoryview:
        view = memoryview(column)
        words = view.cast("Q")
        self._open += [column, view, words]
        return words

    def _open_index(self, directory: Path) -> None:
        name = directory / "index"
        if name.exists() and not _fits(name, self._index_bytes, self.rows):
            # Of another size: whoever has it mapped goes on with it until replaced.
            for stale in (name, *directory.glob("column-*")):
                stale.unlink()
        descriptor = _open_file(name, self._index_bytes)
        try:
            self._take_index(mmap.mmap(descriptor, self._index_bytes))
        finally:
            os.close(descriptor)
        if not self._head[0]:
            _HEADER.pack_into(self._index, 0, _MAGIC, self.rows, 0)

    def _claim_column(self, directory: Path) -> None:
        """The first column that no living process has; those at the end with nothing of today are forgotten."""
        today = self._clock.now_us() // MINUTE_US // _MINUTES_A_DAY
        columns = self._head[_COLUMNS]
        while columns and self._is_stale(directory / f"column-{columns - 1}", today):
            columns -= 1
        for number in range(_COLUMNS_MAX):
            descriptor = _open_file(directory / f"column-{number}", self._column_bytes)
            if _lock_now(descriptor):
                break
            os.close(descriptor)
        else:
            raise BlockingIOError(f"all of {_COLUMNS_MAX} columns are in use")
        self._open.append(descriptor)
        self._number = number
        self._own = self._words(mmap.mmap(descriptor, self._column_bytes))
        self._own[-1] = today
        self._head[_COLUMNS] = max(columns, number + 1)

    def _is_stale(self, name: Path, today: int) -> bool:
        descriptor = _open_file(name, self._column_bytes)
        try:
            (day,) = struct.unpack("=Q", os.pread(descriptor, 8, self._column_bytes - 8))
            return bool(day < today) and _lock_now(descriptor)
        finally:
            os.close(descriptor)

    def processes(self) -> int:
        """How many are counting right now; a column stays when its process has ended."""
        if self._directory is None:
            return 1
        return sum(number == self._number or self._is_used(number) for number in range(self._head[_COLUMNS]))

    def _is_used(self, number: int) -> bool:
        try:
            descriptor = os.open(f"{self._directory}/column-{number}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return not _lock_now(descriptor)
        finally:
            os.close(descriptor)

    def _join(self) -> None:
        """Map the columns of processes that have come since."""
        columns = self._head[_COLUMNS]
        for number in range(self.columns, columns):
            if self._directory is None or number == self._number:
                continue
            try:
                descriptor = _open_file(self._directory / f"column-{number}", self._column_bytes)
                try:
                    self._others.append(self._words(mmap.mmap(descriptor, self._column_bytes)))
                finally:
                    os.close(descriptor)
            except OSError as error:
                _log.warning("what another process counts is not seen", extra={"cause": str(error)})
        self.columns = columns


_ZEROS: Final = memoryview(bytes(COUNTERS * 8)).cast("Q")


def open_table(rows: int, clock: Clock, directory: Path) -> Table:
    """The shared table; one of this process alone where the directory cannot be used, which is logged."""
    try:
        return Table(rows, clock, directory)
    except OSError as error:
        _log.warning(
            "limits hold for this process alone and until it ends: their counters cannot be kept",
            extra={"directory": str(directory), "setting": "SLUICE_DATA_DIR", "cause": str(error)},
        )
        return Table(rows, clock)


def _fits(name: Path, size: int, rows: int) -> bool:
    with name.open("rb") as file:
        head = file.read(_HEADER.size)
        return os.fstat(file.fileno()).st_size == size and _HEADER.unpack(head)[:2] == (_MAGIC, rows)


def _open_file(name: Path, size: int) -> int:
    """Its descriptor. All of its space is taken: a full disk is felt here, not as a SIGBUS when it is written to."""
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size < size:
            os.posix_fallocate(descriptor, 0, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock_now(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _locked(name: Path) -> Iterator[None]:
    """Alone among those that open the table. Raises `OSError` when another one does not get on with it."""
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while not _lock_now(descriptor):
            if time.monotonic() > deadline:
                raise BlockingIOError(f"{name} is held by another process")
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
