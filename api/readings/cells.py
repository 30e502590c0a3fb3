"""Stored readings as cells of a table. Left out: how they are read (`api.readings.raw`, `api.readings.streams`)."""

import re
import sys
from array import array
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from typing import Any, Final, NamedTuple

import orjson

from api.readings.forms.table import Block, Column, Digits, Kind, Table, each, flag_names, micros
from api.readings.series import Found, Series
from schemas.record import Quality

#: Of a raw reading, beside its series.
COLUMNS: Final = (Column("ts", Kind.TIME), Column("value", Kind.VALUE), Column("flags", Kind.FLAGS))
_INTEGER: Final = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)
#: As plain numbers: `&` of an enum takes a microsecond, of each reading.
_BOOLEAN: Final = int(Quality.BOOLEAN)
_WHOLE: Final = int(Quality.INTEGER)
#: PostgreSQL counts microseconds from 2000 on.
_Y2000: Final = micros(datetime(2000, 1, 1, tzinfo=UTC))


class Cells(NamedTuple):
    """Readings of one series, column by column, and the time behind which there are more of them."""

    times: Sequence[int]
    values: Sequence[Any]
    flags: Sequence[int]
    last: int | None


def page_table(rows: Sequence[Any], found: Found, head: dict[str, Any], *, by_series: bool) -> Table:
    """A page of readings; `by_series` puts together what is one series', in the order of the series."""
    if by_series:
        place = {series_id: index for index, series_id in enumerate(found.series)}
        rows = sorted(rows, key=lambda row: place[row["series_id"]])
    return Table(COLUMNS, each(_page_blocks(rows, found)), head, objects=partial(_page_objects, rows, found))


def _page_blocks(rows: Sequence[Any], found: Found) -> Iterator[Block]:
    """Runs of one series. A page may have as many as rows, so a plain number is not looked at twice."""
    numbers, texts, flags = ([row[name] for row in rows] for name in ("value", "text_value", "quality"))
    values = [
        number if text is None and not quality else _value(number, text, quality)
        for number, text, quality in zip(numbers, texts, flags, strict=True)
    ]
    columns = [row["ts"] for row in rows], values, flags
    series = [row["series_id"] for row in rows]
    first = 0
    for stop, (one, following) in enumerate(pairwise([*series, None]), 1):
        if one != following:
            yield Block(found.series[one], [column[first:stop] for column in columns])
            first = stop


def _page_objects(rows: Sequence[Any], found: Found, names: Sequence[str]) -> list[dict[str, Any]]:
    series = {series_id: dict(zip(names, one, strict=True)) for series_id, one in found.series.items()}
    return [_object(row, series[row["series_id"]]) for row in rows]


def reading_of(row: Any, series: Series) -> dict[str, Any]:
    """One reading as JSON by rows has it, for orjson."""
    return _object(row, series._asdict())


def _object(row: Any, series: dict[str, Any]) -> dict[str, Any]:
    text, quality = row["text_value"], row["quality"]
    value = row["value"] if text is None and not quality else _value(row["value"], text, quality)
    return {
        **series,
        "ts": row["ts"],
        "value": orjson.Fragment(str(value)) if isinstance(value, Digits) else value,
        "flags": flag_names(quality),
    }


def _value(number: float | None, text: str | None, quality: int) -> Any:
    if text is not None:
        return Digits(text) if quality & _WHOLE and _INTEGER.fullmatch(text) else text
    return number != 0 if quality & _BOOLEAN else number


def read_packed(row: Any, most: int, *, descending: bool) -> Cells:
    """A row of `readings_blocks`, of which up to `most` numbers and as many texts were asked for."""
    times, values = _times(row["ts"]), _unpacked("d", row["value"]).tolist()
    flags = _flags(row["quality"], len(times))
    if any(flags):
        values = [_value(value, None, quality) for value, quality in zip(values, flags, strict=True)]
    texts = _texts(row)
    if not texts:
        return Cells(times, values, flags, times[-1] if len(times) == most else None)
    ends = [column[-1] for column in (times, [text[0] for text in texts]) if len(column) == most]
    last = None if not ends else max(ends) if descending else min(ends)
    numbers = [(time, 0, value, quality) for time, value, quality in zip(times, values, flags, strict=True)]
    # Behind the first end, one of the two may have been given in part.
    cells = [
        cell
        for cell in sorted([*numbers, *texts], key=lambda cell: cell[:2], reverse=descending)
        if last is None or (cell[0] >= last if descending else cell[0] <= last)
    ]
    return Cells([cell[0] for cell in cells], [cell[2] for cell in cells], [cell[3] for cell in cells], last)


def _texts(row: Any) -> list[tuple[int, int, Any, int]]:
    texts = row["texts"] or ()
    flags = _flags(row["text_quality"], len(texts))
    return [
        (time, 1, _value(None, text, quality), quality)
        for time, text, quality in zip(_times(row["text_ts"]), texts, flags, strict=True)
    ]


def _times(packed: bytes | None) -> list[int]:
    return [time + _Y2000 for time in _unpacked("q", packed)]


def _flags(packed: bytes | None, count: int) -> list[int]:
    return _unpacked("h", packed).tolist() if packed and any(packed) else [0] * count


def _unpacked(kind: str, packed: bytes | None) -> "array[Any]":
    """Big-endian numbers, as the protocol has them."""
    found: array[Any] = array(kind)
    found.frombytes(packed or b"")
    if sys.byteorder == "little":
        found.byteswap()
    return found
