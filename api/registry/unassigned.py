"""The tray of a site: names that its devices call themselves by over MQTT, and that no device of it has yet.

What they send is held in quarantine. Claimed, a name becomes a device of its site, or one that is there already, and
what is held is replayed as that device's. Left out: how names get there (`ingest.mqtt.names`), and how long what they
send is held (`workers.quarantine`).
"""

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from api.http.problems import Problem
from api.problems import DEVICE_NOT_FOUND, UNASSIGNED_ELSEWHERE, UNASSIGNED_NOT_FOUND
from api.registry import audit, devices, sites
from api.registry.devices import NewDevice

_FIRST: Final = UUID(int=0)
_SHOWN: Final = """
SELECT u.unassigned_id, u.site_id, u.name, u.format, u.first_seen_at, h.held,
       greatest(u.last_seen_at, h.newest) AS last_seen_at, l.payload AS last_payload
FROM unassigned_devices u
JOIN sites s USING (site_id)
CROSS JOIN LATERAL (
    SELECT count(*) AS held, max(q.received_at) AS newest FROM quarantine q
    WHERE q.device_id = u.unassigned_id AND q.state = 'held' AND q.code = 'unassigned_device') h
LEFT JOIN LATERAL (
    SELECT q.payload FROM quarantine q
    WHERE q.device_id = u.unassigned_id AND q.state = 'held' AND q.code = 'unassigned_device'
    ORDER BY q.received_at DESC, q.quarantine_id DESC LIMIT 1) l ON true
WHERE u.device_id IS NULL
"""
_PAGE: Final = f"""{_SHOWN} AND u.unassigned_id > $1 AND ($2::uuid IS NULL OR u.site_id = $2)
ORDER BY u.unassigned_id LIMIT $3
"""
_ONE: Final = """
SELECT u.unassigned_id, u.site_id, u.name FROM unassigned_devices u JOIN sites s USING (site_id)
WHERE u.unassigned_id = $1 AND u.device_id IS NULL
"""
_CLAIM: Final = "SELECT claim_unassigned($1, $2)"
_STANDS_AT: Final = "SELECT site_id FROM devices WHERE device_id = $1 AND status <> 'deleted'"
_REMOVE: Final = "DELETE FROM unassigned_devices WHERE unassigned_id = $1 AND device_id IS NULL"
_HELD: Final = "SELECT quarantine_id FROM quarantine WHERE device_id = $1 AND state = 'held'"
_DISCARD: Final = "SELECT discard_quarantined($1, $2)"


async def find(connection: Any, site: UUID | None, limit: int, after: UUID | None = None) -> Sequence[Any]:
    """The next `limit` names after `after`, in the order in which they were first heard."""
    rows: list[Any] = await connection.fetch(_PAGE, after or _FIRST, site, limit)
    return rows


async def create(connection: Any, organisation: UUID, unassigned: UUID, name: str | None, model: str | None) -> int:
    """Make a device of a name, with the id that it has in the tray: of how many readings the replay was asked for.

    Raises the problems of a name that is not there, or is taken by now, and of an unknown model.
    """
    await sites.hold(connection)
    row = await _get(connection, unassigned)
    await devices.lock_site(connection, row["site_id"])
    row = await _get(connection, unassigned)  # whoever claimed it at the same time was first
    new = NewDevice(name or row["name"], row["name"], model)
    await devices.create(connection, organisation, row["site_id"], new, unassigned)
    return await _claim(connection, unassigned, unassigned)


async def bind(connection: Any, unassigned: UUID, device: UUID) -> int:
    """Let a device of the same site have the name, and what is held of it.

    Raises the problems of a name or device that is not there, of a device that stands elsewhere, and of a name that
    another device has by now.
    """
    await sites.hold(connection)
    row = await _get(connection, unassigned)
    stands_at = await connection.fetchrow(_STANDS_AT, device)
    if stands_at is None:
        raise Problem(DEVICE_NOT_FOUND)
    if stands_at["site_id"] != row["site_id"]:
        raise Problem(UNASSIGNED_ELSEWHERE)
    await devices.change(connection, device, None, {"local_id": row["name"]})
    return await _claim(connection, unassigned, device)


async def discard(connection: Any, unassigned: UUID, note: str) -> int:
    """Throw away what is held of a name, and forget it until it is heard again: how many readings.

    Raises the problem of a name that is not there.
    """
    row = await _get(connection, unassigned)
    await connection.execute(_REMOVE, unassigned)
    held = [one["quarantine_id"] for one in await connection.fetch(_HELD, unassigned)]
    discarded: int = await connection.fetchval(_DISCARD, held, note)
    await audit.record(connection, "unassigned.discarded", unassigned, name=row["name"], rows=discarded, note=note)
    return discarded


async def _claim(connection: Any, unassigned: UUID, device: UUID) -> int:
    rows: int | None = await connection.fetchval(_CLAIM, unassigned, device)
    if rows is None:
        raise Problem(UNASSIGNED_NOT_FOUND)  # somebody else has just claimed it
    await audit.record(connection, "unassigned.claimed", unassigned, device_id=device, rows=rows)
    return rows


async def _get(connection: Any, unassigned: UUID) -> Any:
    row = await connection.fetchrow(_ONE, unassigned)
    if row is None:
        raise Problem(UNASSIGNED_NOT_FOUND)
    return row
