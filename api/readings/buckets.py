"""Where buckets begin: spans of time cut by a clock, in UTC or in a zone with its changes of the offset."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import cache
from math import gcd
from typing import Final, NamedTuple, Self
from zoneinfo import ZoneInfo, available_timezones

from api.http.problems import invalid_parameter

#: A Monday, so that weeks begin on Mondays, and multiples of all others at the turn of the century.
_ORIGIN: Final = date(2000, 1, 3)
_MONTHS_ORIGIN: Final = 2000 * 12
_TEXT: Final = re.compile(r"([1-9][0-9]{0,5})?(mo|[mhdw])", re.ASCII)
_SECONDS: Final = {"m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DAY_S: Final = 86_400
_SECOND: Final = timedelta(seconds=1)
#: The server's own.
_LOCAL: Final = ("localtime", "posixrules")
_MONTH_S: Final = 28 * _DAY_S
_LONGEST_S: Final = 366 * 200 * _DAY_S
#: What roll-ups there are of, and the seconds of their buckets, the coarsest first.
TIERS: Final = (("1d", 86_400), ("1h", 3_600), ("5m", 300))

PATTERN: Final = f"^{_TEXT.pattern}$"
WORDS: Final = "must be a number and m, h, d, w or mo: 1m, 5m, 15m, 1h, 6h, 1d, 1w, 1mo, or any other multiple of one"


class Bucket(NamedTuple):
    """How long buckets are: so many seconds, or so many months."""

    text: str
    seconds: int
    months: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """`5m`, `1h`, `2d`, `1w`, `1mo`. Raises the problem of anything else."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise invalid_parameter("bucket", WORDS)
        number, unit = int(match[1] or 1), match[2]
        bucket = cls(text, 0, number) if unit == "mo" else cls(text, number * _SECONDS[unit])
        if bucket.least_s > _LONGEST_S:
            raise invalid_parameter("bucket", "must be 200 years at most")
        return bucket

    @property
    def least_s(self) -> int:
        """The seconds of the shortest bucket."""
        return self.seconds or self.months * _MONTH_S


def zone_of(name: str) -> tzinfo:
    """Raises the problem of a zone that is not known."""
    if name.upper() == "UTC":
        return UTC
    if name in _LOCAL or name not in _zones():
        raise invalid_parameter("tz", "is no time zone of the IANA database, such as Europe/Prague")
    return ZoneInfo(name)


@cache
def _zones() -> set[str]:
    return available_timezones()


def edges_of(start: datetime, end: datetime, bucket: Bucket, zone: tzinfo) -> list[datetime]:
    """The beginnings of the buckets that `[start, end)` reaches into, and the end of the last one, all in UTC.

    Hours and minutes are cut by the clock of the zone: a bucket begins whenever that shows a multiple since
    midnight, so that a day has 23 or 25 hours where it has. Days, weeks and months begin at its midnights. Raises the
    problem of a bucket that does not divide the days of a zone other than UTC.
    """
    if zone is UTC and not bucket.months:
        return _steady(start, end, bucket.seconds)
    if bucket.months:
        return _trimmed(_months(start.astimezone(zone), end.astimezone(zone), bucket.months, zone), start, end)
    first, last = start.astimezone(zone).date(), end.astimezone(zone).date() + timedelta(days=1)
    if bucket.seconds % _DAY_S == 0:
        return _trimmed(_days(first, last, bucket.seconds // _DAY_S, zone), start, end)
    if _DAY_S % bucket.seconds:
        raise invalid_parameter("bucket", "must divide a day, or be a number of days, in a time zone other than UTC")
    return _trimmed(_clocked(first, last, bucket.seconds, zone), start, end)


def count_of(start: datetime, end: datetime, bucket: Bucket) -> int:
    """At most how many buckets there are, before any is made."""
    return int((end - start).total_seconds() // bucket.least_s) + 2


def tier_of(inner: Sequence[int]) -> str | None:
    """The coarsest roll-up that none of these edges cuts; None where only readings will do.

    In microseconds since 1970, without the outer two, which may cut a bucket of the roll-up.
    """
    step = gcd(*inner)
    return next((name for name, seconds in TIERS if step % (seconds * 1_000_000) == 0), None)


def _steady(start: datetime, end: datetime, seconds: int) -> list[datetime]:
    step = timedelta(seconds=seconds)
    origin = datetime(_ORIGIN.year, _ORIGIN.month, _ORIGIN.day, tzinfo=UTC)
    at = origin + (start - origin) // step * step
    edges = [at]
    while at < end:
        at += step
        edges.append(at)
    return edges


def _days(first: date, last: date, days: int, zone: tzinfo) -> list[datetime]:
    number = (first - _ORIGIN).days // days
    edges: list[datetime] = []
    end = _midnight(last, zone)
    while not edges or edges[-1] < end:
        edge = _midnight(_ORIGIN + timedelta(days=number * days), zone)
        if edge not in edges[-1:]:  # a date that a zone skipped has no length
            edges.append(edge)
        number += 1
    return edges


def _months(start: datetime, end: datetime, months: int, zone: tzinfo) -> list[datetime]:
    number = (start.year * 12 + start.month - 1 - _MONTHS_ORIGIN) // months
    edges: list[datetime] = []
    while not edges or edges[-1] < end:
        years, month = divmod(_MONTHS_ORIGIN + number * months, 12)
        edges.append(_midnight(date(years, month + 1, 1), zone))
        number += 1
    return edges


def _clocked(first: date, last: date, seconds: int, zone: tzinfo) -> list[datetime]:
    edges = set()
    day = first
    while day <= last:
        midnight = datetime(day.year, day.month, day.day)  # noqa: DTZ001 - what a clock shows
        for shown in range(0, _DAY_S, seconds):
            edges.update(_instants(midnight + timedelta(seconds=shown), seconds, zone))
        day += timedelta(days=1)
    return sorted(edges)


def _instants(shown: datetime, seconds: int, zone: tzinfo) -> list[datetime]:
    """When the clock of the zone shows this; where it is put forward past it, the moment of that.

    Twice where it is put back by as long as a bucket or longer; shorter repetitions belong to the bucket before.
    """
    first, second = (shown.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    if first > second:  # never shown: the offset before it would be right only later, the one behind it only earlier
        return [_change(second, first, zone)]
    return [first, second] if (second - first).total_seconds() >= seconds else [first]


def _change(low: datetime, high: datetime, zone: tzinfo) -> datetime:
    """The moment in `(low, high]` from which on the zone has another offset than at `low`."""
    before = low.astimezone(zone).utcoffset()
    while high - low > _SECOND:
        middle = low + (high - low) // 2
        low, high = (middle, high) if middle.astimezone(zone).utcoffset() == before else (low, middle)
    return high.replace(microsecond=0)


def _midnight(day: date, zone: tzinfo) -> datetime:
    """When the day begins: the moment at which the clock passes midnight where it never shows it."""
    return _instants(datetime(day.year, day.month, day.day), _DAY_S, zone)[0]  # noqa: DTZ001 - what a clock shows


def _trimmed(edges: list[datetime], start: datetime, end: datetime) -> list[datetime]:
    """From the last edge at or before the start to the first at or after the end."""
    first = bisect_right(edges, start) - 1
    after = next(index for index, edge in enumerate(edges) if edge >= end)
    return edges[first : after + 1]
