"""Stored readings as they are: pages in order of time, and the newest of each series. Left out: what they come to.

Everything here runs in a transaction that acts for one organisation (`api.access`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Final, NamedTuple

from api.readings.series import ALWAYS, STAYS, Found

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
_KEPT_FROM: Final = """
SELECT nullif(dropped_through, '-infinity') FROM retention_horizons WHERE tier = 'raw'"""
_LATEST: Final = """
SELECT ts, series_id, kind, quality, value, text_value FROM readings_latest($1, $2, $3)"""
_LATEST_OF_STAYS: Final = """
SELECT ts, series_id, kind, quality, value, text_value FROM readings_latest_of_stays($1, $2, $3)"""
#: The least read of a series at once, so that uneven series need few rounds.
_EACH_LEAST: Final = 8
_ROUND_GROWTH: Final = 4
#: Nearly every series has reported within it, and it spans two or three chunks instead of a year's.
_RECENT: Final = timedelta(days=8)
#: Fewer series cost less than one more question.
_HINTED_LEAST: Final = 100
_HINTS_MAX: Final = 100_000


class SpanRead(NamedTuple):
    """`[start, end)` in time, and the direction and number of what is read from it."""

    start: datetime | None
    end: datetime | None
    descending: bool
    limit: int


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


@dataclass(frozen=True)
class Kept:
    """What is kept of series from a time on. What is not may still stand there until its chunk goes."""

    found: Found
    start: datetime | None
    kept_from: datetime | None
    """If that is later than the time that was asked for: readings before are no longer kept."""

    @property
    def head(self) -> dict[str, Any]:
        """What is said of it beside readings."""
        head = {"kept_from": self.kept_from, "removed_at": self.found.removed_at}
        return {name: value for name, value in head.items() if value is not None}


async def kept_of(connection: Any, found: Found, start: datetime | None) -> Kept:
    kept = await connection.fetchval(_KEPT_FROM)
    if kept is None or (start is not None and start >= kept):
        return Kept(found, start, None)
    return Kept(found.since(kept), kept, None if start is None else kept)


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


class Newest:
    """When the newest reading of a series was as it was last asked for: from where on the next is looked for first.

    The database goes through a page of its index as far as the span reaches, of each series. Of what is not found
    there, because it was erased or has left a site, nothing is taken to be known.
    """

    def __init__(self) -> None:
        self._seen: dict[int, datetime] = {}

    def since(self, series: Collection[int]) -> datetime | None:
        """Since when nine of ten of them have one; None where too few are known, or are asked for."""
        seen = sorted(self._seen[series_id] for series_id in series if series_id in self._seen)
        behind = len(seen) - (9 * len(series) + 9) // 10
        return None if behind < 0 or len(series) < _HINTED_LEAST else seen[behind]

    def note(self, newest: Mapping[int, Any]) -> None:
        for series_id, row in newest.items():
            if self._seen.get(series_id) != row["ts"]:
                self._seen.pop(series_id, None)
                self._seen[series_id] = row["ts"]
        for series_id in list(islice(self._seen, max(0, len(self._seen) - _HINTS_MAX))):
            del self._seen[series_id]


async def read_latest(
    connection: Any, found: Found, start: datetime | None, end: datetime | None, hints: Newest | None = None
) -> list[Any]:
    """The newest reading in `[start, end)` of each series that has one: looked for in recent chunks, then in all.

    `hints`: for many series without an end, where to look before that.
    """
    recent = (end or datetime.now(UTC)) - _RECENT
    if start is not None:
        recent = max(start, recent)
    if end is not None:
        hints = None
    hint = None if hints is None else hints.since(found.series)
    begins = [recent, start] if hint is None or hint <= recent else [hint, recent, start]
    newest: dict[int, Any] = {}
    for since in begins:
        first, stop = since or ALWAYS, end or STAYS
        whole, stays = _without(found, newest, first, stop)
        rows = await connection.fetch(_LATEST, whole, first, stop) if whole else []
        if stays:
            rows += await connection.fetch(_LATEST_OF_STAYS, *zip(*stays, strict=True))
        for row in rows:
            before = newest.get(row["series_id"])
            # A number and a text, or out of several stays.
            if before is None or (row["ts"], row["kind"]) > (before["ts"], before["kind"]):
                newest[row["series_id"]] = row
    if hints is not None:
        hints.note(newest)
    return [newest[series_id] for series_id in found.series if series_id in newest]


def _without(
    found: Found, given: Collection[int], first: datetime, stop: datetime
) -> tuple[list[int], list[tuple[int, datetime, datetime]]]:
    """What is left to look for: series in all of `[first, stop)`, and the spans of others within it."""
    if found.spans is None:
        return [series_id for series_id in found.series if series_id not in given], []
    whole, stays = [], []
    for series_id, start, end in found.spans:
        if series_id in given:
            continue
        if start <= first and end >= stop:
            whole.append(series_id)
        elif start < stop and end > first:
            stays.append((series_id, max(start, first), min(end, stop)))
    return whole, stays
