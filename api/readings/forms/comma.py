"""CSV (RFC 4180) with a header, for spreadsheets and programs.

A value stands in `value` if it is a number, `true` or `false`, and in `value_text` if it is a text, so that the text
`1` and the number differ. A spreadsheet takes a cell that begins with one of `= + - @`, a tab or a line's end for a
formula, and texts come from devices: such a text, and one that begins with `'`, gets a `'` before it. Whoever reads
texts exactly takes one away.
"""

import csv
from collections.abc import AsyncIterator, Iterable, Sequence
from io import StringIO
from itertools import repeat
from typing import Any, Final

from api.readings.forms.table import Block, Column, Digits, Kind, Table, flag_names, moment

_GUARDED: Final = frozenset("=+-@\t\r\n'")
_TRUTH: Final = {True: "true", False: "false"}


async def write_csv(table: Table) -> AsyncIterator[bytes]:
    """A line of names, and one for each row."""
    names = [*table.names]
    for column in table.columns:
        names += [column.name, f"{column.name}_text"] if column.kind is Kind.VALUE else [column.name]
    yield _lines([names])
    async for block in table.blocks:
        yield _lines(_rows(table.columns, block))


def _rows(columns: Sequence[Column], block: Block) -> Iterable[Sequence[Any]]:
    cells: list[Iterable[Any]] = [repeat(guarded(text)) for text in block.series]
    for column, one in zip(columns, block.columns, strict=True):
        cells += _spelt(column.kind, one)
    return zip(*cells, strict=False)


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    text = StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _spelt(kind: Kind, cells: Sequence[Any]) -> Iterable[Iterable[Any]]:
    """One column or two."""
    match kind:
        case Kind.TIME:
            yield [None if cell is None else moment(cell).isoformat()[:-6] + "Z" for cell in cells]
        case Kind.FLAGS:
            yield [" ".join(flag_names(cell)) for cell in cells]
        case Kind.TEXT:
            yield [None if cell is None else guarded(cell) for cell in cells]
        case Kind.VALUE if set(map(type, cells)) != {float}:
            yield [None if type(cell) is str else _TRUTH[cell] if type(cell) is bool else cell for cell in cells]
            yield [guarded(cell) if type(cell) is str else None for cell in cells]
        case Kind.VALUE:
            yield cells
            yield repeat(None)
        case _:
            yield cells


def guarded(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in _GUARDED and text and not isinstance(text, Digits) else text
