"""Arrow's IPC stream. What names the series is dictionary-encoded; a dictionary is replaced from batch to batch.

A value stands in `value` as a double (booleans as 1 and 0, with the flag `boolean`), or in `value_text`: texts, and
integers of any length with the flag `integer`. A union would keep them in one column, and few readers know it.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Final

import pyarrow as pa

from api.readings.forms.table import Block, Column, Kind, Table, flag_names, micros
from api.readings.series import Series

#: A batch has so many rows or more, unless it is the last: each costs a message, and has dictionaries of its own.
_BATCH_ROWS: Final = 8_192
_NAMES: Final = pa.dictionary(pa.int32(), pa.utf8())
_TYPES: Final = {
    Kind.TEXT: pa.utf8(),
    Kind.TIME: pa.timestamp("us", "UTC"),
    Kind.NUMBER: pa.float64(),
    Kind.INTEGER: pa.int64(),
    Kind.FLAGS: pa.list_(pa.utf8()),
    Kind.VALUE: pa.float64(),
}


async def write_arrow(table: Table) -> AsyncIterator[bytes]:
    """A schema, batches, the mark of the end."""
    schema, sink = _schema(table), _Sink()
    with pa.ipc.new_stream(sink, schema) as stream:
        held: list[Block] = []
        rows = 0
        async for block in table.blocks:
            held.append(block)
            rows += len(block.columns[0])
            if rows >= _BATCH_ROWS:
                stream.write_batch(_batch(schema, table.columns, held))
                yield sink.taken()
                held, rows = [], 0
        if rows:
            stream.write_batch(_batch(schema, table.columns, held))
    yield sink.taken()


class _Sink:
    """What Arrow writes to: the bytes since they were taken last."""

    closed = False

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, raw: Any) -> int:
        self._written += raw
        return len(raw)

    def flush(self) -> None:
        """All of it is here."""

    def taken(self) -> bytes:
        raw, self._written = bytes(self._written), bytearray()
        return raw


def _schema(table: Table) -> Any:
    fields = [pa.field(name, _NAMES, nullable=False) for name in table.names]
    for column in table.columns:
        fields.append(pa.field(column.name, _TYPES[column.kind]))
        if column.kind is Kind.VALUE:
            fields.append(pa.field(f"{column.name}_text", pa.utf8()))
    return pa.schema(fields)


def _batch(schema: Any, columns: Sequence[Column], blocks: Sequence[Block]) -> Any:
    arrays = [*_names(blocks)]
    for index, column in enumerate(columns):
        cells = [cell for block in blocks for cell in block.columns[index]]
        arrays += _arrays(column.kind, cells)
    return pa.record_batch(arrays, schema=schema)


def _names(blocks: Sequence[Block]) -> Iterator[Any]:
    """The columns that name the series, each with the texts that it has in these blocks."""
    for field in range(len(Series._fields)):
        places: dict[str, int] = {}
        indices: list[int] = []
        for block in blocks:
            indices += [places.setdefault(block.series[field], len(places))] * len(block.columns[0])
        yield pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(places, pa.utf8()))


def _arrays(kind: Kind, cells: list[Any]) -> Iterator[Any]:
    if kind is Kind.TIME:
        yield pa.array([None if cell is None else micros(cell) for cell in cells], _TYPES[kind])
    elif kind is Kind.FLAGS:
        yield pa.array([flag_names(cell) for cell in cells], _TYPES[kind])
    elif kind is not Kind.VALUE:
        yield pa.array(cells, _TYPES[kind])
    elif set(map(type, cells)) == {float}:
        yield pa.array(cells, _TYPES[kind])
        yield pa.nulls(len(cells), pa.utf8())
    else:
        yield pa.array(
            [None if cell is None or isinstance(cell, str) else float(cell) for cell in cells], _TYPES[kind]
        )
        yield pa.array([cell if isinstance(cell, str) else None for cell in cells], pa.utf8())
