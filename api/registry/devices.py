"""Devices: what they are, where they stand and stood, their tokens.

A device's name at its site (`local_id`) is its alone there, at every moment of every stay. Whoever gives out names or
stays locks the device first, then the sites in the order of their ids: of two who want one name, one gets it.
Left out: what is heard of a device (`workers.presence`).
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple
from uuid import UUID

from api.http.problems import Problem, invalid
from api.problems import DEVICE_NOT_FOUND, LOCAL_ID_TAKEN, MOVE_LIMIT, SITE_NOT_FOUND, UNKNOWN_MODEL
from api.registry import audit, sites
from api.registry.credentials import Credentials
from api.registry.versions import check_version
from runtime.ids import uuid7
from schemas.models import MODELS, models_like

FIRST: Final = UUID(int=0)
#: What is asked about a site's readings goes through the whole history of each device that stood there.
STAYS_MAX: Final = 1_000
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

#: As kept with the device, unless a move has come due that nobody settled yet.
_STANDS_AT: Final = """
CASE WHEN d.site_until <= now()
     THEN (SELECT h.site_id FROM device_sites h WHERE h.device_id = d.device_id AND h.valid_from <= now()
           ORDER BY h.valid_from DESC LIMIT 1)
     ELSE d.site_id END"""
IS_HEARD: Final = "(d.online AND silent_after(d.last_seen_at, d.cadence_s) > now())"
# A site that is being erased is seen by nobody.
_LISTED: Final = f"""
d.device_id, (SELECT s.site_id FROM sites s WHERE s.site_id = {_STANDS_AT}) AS site_id,
d.local_id, d.name, d.model, d.fw_version, d.last_seen_at,
coalesce({IS_HEARD}, false) AS online"""  # noqa: S608
_WHOLE: Final = f"""{_LISTED}, d.notes, d.created_at, d.updated_at, d.version, now() AS moment,
CASE WHEN d.online AND NOT {IS_HEARD} THEN silent_after(d.last_seen_at, d.cadence_s)
     ELSE d.online_changed_at END AS online_changed_at"""

_ONE: Final = f"SELECT {_WHOLE} FROM devices d WHERE d.device_id = $1 AND d.status <> 'deleted'"  # noqa: S608
_REPORTS: Final = "SELECT kind, report::text AS report, reported_at FROM device_reports WHERE device_id = $1"
_LOCK: Final = """
SELECT device_id, local_id, version FROM devices WHERE device_id = $1 AND status <> 'deleted' FOR NO KEY UPDATE
"""
_LOCK_SITES: Final = "SELECT site_id FROM sites WHERE site_id = ANY ($1) ORDER BY site_id FOR NO KEY UPDATE"
_IS_SITE: Final = "SELECT EXISTS (SELECT FROM sites WHERE site_id = $1)"
_INSERT: Final = """
INSERT INTO devices (device_id, organisation_id, name, local_id, model, notes) VALUES ($1, $2, $3, $4, $5, $6)
"""
# Whether a name is another device's at a site at any time of [$4, $5).
_TAKEN: Final = """
SELECT EXISTS (
    SELECT FROM device_sites h JOIN devices d ON d.device_id = h.device_id
    WHERE h.site_id = $1 AND h.local_id = $2 AND h.device_id <> $3 AND d.status <> 'deleted'
      AND h.valid_from < coalesce($5::timestamptz, 'infinity')
      AND NOT EXISTS (SELECT FROM device_sites n WHERE n.device_id = h.device_id AND n.valid_from > h.valid_from
                      AND n.valid_from <= coalesce($4::timestamptz, now())))
"""
# The first begins with time; nobody asks what was before 1970.
_STAYS: Final = """
SELECT h.site_id, greatest(h.valid_from, 'epoch') AS valid_from,
       lead(h.valid_from) OVER (ORDER BY h.valid_from) AS valid_until
