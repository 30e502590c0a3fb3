"""Columns into the rows of PostgreSQL's binary COPY, without touching a row in Python.

Records carry their columns in PostgreSQL's byte order already. A buffer is filled with a row template and each column
is laid over it in one strided assignment: a twentieth of what `struct.pack` a row costs (`bench/test_landing.py`).
Left out: which rows these are.
"""

import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import itemgetter
from typing import Any, Final

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


def of_fresh(chunks: list[tuple[int, bytes, bytes, int | bytes]]) -> Columns:
    """Rows of `READING` from runs of (series_id, times, values, quality), sorted by series and, where each series'
    runs ascend, by time: the order in which the index takes them best."""
    chunks.sort(key=itemgetter(0))
    series = b"".join([int4_run(chunk[0], len(chunk[1]) // 8) for chunk in chunks])
    return Columns((series,), _joined(chunks, 1), _joined(chunks, 2), _quality(chunks))


def of_suspects(chunks: list[tuple[int, bytes, bytes, int | bytes, int, Sequence[int]]]) -> Columns:
    """Rows of `SUSPECT` from runs of (series_id, times, values, quality, record, items), in the order given."""
    series = b"".join([int4_run(chunk[0], len(chunk[1]) // 8) for chunk in chunks])
    records = b"".join([int4_run(chunk[4], len(chunk[1]) // 8) for chunk in chunks])
    items = b"".join([int4_column(chunk[5]) for chunk in chunks])
    return Columns((series, records, items), _joined(chunks, 1), _joined(chunks, 2), _quality(chunks))


def _joined(chunks: Sequence[tuple[Any, ...]], column: int) -> bytes:
    return b"".join(map(itemgetter(column), chunks))


def _quality(chunks: Sequence[tuple[Any, ...]]) -> bytes | None:
    if not any(map(itemgetter(3), chunks)):
        return None
    return b"".join([quality_column(chunk[3], len(chunk[1]) // 8) for chunk in chunks])
