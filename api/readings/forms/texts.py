"""Forms that are JSON: objects by row, arrays by column, an object a line.

By columns, times are integers, microseconds since 1970: exact (in JavaScript until 2255), no text to parse, and
`ts / 1000` is what `Date` takes. By rows they are RFC 3339.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import orjson

from api.readings.forms.table import Block, Kind, Table, flag_names, micros, moment

_SERIES: Final = b'{"series":['
_ROWS_AT_ONCE: Final = 500
_ROWS: Final = b'{"data":['


async def write_rows(table: Table) -> AsyncIterator[bytes]:
    """`{"data": [{…}, …], …head}`."""
    yield _ROWS
    before = b""
    async for rows in _objects(table):
        yield before + _dumped(rows)[1:-1]
        before = b","
    yield _end(table.head)


async def write_lines(table: Table) -> AsyncIterator[bytes]:
    """The same objects, one a line."""
    async for rows in _objects(table):
        yield b"".join([_dumped(row, orjson.OPT_APPEND_NEWLINE) for row in rows])


async def _objects(table: Table) -> AsyncIterator[list[dict[str, Any]]]:
    """Rows as objects, those of blocks some hundreds at once."""
    if table.objects is not None:
        yield table.objects(table.names)
        return
    names = [*table.names, *(column.name for column in table.columns)]
    blocks, rows = list[Block](), 0
    async for block in table.blocks:
        blocks.append(block)
        rows += len(block.columns[0])
        if rows >= _ROWS_AT_ONCE:
            yield _spelt(table, names, blocks)
            blocks, rows = [], 0
    if rows:
        yield _spelt(table, names, blocks)


def _spelt(table: Table, names: Sequence[str], blocks: Sequence[Block]) -> list[dict[str, Any]]:
    series = [block.series for block in blocks for _ in block.columns[0]]
    columns = (list(chain.from_iterable(cells)) for cells in zip(*(block.columns for block in blocks), strict=True))
    spell = (_SPELT.get(column.kind) for column in table.columns)
    cells = [spelt(column) if spelt else column for spelt, column in zip(spell, columns, strict=True)]
    rows = zip(*cells, strict=True)
    return [dict(zip(names, (*one, *row), strict=True)) for one, row in zip(series, rows, strict=True)]


async def write_columns(table: Table) -> AsyncIterator[bytes]:
    """`{"series": [{…series, column: […], …}, …], …head}`, an entry for each block."""
    yield _SERIES
    before = b""
    async for block in table.blocks:
        entry: dict[str, Any] = dict(zip(table.names, block.series, strict=True))
        for column, cells in zip(table.columns, block.columns, strict=True):
            entry[column.name] = _COLUMNS[column.kind](cells) if column.kind in _COLUMNS else cells
        yield before + _dumped(entry)
        before = b","
    yield _end(table.head)


def _named(cells: Sequence[int]) -> Sequence[Any]:
    return [flag_names(cell) for cell in cells]


def _flags(cells: Sequence[int]) -> Sequence[Any] | None:
    """None if no reading has any, as is usual."""
    return _named(cells) if any(cells) else None


def _moments(cells: Sequence[Any]) -> Sequence[Any]:
    return [moment(cell) for cell in cells] if set(map(type, cells)) == {int} else _some(moment, cells)


def _micros(cells: Sequence[Any]) -> Sequence[Any]:
    return cells if set(map(type, cells)) == {int} else _some(micros, cells)


def _some(spelt: Callable[[Any], Any], cells: Sequence[Any]) -> Sequence[Any]:
    return [None if cell is None else spelt(cell) for cell in cells]


#: How kinds of cells are spelt by row and by column, where they do not stay as they are.
_SPELT: Final[Mapping[Kind, Callable[[Sequence[Any]], Any]]] = {Kind.TIME: _moments, Kind.FLAGS: _named}
_COLUMNS: Final[Mapping[Kind, Callable[[Sequence[Any]], Any]]] = {Kind.TIME: _micros, Kind.FLAGS: _flags}


def _end(head: Mapping[str, Any]) -> bytes:
    return b"]," + _dumped(dict(head))[1:] if head else b"]}"


def _dumped(content: Any, option: int = 0) -> bytes:
    return orjson.dumps(content, _fragment, option | orjson.OPT_UTC_Z | orjson.OPT_PASSTHROUGH_SUBCLASS)


def _fragment(digits: str) -> orjson.Fragment:
    return orjson.Fragment(str(digits))  # takes no class derived from it