FROM device_sites h WHERE h.device_id = $1 ORDER BY h.valid_from
"""
_CUT: Final = "DELETE FROM device_sites WHERE device_id = $1 AND valid_from >= coalesce($2::timestamptz, now())"
_STAYS_NUMBER: Final = "SELECT count(*) FROM device_sites WHERE device_id = $1"
_STAND_FIRST: Final = """
INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from) VALUES ($1, $2, $3, '-infinity')
"""
_STAND: Final = """
INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from)
SELECT d.device_id, d.organisation_id, $2::uuid, coalesce($3::timestamptz, now()) FROM devices d
WHERE d.device_id = $1 AND NOT EXISTS (
    SELECT FROM (SELECT site_id FROM device_sites WHERE device_id = $1 ORDER BY valid_from DESC LIMIT 1) last
    WHERE last.site_id IS NOT DISTINCT FROM $2::uuid)
"""
# Until a time to come what it measures goes with a site: it could stand elsewhere, but nothing of it would be kept.
_ERASED_UNTIL: Final = """
SELECT max(to_ts) FROM tombstones
WHERE device_id = $1 AND to_ts > now() AND to_ts > coalesce($2::timestamptz, now()) AND to_ts <> 'infinity'
"""
_CHANGE: Final = """
UPDATE devices SET name = coalesce($2, name), local_id = coalesce($3, local_id), notes = coalesce($4, notes),
    version = version + 1, updated_at = now()
