"""Stored readings: pages of raw ones in order of time, and the newest of each series.

Everything here runs in a transaction that acts for one organisation (`api.access`). Left out: roll-ups.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import orjson

from api.http.problems import Problem
from api.problems import DEVICE_NOT_FOUND
from schemas.record import Quality

_FLAGS: Final = list(Quality)
_JSON_INTEGER: Final = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)

_DEVICE: Final = "SELECT EXISTS (SELECT FROM devices WHERE device_id = $1)"
_SERIES: Final = """
SELECT series_id, metric, label, unit FROM series
WHERE device_id = $1 AND ($2::text IS NULL OR metric = $2) AND ($3::text IS NULL OR label = $3)
ORDER BY metric, label
"""
_PAGE: Final = """
SELECT ts, series_id, kind, quality, value, text_value
FROM readings_page($1::int[], coalesce($2::timestamptz, '-infinity'), coalesce($3::timestamptz, 'infinity'),
                   {descending}, coalesce($4::timestamptz, '{unbounded}'), $5::int, $6::int, $7::int)
ORDER BY ts {direction}, series_id {direction}, kind {direction}
"""
_FORWARDS: Final = _PAGE.format(descending="false", unbounded="-infinity", direction="ASC")
_BACKWARDS: Final = _PAGE.format(descending="true", unbounded="infinity", direction="DESC")
#: The least read of a series at once, so that uneven series need few rounds.
_EACH_LEAST: Final = 8
_ROUND_GROWTH: Final = 4
#: Nearly every series has reported within it, and it spans two or three chunks instead of a year's.
_RECENT: Final = timedelta(days=8)


class SeriesFilter(NamedTuple):
    """Which series of a device: None stands for every metric or label."""

    device_id: UUID
    metric: str | None
    label: str | None


class SpanRead(NamedTuple):
    """`[start, end)` in time, and the direction and number of what is read from it."""

    start: datetime | None
    end: datetime | None
    descending: bool
    limit: int


class Series(NamedTuple):
    """What every reading of a series says about itself."""

    device_id: str
    metric: str
    label: str
    unit: str


class Place(NamedTuple):
    """Where a page ended: no two readings of a device have the same place."""

    ts: datetime
    series_id: int
    kind: int


@dataclass(frozen=True)
class Page:
    """Rows in order, and the place after which the next page starts; None when there is none."""

    rows: Sequence[Any]
    end: Place | None


# ---------------------------------------------------------------- what is asked of the database


async def find_series(connection: Any, wanted: SeriesFilter) -> dict[int, Series]:
    """The series of a device. Raises the problem of a device that this organisation does not have."""
    rows = await connection.fetch(_SERIES, wanted.device_id, wanted.metric, wanted.label)
    if not rows and not await connection.fetchval(_DEVICE, wanted.device_id):
        raise Problem(DEVICE_NOT_FOUND)
    device = str(wanted.device_id)
    return {row["series_id"]: Series(device, row["metric"], row["label"], row["unit"]) for row in rows}


async def read_page(connection: Any, series: Sequence[int], wanted: SpanRead, after: Place | None) -> Page:
    """The next `wanted.limit` readings after `after`.

    A page may need few readings of each series or very many of one. Each round reads up to `each` of every series;
    what it read is complete up to the first place at which a series gave all it was asked for.
    """
    if not series:
        return Page([], None)
    sql = _BACKWARDS if wanted.descending else _FORWARDS
    enough = wanted.limit + 1
    each = min(enough, max(_EACH_LEAST, 2 * enough // len(series)))
    place = after or Place(datetime.min.replace(tzinfo=UTC), 0, 0)
    while True:
        start = None if after is None else place.ts
        rows = await connection.fetch(sql, series, wanted.start, wanted.end, start, place.series_id, place.kind, each)
        cut = _first_full(rows, each)
        if cut is None or cut >= enough:
            break
        each = min(enough, each * _ROUND_GROWTH)
    if len(rows[:cut]) <= wanted.limit:
        return Page(rows[:cut], None)
    last = rows[wanted.limit - 1]
    return Page(rows[: wanted.limit], Place(last["ts"], last["series_id"], last["kind"]))


def _first_full(rows: Sequence[Any], each: int) -> int | None:
    """How many rows there are up to the first place at which a series gave all it was asked for, if one did."""
    given: dict[tuple[int, int], int] = {}
    for index, row in enumerate(rows, 1):
        key = row["series_id"], row["kind"]
        given[key] = given.get(key, 0) + 1
        if given[key] == each:
            return index
    return None


async def read_latest(connection: Any, series: Sequence[int], now: datetime) -> list[Any]:
    """The newest reading of each series that has one: looked for in recent chunks first, then in all."""
    newest: dict[int, Any] = {}
    for since in (now - _RECENT, None):
        missing = [series_id for series_id in series if series_id not in newest]
        if missing:
            rows = await connection.fetch(_BACKWARDS, missing, since, None, None, 0, 0, 1)
            for row in rows:
                newest.setdefault(row["series_id"], row)  # a number and a text: the newer one comes first
    return [newest[series_id] for series_id in series if series_id in newest]


# ---------------------------------------------------------------- what is answered


def render(rows: Sequence[Any], series: Mapping[int, Series], next_cursor: str | None) -> bytes:
    """The answer's body."""
    data = [_reading(row, series[row["series_id"]]) for row in rows]
    return orjson.dumps({"data": data, "next_cursor": next_cursor}, option=orjson.OPT_UTC_Z)


def _reading(row: Any, series: Series) -> dict[str, Any]:
    quality = row["quality"]
    return {
        "device_id": series.device_id,
        "metric": series.metric,
        "label": series.label,
        "unit": series.unit,
        "ts": row["ts"],
        "value": _value(row, quality),
        "flags": [flag.name.lower() for flag in _FLAGS if quality & flag and flag.name] if quality else [],
    }


def _value(row: Any, quality: int) -> object:
    text = row["text_value"]
    if text is None:
        value = row["value"]
        return value != 0 if quality & Quality.BOOLEAN else value
    if quality & Quality.INTEGER and _JSON_INTEGER.fullmatch(text):
        return orjson.Fragment(text)  # of any length: no number type here holds all of its digits
    return text
