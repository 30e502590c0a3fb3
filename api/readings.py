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

from api.http.problems import Problem, invalid_parameter
from api.problems import DEVICE_NOT_FOUND, SITE_NOT_FOUND
from schemas.record import Quality

_FLAGS: Final = list(Quality)
_JSON_INTEGER: Final = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)

_SERIES: Final = """
SELECT s.series_id, s.metric, s.label, s.unit, d.deleted_at FROM devices d LEFT JOIN series s
    ON s.device_id = d.device_id AND ($2::text IS NULL OR s.metric = $2) AND ($3::text IS NULL OR s.label = $3)
WHERE d.device_id = $1 ORDER BY s.metric, s.label
"""
_SITE: Final = "SELECT EXISTS (SELECT FROM sites WHERE site_id = $1)"
# A device may have stood there several times: its series come once for each.
_SITE_SERIES: Final = """
SELECT s.series_id, s.device_id, s.metric, s.label, s.unit,
       greatest(stay.valid_from, coalesce($5::timestamptz, '-infinity')) AS start,
       least(coalesce(stay.valid_until, 'infinity'), coalesce($6::timestamptz, 'infinity')) AS stop
FROM (SELECT h.device_id, h.valid_from,
             (SELECT min(n.valid_from) FROM device_sites n
              WHERE n.device_id = h.device_id AND n.valid_from > h.valid_from) AS valid_until
      FROM device_sites h WHERE h.site_id = $1 AND ($2::uuid IS NULL OR h.device_id = $2)) stay
JOIN series s ON s.device_id = stay.device_id
WHERE ($3::text IS NULL OR s.metric = $3) AND ($4::text IS NULL OR s.label = $4)
  AND stay.valid_from < coalesce($6::timestamptz, 'infinity')
  AND coalesce(stay.valid_until, 'infinity') > coalesce($5::timestamptz, '-infinity')
ORDER BY s.device_id, s.metric, s.label LIMIT $7
"""
_PAGE: Final = """
SELECT ts, series_id, kind, quality, value, text_value
FROM readings_page($1::int[], coalesce($2::timestamptz, '-infinity'), coalesce($3::timestamptz, 'infinity'),
                   {descending}, coalesce($4::timestamptz, '{unbounded}'), $5::int, $6::int, $7::int)
ORDER BY ts {direction}, series_id {direction}, kind {direction}
"""
_OF_STAYS: Final = """
SELECT ts, series_id, kind, quality, value, text_value
FROM readings_of_stays($1::int[], $2::timestamptz[], $3::timestamptz[],
                       {descending}, coalesce($4::timestamptz, '{unbounded}'), $5::int, $6::int, $7::int)
ORDER BY ts {direction}, series_id {direction}, kind {direction}
"""
_FORWARDS: Final = _PAGE.format(descending="false", unbounded="-infinity", direction="ASC")
_BACKWARDS: Final = _PAGE.format(descending="true", unbounded="infinity", direction="DESC")
_STAYS_FORWARDS: Final = _OF_STAYS.format(descending="false", unbounded="-infinity", direction="ASC")
_STAYS_BACKWARDS: Final = _OF_STAYS.format(descending="true", unbounded="infinity", direction="DESC")
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


class SiteFilter(NamedTuple):
    """Which series of the devices that stood at a site, while they did: None stands for all."""

    site_id: UUID
    device_id: UUID | None
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


@dataclass(frozen=True)
class Found:
    """Series, the spans `[start, stop)` to read of each, if not all the same, and when their device was removed."""

    series: Mapping[int, Series]
    spans: Sequence[tuple[int, datetime, datetime]] | None = None
    removed_at: datetime | None = None


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


async def find_series(connection: Any, wanted: SeriesFilter) -> Found:
    """The series of a device. Raises the problem of a device that this organisation never had."""
    rows = await connection.fetch(_SERIES, wanted.device_id, wanted.metric, wanted.label)
    if not rows:
        raise Problem(DEVICE_NOT_FOUND)
    device = str(wanted.device_id)
    named = [row for row in rows if row["series_id"] is not None]
    series = {row["series_id"]: Series(device, row["metric"], row["label"], row["unit"]) for row in named}
    return Found(series, removed_at=rows[0]["deleted_at"])


async def find_site_series(connection: Any, wanted: SiteFilter, read: SpanRead, most: int) -> Found:
    """The series of the devices that stood at a site within what is to be read, and when they did.

    Raises the problems of a site that this organisation does not have, and of more than `most` of them.
    """
    if not await connection.fetchval(_SITE, wanted.site_id):
        raise Problem(SITE_NOT_FOUND)
    rows = await connection.fetch(_SITE_SERIES, *wanted, read.start, read.end, most + 1)
    if len(rows) > most:
        raise invalid_parameter("site_id", f"has more than {most} series: name a metric, a device or a shorter time")
    series = {
        row["series_id"]: Series(str(row["device_id"]), row["metric"], row["label"], row["unit"]) for row in rows
    }
    return Found(series, [(row["series_id"], row["start"], row["stop"]) for row in rows])


async def read_page(connection: Any, found: Found, wanted: SpanRead, after: Place | None) -> Page:
    """The next `wanted.limit` readings after `after`.

    A page may need few readings of each series or very many of one. Each round reads up to `each` of every series;
    what it read is complete up to the first place at which a series gave all it was asked for.
    """
    if not found.series:
        return Page([], None)
    sql, arguments = _read_of(found, wanted)
    series = arguments[0]
    enough = wanted.limit + 1
    each = min(enough, max(_EACH_LEAST, 2 * enough // len(series)))
    place = after or Place(datetime.min.replace(tzinfo=UTC), 0, 0)
    while True:
        start = None if after is None else place.ts
        rows = await connection.fetch(sql, *arguments, start, place.series_id, place.kind, each)
        cut = _first_full(rows, each)
        if cut is None or cut >= enough:
            break
        each = min(enough, each * _ROUND_GROWTH)
    if len(rows[:cut]) <= wanted.limit:
        return Page(rows[:cut], None)
    last = rows[wanted.limit - 1]
    return Page(rows[: wanted.limit], Place(last["ts"], last["series_id"], last["kind"]))


def _read_of(found: Found, wanted: SpanRead) -> tuple[str, list[Any]]:
    """The statement, and what it takes before the place after which it begins."""
    if found.spans is None:
        sql = _BACKWARDS if wanted.descending else _FORWARDS
        return sql, [list(found.series), wanted.start, wanted.end]
    sql = _STAYS_BACKWARDS if wanted.descending else _STAYS_FORWARDS
    return sql, [list(column) for column in zip(*found.spans, strict=True)]


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


def render(rows: Sequence[Any], found: Found, next_cursor: str | None) -> bytes:
    """The answer's body."""
    data = [_reading(row, found.series[row["series_id"]]) for row in rows]
    content: dict[str, Any] = {"data": data, "next_cursor": next_cursor}
    if found.removed_at is not None:
        content["removed_at"] = found.removed_at
    return orjson.dumps(content, option=orjson.OPT_UTC_Z)


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