WHERE device_id = $1
"""
_MOVED: Final = """
UPDATE devices SET version = version + 1, updated_at = now() WHERE device_id = $1
RETURNING coalesce($2::timestamptz, now())
"""
_REMOVE: Final = """
UPDATE devices SET status = 'deleted', deleted_at = now(), online = false, version = version + 1, updated_at = now()
WHERE device_id = $1
"""
_LEAVE_GROUPS: Final = "DELETE FROM device_group_members WHERE device_id = $1"
REVOKE: Final = "UPDATE credentials SET revoked_at = now() WHERE device_id = $1 AND revoked_at IS NULL"


class Stay(NamedTuple):
    """When a device stood where, `[start, end)`: no site is none, no end is for good."""

    site: UUID | None
    start: datetime
    end: datetime | None


class NewDevice(NamedTuple):
    """What a device is made of."""

    name: str
    local_id: str
    model: str | None = None
    notes: str = ""


# ---------------------------------------------------------------- making and changing


async def add_device(connection: Any, organisation: UUID, site: UUID | None, name: str, local_id: str) -> UUID:
    """A device of no particular model, standing at `site` from now on. Raises what `create` raises."""
    return await create(connection, organisation, site, NewDevice(name, local_id))


async def create(
    connection: Any, organisation: UUID, site: UUID | None, new: NewDevice, device: UUID | None = None
) -> UUID:
    """Its id: `device`, or a new one.

    Raises the problems of an unknown model, of a site that is not there, and of a name that is taken.
    """
    if new.model is not None and new.model not in MODELS:
        raise Problem(UNKNOWN_MODEL, f"there is no model {new.model[:64]}: GET /v1/models lists them")
    device = device or uuid7()
    if site is not None:
        await sites.hold(connection)
        await lock_site(connection, site)
        await _claim(connection, device, new.local_id, site)
    await connection.execute(_INSERT, device, organisation, new.name, new.local_id, new.model, new.notes)
    await connection.execute(_STAND_FIRST, device, organisation, site)
    await audit.record(
        connection, "device.created", device, local_id=new.local_id, name=new.name, model=new.model, site_id=site
    )
    return device


async def change(
    connection: Any, device: UUID, expected: Sequence[str] | None, values: Mapping[str, str | None]
) -> None:
    """Give it another `name`, `local_id` or `notes`; what is not named stays.

    Raises the problems of a device that is not there or was changed meanwhile, and of a name that is taken.
    """
    await sites.hold(connection)
    row = await _lock(connection, device, expected)
    local_id = values.get("local_id")
    if local_id is not None and local_id != row["local_id"]:
        stays = [stay for stay in await site_spans(connection, device) if stay.site is not None]
        await connection.fetch(_LOCK_SITES, [stay.site for stay in stays])
        now = await connection.fetchval("SELECT now()")
        for stay in stays:
            if stay.end is None or stay.end > now:
                await _claim(connection, device, local_id, stay.site, max(stay.start, now), stay.end)
    if values:
        await connection.execute(_CHANGE, device, values.get("name"), local_id, values.get("notes"))
        await audit.record(connection, "device.changed", device, **values)


async def move(
    connection: Any, device: UUID, expected: Sequence[str] | None, site: UUID | None, at: datetime | None
) -> datetime:
    """Let it stand at `site` from `at` on, now by default; this replaces whatever was to follow. Returns from when.

    Raises the problems of a device or site that is not there, of a name that is taken at any time from then on, of a
    time before 1970 or at which what the device measures is still erased, and of too many moves.
    """
    if at is not None and at < EPOCH:
        raise invalid("effective_at", "must not be before 1970-01-01T00:00:00Z")
    await sites.hold(connection)
    row = await _lock(connection, device, expected)
    until = await connection.fetchval(_ERASED_UNTIL, device, at)
    if until is not None:
        raise invalid(
            "effective_at", f"must not be before {until.isoformat()}: until then it stands at a site that is erased"
        )
    if site is not None:
        await lock_site(connection, site)
        await _claim(connection, device, row["local_id"], site, at)
    await connection.execute(_CUT, device, at)
    if await connection.fetchval(_STAYS_NUMBER, device) >= STAYS_MAX:
        raise Problem(MOVE_LIMIT, f"a device stands at up to {STAYS_MAX} places one after the other")
    await connection.execute(_STAND, device, site, at)
    begun: datetime = await connection.fetchval(_MOVED, device, at)
    await audit.record(connection, "device.moved", device, site_id=site, effective_at=begun)
    return begun


async def remove(connection: Any, device: UUID, expected: Sequence[str] | None) -> None:
    """Its tokens end and nobody finds it again; what it measured stays."""
    row = await _lock(connection, device, expected)
    await connection.execute(REVOKE, device)
    await connection.execute(_LEAVE_GROUPS, device)
    await connection.execute(_REMOVE, device)
    await audit.record(connection, "device.deleted", device, local_id=row["local_id"])


async def rotate_token(connection: Any, credentials: Credentials, organisation: UUID, device: UUID) -> str:
    """A new token in place of all that it had. Raises the problem of a device that is not there."""
    await _lock(connection, device, None)
    await connection.execute(REVOKE, device)
    token = await credentials.add_device_token(organisation, device)
    await audit.record(connection, "device.token_rotated", device)
    return token


async def _lock(connection: Any, device: UUID, expected: Sequence[str] | None) -> Any:
    row = await connection.fetchrow(_LOCK, device)
    if row is None:
        raise Problem(DEVICE_NOT_FOUND)
    check_version(row["version"], expected)
    return row


async def lock_site(connection: Any, site: UUID) -> None:
    """Nobody else gives out a name or a stay there meanwhile. Raises the problem of a site that is not there."""
    if not await connection.fetch(_LOCK_SITES, [site]):
        raise Problem(SITE_NOT_FOUND)


async def _claim(
    connection: Any,
    device: UUID,
    local_id: str,
    site: UUID | None,
    start: datetime | None = None,
    end: datetime | None = None,
) -> None:
    """Raises the problem of a name that another device has at `site` at any time of `[start, end)`; now, for good."""
    if await connection.fetchval(_TAKEN, site, local_id, device, start, end):
        raise Problem(LOCAL_ID_TAKEN)


# ---------------------------------------------------------------- looking


async def get(connection: Any, device: UUID) -> Any:
    """Raises the problem of a device that is not there."""
    row = await connection.fetchrow(_ONE, device)
    if row is None:
        raise Problem(DEVICE_NOT_FOUND)
    return row


async def reports(connection: Any, device: UUID) -> list[Any]:
    """What it said of itself last, of each kind."""
    rows: list[Any] = await connection.fetch(_REPORTS, device)
    return rows


async def site_spans(connection: Any, device: UUID) -> list[Stay]:
    """Where it stood, stands and is to stand, in order of time."""
    return [Stay(*row) for row in await connection.fetch(_STAYS, device)]


class Filter(NamedTuple):
    """Which devices: of a site or of the whole organisation; None stands for any."""

    site: UUID | None = None
    online: bool | None = None
    model: str | None = None
    """A part of a model's name."""


