"""Which series a request means, and in which spans of time each of them is meant.

Everything here runs in a transaction that acts for one organisation (`api.access`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from api.http.problems import Problem, invalid_parameter
from api.problems import DEVICE_NOT_FOUND, GROUP_NOT_FOUND, METRIC_NOT_FOUND, SERIES_NOT_FOUND, SITE_NOT_FOUND
from schemas.catalogue import METRICS

#: What a selection may name, how it is looked for, and what is said if the organisation has none.
_THINGS: Final = {
    "device_id": ("SELECT deleted_at FROM devices WHERE device_id = $1", DEVICE_NOT_FOUND),
    "site_id": ("SELECT FROM sites WHERE site_id = $1", SITE_NOT_FOUND),
    "group_id": ("SELECT FROM device_groups WHERE group_id = $1", GROUP_NOT_FOUND),
    "series_id": ("SELECT FROM series WHERE series_id = $1", SERIES_NOT_FOUND),
}
_NARROWED: Final = {
    "device_id": "s.device_id = ${}",
    "group_id": "s.device_id IN (SELECT m.device_id FROM device_group_members m WHERE m.group_id = ${})",
    "series_id": "s.series_id = ${}",
    "metric": "s.metric = ${}",
    "label": "s.label = ${}",
}
_SENT: Final = "SELECT EXISTS (SELECT FROM series WHERE metric = $1)"
_ANY: Final = "SELECT EXISTS (SELECT FROM series s WHERE {narrowed})"
_STOOD: Final = "s.device_id IN (SELECT h.device_id FROM device_sites h WHERE h.site_id = ${})"
_EACH: Final = "SELECT series_id, device_id, metric, label, unit FROM series WHERE series_id = ANY ($1::int[])"
_OF_DEVICES: Final = """
SELECT d.device_id, d.deleted_at, s.series_id, s.metric, s.label, s.unit
FROM devices d LEFT JOIN series s USING (device_id) WHERE d.device_id = ANY ($1::uuid[])
ORDER BY d.device_id, s.metric, s.label"""
_COLUMNS: Final = "s.series_id, s.device_id, s.metric, s.label, s.unit"
_WHOLE: Final = f"""
SELECT {_COLUMNS} FROM series s WHERE {{narrowed}} ORDER BY s.device_id, s.metric, s.label LIMIT $1
"""  # noqa: S608
# A device may have stood there several times: its series come once for each. A site's stays are there until it is
# erased, and the site itself only until that begins.
_OF_STAYS: Final = f"""
SELECT {_COLUMNS}, greatest(stay.valid_from, $3) AS start, least(stay.valid_until, $4) AS stop
FROM (SELECT h.device_id, h.site_id, h.valid_from,
             lead(h.valid_from, 1, 'infinity') OVER (PARTITION BY h.device_id ORDER BY h.valid_from) AS valid_until
      FROM device_sites h
      WHERE h.device_id IN (SELECT o.device_id FROM device_sites o WHERE o.site_id = $2)) stay
JOIN series s ON s.device_id = stay.device_id
WHERE {{narrowed}} AND stay.site_id = $2 AND stay.valid_from < $4 AND stay.valid_until > $3
  AND EXISTS (SELECT FROM sites WHERE site_id = $2)
