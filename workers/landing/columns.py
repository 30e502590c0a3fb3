"""Columns into the rows of PostgreSQL's binary COPY, without touching a row in Python.

Records carry their columns in PostgreSQL's byte order already. A buffer is filled with a row template and each column
is laid over it in one strided assignment: an eighth of what `struct.pack` a row costs (`bench/test_landing.py`).
Left out: which rows these are.
"""

import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from operator import mul
from typing import Final

HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER: Final = b"\xff\xff"

#: Rows made and sent at once: their buffer stays in the processor's cache.
BLOCK_ROWS: Final = 5_000

_QUALITY_OFFSET: Final = 14
_TIMES_OFFSET: Final = 20
_VALUES_OFFSET: Final = 32

_LENGTH_AND_INT4: Final = struct.Struct(">ii")


@dataclass(frozen=True, slots=True)
class Layout:
    """A row of fixed width, a multiple of 8, that begins (int4, quality int2, ts, value float8)."""

    template: bytes
    int4_offsets: tuple[int, ...]
    """Where its int4 columns stand, each from its length word on: 8 bytes."""


#: (series_id, quality, ts, value)
READING: Final = Layout(struct.pack(">hiiihiqiq", 4, 4, 0, 2, 0, 8, 0, 8, 0), (2,))
#: (series_id, quality, ts, value, record int4, item int4)
SUSPECT: Final = Layout(struct.pack(">hiiihiqiqiiii", 6, 4, 0, 2, 0, 8, 0, 8, 0, 4, 0, 4, 0), (2, 40, 48))


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of n rows, whole; `int4` as `int4_run` and `int4_column` make them, `quality` None for n zeros."""

    int4: tuple[bytes, ...]
    times: bytes
    values: bytes
    quality: bytes | None

    @property
    def count(self) -> int:
        return len(self.times) // 8


def int4_run(value: int, count: int) -> bytes:
    """`count` times `value`, each with its length word."""
    return _LENGTH_AND_INT4.pack(4, value) * count


def int4_column(values: Iterable[int]) -> bytes:
    """`values`, each with its length word."""
    return b"".join(map(_LENGTH_AND_INT4.pack, repeat(4), values))


def quality_column(flags: int | bytes, count: int) -> bytes:
    return flags if isinstance(flags, bytes) else flags.to_bytes(2, "big", signed=True) * count


def rows(layout: Layout, columns: Columns, first: int, count: int) -> bytearray:
    """Rows `first` to `first + count` of `columns`, ready for COPY."""
    width = len(layout.template)
    buffer = bytearray(layout.template * count)
    view = memoryview(buffer)
    span = (count - 1) * width + 8
    wide = [(_TIMES_OFFSET, columns.times), (_VALUES_OFFSET, columns.values)]
    for offset, column in (*wide, *zip(layout.int4_offsets, columns.int4, strict=True)):
        source = memoryview(column)[first * 8 : (first + count) * 8].cast("q")
        view[offset : offset + span].cast("q")[:: width // 8] = source
    if columns.quality is not None:
        span = (count - 1) * width + 2
        flags = memoryview(columns.quality)[first * 2 : (first + count) * 2].cast("h")
        view[_QUALITY_OFFSET : _QUALITY_OFFSET + span].cast("h")[:: width // 2] = flags
    return buffer


def blocks(layout: Layout, columns: Columns) -> Iterator[bytes | bytearray]:
    """Everything that COPY is sent for `columns`, in pieces."""
    yield HEADER
    for first in range(0, columns.count, BLOCK_ROWS):
        yield rows(layout, columns, first, min(BLOCK_ROWS, columns.count - first))
    yield TRAILER


async def stream(layout: Layout, columns: Columns) -> AsyncIterator[bytes | bytearray]:
    """`blocks` as asyncpg takes them."""
    for block in blocks(layout, columns):
        yield block


@dataclass(slots=True)
class Runs:
    """Runs of readings of one series each, side by side: lists that garbage collection does not walk far."""

    series_ids: list[int] = field(default_factory=list)
    times: list[bytes] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    quality: list[int | bytes] = field(default_factory=list)

    def add(self, series_id: int, times: bytes, values: bytes, quality: int | bytes) -> None:
        self.series_ids.append(series_id)
        self.times.append(times)
        self.values.append(values)
        self.quality.append(quality)

    def sorted(self) -> Columns:
        """Rows of `READING` by series and, where the runs of a series ascend, by time: what the index takes best."""
        order = sorted(range(len(self.series_ids)), key=self.series_ids.__getitem__)
        times = [*map(self.times.__getitem__, order)]
        counts = [len(run) // 8 for run in times]
        words = map(_LENGTH_AND_INT4.pack, repeat(4), map(self.series_ids.__getitem__, order))
        quality = None
        if any(self.quality):
            quality = b"".join(map(quality_column, map(self.quality.__getitem__, order), counts))
        values = b"".join(map(self.values.__getitem__, order))
        return Columns((b"".join(map(mul, words, counts)),), b"".join(times), values, quality)


@dataclass(slots=True)
class StagedRuns(Runs):
    """The same, with the record of each run and the numbers of its readings there."""

    records: list[int] = field(default_factory=list)
    items: list[Sequence[int]] = field(default_factory=list)

    def in_order(self) -> Columns:
        """Rows of `SUSPECT`, in the order they were added."""
        counts = [len(run) // 8 for run in self.times]
        series = b"".join(map(int4_run, self.series_ids, counts))
        records = b"".join(map(int4_run, self.records, counts))
        quality = b"".join(map(quality_column, self.quality, counts)) if any(self.quality) else None
        int4 = series, records, int4_column(chain.from_iterable(self.items))
        return Columns(int4, b"".join(self.times), b"".join(self.values), quality)