async def find(connection: Any, organisation: UUID, wanted: Filter, after: UUID | None, limit: int) -> list[Any]:
    """Up to `limit` devices in the order in which they were made, after that one.

    Raises the problem of a site that is not there.
    """
    if wanted.site is not None and not await connection.fetchval(_IS_SITE, wanted.site):
        raise Problem(SITE_NOT_FOUND)
    models = None if wanted.model is None else models_like(wanted.model)
    if models is not None and not models:
        return []
    sql = page_sql(wanted.site is not None, wanted.online, models is not None)
    arguments = [organisation, after or FIRST, limit]
    arguments += [models] if models is not None else []
    arguments += [wanted.site] if wanted.site is not None else []
    rows: list[Any] = await connection.fetch(sql, *arguments)
    return rows


# Every index that a list may need ends in device_id and holds the columns before it as equal: each branch gives its
# first rows in order, and the page is the first of all of them. The branches for what has come due and is not settled
# yet look into an index of just that. Of devices that fell silent and are not noted yet there are few, unless no
# worker runs: then there are so many that going through the list soon finds a page of them.
_PAGE: Final = """
WITH {silent} page AS MATERIALIZED (
    SELECT device_id FROM ({branches}) found ORDER BY device_id LIMIT $3)
SELECT {listed} FROM page JOIN devices d ON d.device_id = page.device_id ORDER BY d.device_id
"""
_BRANCH: Final = """
(SELECT d.device_id FROM {source} d WHERE d.organisation_id = $1 AND {found} AND d.status <> 'deleted'
 AND d.device_id > $2 ORDER BY d.device_id LIMIT $3)"""
_EACH_MODEL: Final = "(SELECT x.device_id FROM unnest($4::text[]) m(name) CROSS JOIN LATERAL {branch} x)"
_SETTLED: Final = "(d.site_until IS NULL OR d.site_until > now())"
_DUE: Final = "(SELECT * FROM devices WHERE site_until <= now() OFFSET 0)"
_FEW_MAX: Final = 1_000
_SILENT: Final = f"""
silent AS MATERIALIZED (
    SELECT * FROM devices WHERE online AND online_until <= now() ORDER BY online_until LIMIT {_FEW_MAX + 1}),
"""  # noqa: S608
_ARE_FEW: Final = f"(SELECT count(*) <= {_FEW_MAX} FROM silent)"  # noqa: S608
_FELL_SILENT: Final = f"{IS_HEARD} IS NOT TRUE"


@lru_cache
def page_sql(of_site: bool, online: bool | None, of_models: bool) -> str:
    """Of the whole: $1 organisation, $2 the device before, $3 how many, then the models and the site."""
    site = "$5" if of_models else "$4"
    heard = {None: "true", True: IS_HEARD, False: _FELL_SILENT}[online]
    branches: list[str] = []
    for source, state in _states(online, of_models):
        if of_site:
            source_is_due = source != "devices"
            stands = f"{_STANDS_AT} = {site}" if source_is_due else f"d.site_id = {site} AND {_SETTLED}"
            branches.append(_branch(source, f"{state} AND {stands}", of_models))
        else:
            branches.append(_branch(source, state, of_models))
    if of_site:
        branches.append(_branch(_DUE, f"{heard} AND {_STANDS_AT} = {site}", of_models))
    silent = _SILENT if online is False else ""
    return _PAGE.format(silent=silent, branches=" UNION ".join(branches), listed=_LISTED)


def _states(online: bool | None, of_models: bool) -> list[tuple[str, str]]:
    """Tables and conditions that together are all devices in that state."""
    if online:
        return [("devices", IS_HEARD)]
    if online is False:
        many = f"d.online AND {_FELL_SILENT} AND NOT {_ARE_FEW}"
        return [("devices", "NOT d.online"), ("silent", f"{_FELL_SILENT} AND {_ARE_FEW}"), ("devices", many)]
    # The index of models has what is heard before it.
    return [("devices", "d.online"), ("devices", "NOT d.online")] if of_models else [("devices", "true")]


def _branch(source: str, found: str, of_models: bool) -> str:
    if not of_models:
        return _BRANCH.format(source=source, found=found)
    if source == "devices":
        return _EACH_MODEL.format(branch=_BRANCH.format(source=source, found=f"{found} AND d.model = m.name"))
    return _BRANCH.format(source=source, found=f"{found} AND d.model = ANY ($4::text[])")