ORDER BY s.device_id, s.metric, s.label, start LIMIT $1
"""  # noqa: S608
# So few are deleted that leaving them out costs nothing; to look for all others costs as much as the rest.
_STAND_NOW: Final = """
  AND stay.valid_from <= now() AND stay.valid_until > now()
  AND NOT EXISTS (SELECT FROM devices d WHERE d.device_id = stay.device_id AND d.status = 'deleted')"""


class Selection(NamedTuple):
    """Whose series: a device's, those of what stood at a site while it did, of a group's devices, one by its id.

    Each that is given leaves only what is the others' too; at least one of the first four is.
    """

    device_id: UUID | None = None
    site_id: UUID | None = None
    group_id: UUID | None = None
    series_id: int | None = None
    metric: str | None = None
    label: str | None = None


class Series(NamedTuple):
    """What every reading of a series says about itself."""

    device_id: str
    metric: str
    label: str
    unit: str


#: Until when something stays that has not left: how the driver tells of infinity, with the zone that it leaves out.
STAYS: Final = datetime.max.replace(tzinfo=UTC)
ALWAYS: Final = datetime.min.replace(tzinfo=UTC)
_BEGINNING: Final = datetime.min  # noqa: DTZ901 -- as the driver tells of it


@dataclass(frozen=True)
class Found:
    """Series, the spans `[start, stop)` to read of each, if not all the same, and when their device was removed."""

    series: Mapping[int, Series]
    spans: Sequence[tuple[int, datetime, datetime]] | None = None
    removed_at: datetime | None = None

    def narrowed(self, metric: str | None, label: str | None) -> "Found":
        """What of it has that metric and label, where one is given."""
        series = {
            series_id: one
            for series_id, one in self.series.items()
            if metric in (None, one.metric) and label in (None, one.label)
        }
        return replace(self, series=series)

    def since(self, start: datetime | None) -> "Found":
        """The same without what its spans have before `start`."""
        if self.spans is None or start is None:
            return self
        spans = [(series_id, max(first, start), stop) for series_id, first, stop in self.spans if stop > start]
        return replace(self, spans=spans)


def slots_of(found: Found, start: datetime, end: datetime) -> tuple[list[int], list[datetime], list[datetime]]:
    """Series and the spans of each within `[start, end)`, those of one series in order of time."""
    if found.spans is None:
        number = len(found.series)
        return list(found.series), [start] * number, [end] * number
    spans = [(series_id, max(first, start), min(stop, end)) for series_id, first, stop in found.spans]
    kept = [span for span in spans if span[1] < span[2]]
    return [span[0] for span in kept], [span[1] for span in kept], [span[2] for span in kept]


async def find_each(connection: Any, series_ids: Sequence[int]) -> dict[int, Found]:
    """Those that the organisation has, each by itself."""
    rows = await connection.fetch(_EACH, series_ids) if series_ids else []
    return {row["series_id"]: Found({row["series_id"]: _series(row)}) for row in rows}


async def find_devices(connection: Any, devices: Sequence[UUID]) -> dict[UUID, Found]:
    """All series of each device that the organisation has."""
    rows = await connection.fetch(_OF_DEVICES, devices) if devices else []
    series: dict[UUID, dict[int, Series]] = {}
    for row in rows:
        of_device = series.setdefault(row["device_id"], {})
        if row["series_id"] is not None:
            of_device[row["series_id"]] = _series(row)
    removed = {row["device_id"]: row["deleted_at"] for row in rows}
    return {device: Found(of_device, removed_at=removed[device]) for device, of_device in series.items()}


async def find(
    connection: Any,
    wanted: Selection,
    start: datetime | None,
    end: datetime | None,
    most: int,
    *,
    is_awaited: bool = False,
    is_now: bool = False,
) -> Found:
    """The series; of a site those of the devices that stood there within `[start, end)`, and when they did.

    `is_now`: of a site, those of the devices alone that stand there now.

    Raises the problems of what this organisation does not have, of a selection that says too little, of more than
    `most` series, and of a metric that is none, unless whoever asks waits for what is still to come (`is_awaited`).
    """
    named = {name: value for name, value in wanted._asdict().items() if value is not None}
    things = [name for name in _THINGS if name in named]
    if not things:
        raise invalid_parameter("device_id", "is missing: device_id, site_id, group_id or series_id says whose")
    removed_at = None
    if wanted.device_id is not None:
        removed_at = (await _have(connection, "device_id", wanted.device_id))["deleted_at"]
    arguments: list[Any] = [most + 1]
    if wanted.site_id is not None:
        arguments += [wanted.site_id, start or ALWAYS, end or STAYS]
    sql = _WHOLE if wanted.site_id is None else _OF_STAYS
    conditions = _narrowed(named, _NARROWED, arguments)
    if is_now and wanted.site_id is not None:
        conditions += _STAND_NOW
    rows = await connection.fetch(sql.format(narrowed=conditions), *arguments)
    if not rows:
        # Where there are series, what they are of is there too; a device was found already.
        for name in things:
            if name != "device_id":
                await _have(connection, name, named[name])
        if not is_awaited:
            await check_metric(connection, wanted)
    if len(rows) > most:
        raise invalid_parameter("metric", f"more than {most} series: name a metric, a device or a shorter time")
    spans = None
    if wanted.site_id is not None:
        spans = [(row["series_id"], _aware(row["start"]), _aware(row["stop"])) for row in rows]
    return Found({row["series_id"]: _series(row) for row in rows}, spans, removed_at)


def _narrowed(named: Mapping[str, Any], conditions: Mapping[str, str], arguments: list[Any]) -> str:
    """A condition for each that is named, whose value is added to the arguments."""
    found = []
    for name in conditions.keys() & named.keys():
        arguments.append(named[name])
        found.append(conditions[name].format(len(arguments)))
    return " AND ".join(found) or "true"


async def narrowed(connection: Any, found: Found, wanted: Selection) -> Found:
    """What of it has the metric and label that are wanted. Raises the problem of a metric that is none."""
    some = found.narrowed(wanted.metric, wanted.label)
    if found.series and not some.series:
        await check_metric(connection, wanted)
    return some


async def check_metric(connection: Any, wanted: Selection) -> None:
    """Once nothing was found: raises the problem of a metric that is no known one and that nobody has sent.

    What has not sent anything yet may still send any.
    """
    if wanted.metric is None or wanted.metric in METRICS or await connection.fetchval(_SENT, wanted.metric):
        return
    named = {name: value for name, value in wanted._asdict().items() if name in _THINGS and value is not None}
    arguments: list[Any] = []
    narrowed = _narrowed(named, _NARROWED | {"site_id": _STOOD}, arguments)
    if await connection.fetchval(_ANY.format(narrowed=narrowed), *arguments):
        # Not repeated: what a client mistakes for a name may be its secret.
        message = "no metric of this name is known here, and nobody in the organisation has sent it"
        raise Problem(METRIC_NOT_FOUND, message)


async def _have(connection: Any, name: str, thing: UUID | int) -> Any:
    sql, missing = _THINGS[name]
    row = await connection.fetchrow(sql, thing)
    if row is None:
        raise Problem(missing)
    return row


def _aware(time: datetime) -> datetime:
    return time if time.tzinfo else ALWAYS if time == _BEGINNING else STAYS


def _series(row: Any) -> Series:
    return Series(str(row["device_id"]), row["metric"], row["label"], row["unit"])
