"""Which devices selections mean, and since when; shared by all who listen to the same. Left out: who may (`hub`).

A selection is followed by its devices, not by its series: a series that is made while somebody listens is told of
from its first reading on.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from api.live.listener import Listener
from api.readings.series import Selection

# Whatever a selection names narrows it. A device may have stood at a site several times.
_MEMBERS: Final = """
WITH wanted AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::int[])
        WITH ORDINALITY AS w (device_id, site_id, group_id, series_id, item)
)
SELECT w.item, c.device_id, c.metric, c.label, stay.valid_from, stay.valid_until
FROM wanted w
CROSS JOIN LATERAL (
    SELECT d.device_id, NULL::text AS metric, NULL::text AS label FROM devices d
    WHERE w.series_id IS NULL AND d.device_id = w.device_id
    UNION ALL
    SELECT m.device_id, NULL, NULL FROM device_group_members m
    WHERE w.series_id IS NULL AND w.device_id IS NULL AND m.group_id = w.group_id
    UNION ALL
    SELECT DISTINCT h.device_id, NULL, NULL FROM device_sites h
    WHERE w.series_id IS NULL AND w.device_id IS NULL AND w.group_id IS NULL AND h.site_id = w.site_id
    UNION ALL
    SELECT s.device_id, s.metric, s.label FROM series s WHERE s.series_id = w.series_id
) c
LEFT JOIN LATERAL (
    SELECT h.valid_from, (SELECT min(n.valid_from) FROM device_sites n
                          WHERE n.device_id = h.device_id AND n.valid_from > h.valid_from) AS valid_until
    FROM device_sites h WHERE h.site_id = w.site_id AND h.device_id = c.device_id
) stay ON w.site_id IS NOT NULL
WHERE (w.device_id IS NULL OR c.device_id = w.device_id)
  AND (w.group_id IS NULL OR EXISTS (
        SELECT FROM device_group_members m WHERE m.group_id = w.group_id AND m.device_id = c.device_id))
  AND (w.site_id IS NULL OR stay.valid_from IS NOT NULL)
ORDER BY w.item LIMIT $5
"""
# A selection names nothing that is not there: what was deleted meanwhile is somebody's no more.
_GONE: Final = """
SELECT w.item
FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::int[])
    WITH ORDINALITY AS w (device_id, site_id, group_id, series_id, item)
WHERE (w.device_id IS NOT NULL AND NOT EXISTS (SELECT FROM devices d WHERE d.device_id = w.device_id))
   OR (w.site_id IS NOT NULL AND NOT EXISTS (SELECT FROM sites s WHERE s.site_id = w.site_id))
   OR (w.group_id IS NOT NULL AND NOT EXISTS (SELECT FROM device_groups g WHERE g.group_id = w.group_id))
   OR (w.series_id IS NOT NULL AND NOT EXISTS (SELECT FROM series s WHERE s.series_id = w.series_id))
"""
_ALWAYS: Final = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)

Stays = tuple[tuple[datetime, datetime], ...]
"""Spans `[from, until)` in which what a device reads is meant."""


class Members(NamedTuple):
    """What a selection means: devices (their 16 bytes), and of them which metric and label, unless all."""

    devices: Mapping[bytes, Stays]
    metric: str | None = None
    label: str | None = None


class Watch:
    """A selection of an organisation, and who listens to it."""

    def __init__(self, organisation: UUID, wanted: Selection, members: Members) -> None:
        self.organisation = organisation
        self.wanted = wanted
        self.members = members
        self.listeners: set[Listener] = set()

    def takes(self, metric: str, label: str) -> bool:
        """Whether it is about such a series of one of its devices."""
        members = self.members
        return members.metric in (None, metric) and members.label in (None, label)

    def stays(self, device: bytes) -> Stays:
        return self.members.devices.get(device, ())


class Watches:
    """Every watch of a process, and by device those that it is in."""

    def __init__(self) -> None:
        self._watches: dict[tuple[UUID, Selection], Watch] = {}
        self.by_device: dict[bytes, set[Watch]] = {}
        self.watched = 0
        """Devices of all watches together."""

    def __iter__(self) -> Any:
        return iter(list(self._watches.values()))

    def enter(self, organisation: UUID, wanted: Selection, members: Members) -> Watch:
        """The watch of this selection, as it stands now; it stays while somebody listens."""
        key = organisation, wanted
        watch = self._watches.get(key)
        if watch is None:
            watch = self._watches[key] = Watch(organisation, wanted, members._replace(devices={}))
        self.change(watch, members)
        return watch

    def leave(self, listener: Listener) -> None:
        watch = listener.watch
        watch.listeners.discard(listener)
        if not watch.listeners and self._watches.pop((watch.organisation, watch.wanted), None) is not None:
            self.change(watch, watch.members._replace(devices={}))

    def change(self, watch: Watch, members: Members) -> None:
        """From now on the watch means these devices."""
        before, after = watch.members.devices.keys(), members.devices.keys()
        for device in before - after:
            others = self.by_device[device]
            others.discard(watch)
            if not others:
                del self.by_device[device]
        for device in after - before:
            self.by_device.setdefault(device, set()).add(watch)
        self.watched += len(after) - len(before)
        watch.members = members


async def resolve(connection: Any, wanted: Sequence[Selection], devices_max: int) -> list[Members | None]:
    """What each selection means to the organisation that the transaction acts for; None where a thing is gone.

    At most about `devices_max` devices are looked up for each.
    """
    columns = [list(column) for column in zip(*(one[:4] for one in wanted), strict=True)]
    gone = {row["item"] for row in await connection.fetch(_GONE, *columns)}
    found: list[dict[bytes, Stays]] = [{} for _ in wanted]
    names: dict[int, tuple[str, str]] = {}
    for row in await connection.fetch(_MEMBERS, *columns, devices_max * len(wanted) + 1):
        devices, device = found[row["item"] - 1], row["device_id"].bytes
        stays = _stay(row)
        devices[device] = (*devices.get(device, ()), stays)
        if row["metric"] is not None:
            names[row["item"]] = row["metric"], row["label"]
    return [
        None if item in gone else _narrowed(one, found[item - 1], names.get(item))
        for item, one in enumerate(wanted, 1)
    ]


def _stay(row: Any) -> tuple[datetime, datetime]:
    start, end = row["valid_from"], row["valid_until"]
    return _aware(start or _ALWAYS[0]), _aware(end or _ALWAYS[1])


def _aware(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _narrowed(wanted: Selection, devices: Mapping[bytes, Stays], name: tuple[str, str] | None) -> Members:
    """A series by its id has one name; where another is asked for as well, nothing is meant."""
    if name is None:
        return Members(devices, wanted.metric, wanted.label)
    fits = wanted.metric in (None, name[0]) and wanted.label in (None, name[1])
    return Members(devices if fits else {}, *name)


def organisations_of(watches: Collection[Watch]) -> dict[UUID, list[Watch]]:
    found: dict[UUID, list[Watch]] = {}
    for watch in watches:
        found.setdefault(watch.organisation, []).append(watch)
    return found
