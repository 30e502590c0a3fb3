"""Forms that are JSON: objects by row, arrays by column, an object a line.

By columns, times are integers, microseconds since 1970: exact (in JavaScript until 2255), no text to parse, and
`ts / 1000` is what `Date` takes. By rows they are RFC 3339.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import orjson

from api.readings.forms.table import Block, Kind, Table, flag_names, moment

_SERIES: Final = b'{"series":['
_ROWS: Final = b'{"data":['


async def write_rows(table: Table) -> AsyncIterator[bytes]:
    """`{"data": [{…}, …], …head}`."""
    yield _ROWS
    before = b""
    async for block in table.blocks:
        if rows := _rows(table, block):
            yield before + _dumped(rows)[1:-1]
            before = b","
    yield _end(table.head)


async def write_lines(table: Table) -> AsyncIterator[bytes]:
    """The same objects, one a line."""
    async for block in table.blocks:
        yield b"".join([_dumped(row, orjson.OPT_APPEND_NEWLINE) for row in _rows(table, block)])


async def write_columns(table: Table) -> AsyncIterator[bytes]:
    """`{"series": [{…series, column: […], …}, …], …head}`, an entry for each block."""
    yield _SERIES
    before = b""
    async for block in table.blocks:
        entry: dict[str, Any] = dict(zip(table.names, block.series, strict=True))
        for column, cells in zip(table.columns, block.columns, strict=True):
            entry[column.name] = _flags(cells) if column.kind is Kind.FLAGS else cells
        yield before + _dumped(entry)
        before = b","
    yield _end(table.head)


def _flags(cells: Sequence[int]) -> list[tuple[str, ...]] | None:
    """None if no reading has any, as is usual."""
    return [flag_names(cell) for cell in cells] if any(cells) else None


def _rows(table: Table, block: Block) -> list[dict[str, Any]]:
    names = [*table.names, *(column.name for column in table.columns)]
    cells = [_spelt(column.kind, cells) for column, cells in zip(table.columns, block.columns, strict=True)]
    return [dict(zip(names, (*block.series, *row), strict=True)) for row in zip(*cells, strict=True)]


def _spelt(kind: Kind, cells: Sequence[Any]) -> Sequence[Any]:
    if kind is Kind.TIME:
        return [None if cell is None else moment(cell) for cell in cells]
    return [flag_names(cell) for cell in cells] if kind is Kind.FLAGS else cells


def _end(head: Mapping[str, Any]) -> bytes:
    return b"]," + _dumped(dict(head))[1:] if head else b"]}"


def _dumped(content: Any, option: int = 0) -> bytes:
    return orjson.dumps(content, _fragment, option | orjson.OPT_UTC_Z | orjson.OPT_PASSTHROUGH_SUBCLASS)


def _fragment(digits: str) -> orjson.Fragment:
    return orjson.Fragment(str(digits))  # takes no class derived from it
