"""Which readings of landed records stand in the database, and how.

A record of which everything was stored is told of as it stands in the log: landing copies it. The books say of which
records that is not so; of those, and of all that landed a while ago, the database is asked reading by reading. Two
things are not known: a duplicate in a record that brought new readings as well is told of again, and so is a record
of a spool that came twice where the first was not seen. Left out: who is told (`hub`).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from math import isclose
from typing import Any, Final, NamedTuple
from uuid import UUID

from api.live.tail import Entry
from api.live.watches import Watch
from api.readings.series import Series
from schemas.record import TIME_MADE_UP, Channel, Record

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_SAME: Final = 1e-9
_SERIES_MAX: Final = 200_000

_OUTCOMES: Final = """
SELECT o.source, o.partition, o.position, o.unreadable,
       o.duplicates + o.conflicts + o.quarantined + o.erased AS others
FROM unnest($1::uuid[], $2::int[], $3::bigint[]) AS w (source, partition, position)
JOIN outcomes o USING (source, partition, position)
"""
_SERIES: Final = "SELECT series_id, device_id, metric, label, unit FROM series WHERE device_id = ANY ($1::uuid[])"
_MOVED: Final = "SELECT record_id, item, ts FROM readings_moved($1)"
_STORED: Final = "SELECT item, quality, value, text_value FROM stored_readings($1, $2, $3)"

Place = tuple[UUID, int, int]


class Matched(NamedTuple):
    """A landed record of a device that somebody listens to."""

    entry: Entry
    record: Record
    place: Place
    """Where the books tell of it: in the log, or in the spool that it came from."""
    watches: tuple[Watch, ...]


class Reading(NamedTuple):
    """One of a record's readings."""

    matched: Matched
    number: int
    """Which of the record's."""
    series_id: int
    series: Series
    ts: datetime
    value: float | str
    quality: int
    is_doubted: bool
    """Whether the database has to be asked if it stands."""

    @property
    def row(self) -> dict[str, Any]:
        is_text = isinstance(self.value, str)
        value = {"text_value": self.value, "value": None} if is_text else {"text_value": None, "value": self.value}
        return {"ts": self.ts, "quality": self.quality, **value}


class KnownSeries:
    """Series by device, metric and label: what a process has needed of late."""

    def __init__(self) -> None:
        self._found: dict[tuple[bytes, str, str], tuple[int, Series]] = {}

    def get(self, device: bytes, channel: Channel) -> tuple[int, Series] | None:
        return self._found.get((device, channel.metric, channel.label))

    async def learn(self, connection: Any, devices: Collection[bytes]) -> None:
        if len(self._found) > _SERIES_MAX:
            self._found.clear()
        for row in await connection.fetch(_SERIES, [UUID(bytes=device) for device in devices]):
            series = Series(str(row["device_id"]), row["metric"], row["label"], row["unit"])
            self._found[row["device_id"].bytes, series.metric, series.label] = row["series_id"], series

    def forget(self) -> None:
        """What was erased may have been made anew."""
        self._found.clear()


async def stored(
    connection: Any, matched: Sequence[Matched], known: KnownSeries, *, careful: bool
) -> Sequence[Reading]:
    """Readings of these records, all of the organisation that the transaction acts for, as they stand.

    `careful`: ask of each, as what has landed a while ago may have been erased.
    """
    others = await _others(connection, matched)
    unknown = {
        one.record.device for one in matched for channel in _wanted(one) if not known.get(one.record.device, channel)
    }
    if unknown:
        await known.learn(connection, unknown)
    readings = [
        reading
        for one in matched
        if others.get(one.place, 0) < one.record.accepted
        for reading in _readings(one, known, is_doubted=careful or one.place in others or bool(one.record.replays))
    ]
    return await _standing(connection, await _moved(connection, readings))


async def _others(connection: Any, matched: Sequence[Matched]) -> dict[Place, int]:
    """Of records of which not all was stored, how many readings were not."""
    rows = await connection.fetch(_OUTCOMES, *zip(*(one.place for one in matched), strict=True))
    return {
        (row["source"], row["partition"], row["position"]): 2**31 if row["unreadable"] else row["others"]
        for row in rows
        if row["unreadable"] or row["others"]
    }


def _wanted(matched: Matched) -> Iterator[Channel]:
    return (channel for channel in matched.record.channels if _is_wanted(matched, channel))


def _is_wanted(matched: Matched, channel: Channel) -> bool:
    return any(watch.takes(channel.metric, channel.label) for watch in matched.watches)


def _readings(matched: Matched, known: KnownSeries, *, is_doubted: bool) -> Iterator[Reading]:
    base = 0
    for channel in matched.record.channels:
        found = known.get(matched.record.device, channel)
        if found is not None and _is_wanted(matched, channel):
            values: Sequence[float | str] = channel.unpack_values()
            columns = zip(channel.unpack_times(), values, channel.unpack_quality(), strict=True)
            for number, (time, value, quality) in enumerate(columns, base):
                ts = _EPOCH + timedelta(microseconds=time)
                yield Reading(matched, number, *found, ts, value, quality, is_doubted)
        base += len(channel)


async def _moved(connection: Any, readings: list[Reading]) -> list[Reading]:
    """Those with a time of our making may have had to make way."""
    records = {reading.matched.record.record_id for reading in readings if reading.quality & TIME_MADE_UP}
    if not records:
        return readings
    rows = await connection.fetch(_MOVED, [UUID(bytes=record) for record in records])
    moved = {(row["record_id"].bytes, row["item"]): row["ts"] for row in rows}
    if not moved:
        return readings
    return [
        reading._replace(ts=moved.get((reading.matched.record.record_id, reading.number), reading.ts))
        for reading in readings
    ]


async def _standing(connection: Any, readings: list[Reading]) -> list[Reading]:
    doubted = [reading for reading in readings if reading.is_doubted]
    if not doubted:
        return readings
    keys = [(reading.series_id, reading.ts, isinstance(reading.value, str)) for reading in doubted]
    rows = await connection.fetch(_STORED, *map(list, zip(*keys, strict=True)))
    found: Mapping[int, Any] = {row["item"]: row for row in rows}
    standing = {
        id(reading) for item, reading in enumerate(doubted, 1) if item in found and _same(reading.value, found[item])
    }
    return [reading for reading in readings if not reading.is_doubted or id(reading) in standing]


def _same(value: float | str, row: Any) -> bool:
    if isinstance(value, str):
        return bool(value == row["text_value"])
    return row["value"] is not None and isclose(value, row["value"], rel_tol=_SAME)
