"""Sites: places at which devices stand, each with a name, an address of its own, a time zone and a location.

What is to be erased is not there any more (row-level security); erasing it is the workers' business. Left out: a
site's server and edge devices (`api.registry.gateways`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

from api.http.problems import Problem, invalid
from api.problems import SITE_NOT_FOUND, SLUG_TAKEN
from api.registry import audit
from api.registry.texts import HOST_CHARACTERS_MAX, SLUG_CHARACTERS_MAX, HostName, Slug
from api.registry.versions import check_version
from runtime.errors import ConfigurationError
from runtime.ids import uuid7

DOMAIN_CHARACTERS_MAX: Final = HOST_CHARACTERS_MAX - SLUG_CHARACTERS_MAX - 1
#: A free address is found at the second try but for one in two thousand million.
_TRIES_MAX: Final = 5
#: Addresses under the suffix that whoever runs the service, or mail and certificates for it, may need.
RESERVED_HOSTS: Final = frozenset(
    {"www", "api", "app", "admin", "auth", "login", "mail", "smtp", "imap", "mx", "ns", "ns1", "ns2", "ftp", "docs",
     "status", "console", "support", "static", "cdn", "mqtt", "broker", "ingest", "autoconfig", "autodiscover",
     "mta-sts", "wpad", "localhost"}
)  # fmt: skip

_INSERT: Final = """
INSERT INTO sites (site_id, organisation_id, name, slug, host, timezone, latitude, longitude, address)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
"""
# A move that has come due counts from that moment on, whenever it is settled.
_SHOWN: Final = """
WITH due AS MATERIALIZED (
    SELECT h.site_id, count(*) AS devices
    FROM devices d CROSS JOIN LATERAL (
        SELECT h.site_id FROM device_sites h WHERE h.device_id = d.device_id AND h.valid_from <= now()
        ORDER BY h.valid_from DESC LIMIT 1) h
    WHERE d.site_until <= now() AND d.status <> 'deleted' GROUP BY h.site_id)
SELECT s.site_id, s.organisation_id, s.name, s.slug, s.host, s.timezone, s.latitude, s.longitude, s.address,
       s.version, s.created_at, s.updated_at, coalesce(v.process_count, 0) AS process_count,
       CASE WHEN v.heard_at IS NULL THEN 'provisioning'
            WHEN v.heard_at > now() - make_interval(secs => $1) THEN 'online' ELSE 'offline' END AS status,
       (SELECT count(*) FROM devices d WHERE d.site_id = s.site_id AND d.status <> 'deleted'
        AND (d.site_until IS NULL OR d.site_until > now()))
       + coalesce((SELECT due.devices FROM due WHERE due.site_id = s.site_id), 0) AS device_count
FROM sites s LEFT JOIN site_servers v ON v.site_id = s.site_id
"""
_ONE: Final = f"{_SHOWN} WHERE s.site_id = $2"
_PAGE: Final = f"{_SHOWN} WHERE s.site_id > $2 ORDER BY s.site_id LIMIT $3"
_LOCK: Final = """
SELECT name, timezone, latitude, longitude, address, version FROM sites WHERE site_id = $1
FOR NO KEY UPDATE
"""
_CHANGE: Final = """
UPDATE sites SET name = $2, timezone = $3, latitude = $4, longitude = $5, address = $6, version = version + 1,
    updated_at = now()
WHERE site_id = $1
"""
_HOLD: Final = "SELECT pg_advisory_xact_lock_shared(sites_lock())"
_ALONE: Final = "SELECT pg_advisory_xact_lock(sites_lock())"
_ERASE: Final = "SELECT begin_site_erasure($1)"
_FIRST: Final = UUID(int=0)


UTC: Final = "UTC"


class Location(NamedTuple):
    """Degrees in WGS 84, both or neither, and the address as a person writes it."""

    latitude: float | None = None
    longitude: float | None = None
    address: str | None = None


NOWHERE: Final = Location()


@dataclass(frozen=True)
class NewSite:
    """What is said of a site when it is made. Without a slug it gets one made from its name."""

    name: str
    slug: str | None = None
    timezone: str = UTC
    location: Location = NOWHERE


def checked_domain(domain: str) -> str:
    """The domain of all sites' addresses. Raises `ConfigurationError` for what is none."""
    if len(domain) > DOMAIN_CHARACTERS_MAX or not HostName.pattern.fullmatch(domain):
        raise ConfigurationError(
            f"SLUICE_SITE_DOMAIN is no domain of up to {DOMAIN_CHARACTERS_MAX} characters: "
            "labels of letters, digits and hyphens with dots between"
        )
    return domain.lower()


# ---------------------------------------------------------------- looking


async def find(connection: Any, silence_s: int, limit: int, after: UUID | None = None) -> Sequence[Any]:
    """The next `limit` sites after `after`, in the order in which they were made."""
    rows: list[Any] = await connection.fetch(_PAGE, silence_s, after or _FIRST, limit)
    return rows


async def get(connection: Any, site: UUID, silence_s: int) -> Any:
    """One site; its server is online while it was heard within `silence_s`. Raises the problem of none."""
    row = await connection.fetchrow(_ONE, silence_s, site)
    if row is None:
        raise Problem(SITE_NOT_FOUND)
    return row


async def lock(connection: Any, site: UUID, versions: Sequence[str] | None = None) -> Any:
    """A site that stays as it is until the transaction ends.

    Raises the problem of none, and of one whose version is not among `versions`.
    """
    row = await connection.fetchrow(_LOCK, site)
    if row is None:
        raise Problem(SITE_NOT_FOUND)
    check_version(row["version"], versions)
    return row


async def hold(connection: Any) -> None:
    """None of the organisation's sites begins to be erased until the transaction ends.

    For whoever lets devices stand at sites: before any device or site is locked.
    """
    await connection.execute(_HOLD)


# ---------------------------------------------------------------- changing


async def add_site(connection: Any, organisation: UUID, name: str) -> UUID:
    """A site of which nothing but its name is known."""
    return await create(connection, organisation, NewSite(name))


async def create(connection: Any, organisation: UUID, new: NewSite) -> UUID:
    """A site with an address that nobody has. Raises the problem of a slug that the organisation has already.

    The indexes decide, not a look before: of two that come at once, one gets the slug. Whose the address is that
    another organisation has, nobody is told.
    """
    _check_location(new.location)
    site = uuid7()
    slug = Slug(new.slug) if new.slug is not None else Slug.of(new.name)
    host = slug.ended() if slug.value in RESERVED_HOSTS else slug
    for _ in range(_TRIES_MAX):
        try:
            async with connection.transaction():
                await connection.execute(
                    _INSERT, site, organisation, new.name, slug.value, host.value, new.timezone, *new.location
                )
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name == "sites_host":
                host = slug.ended()
            elif new.slug is not None:
                raise _taken(new.slug) from None
            else:
                host = slug = slug.ended()
        else:
            await audit.record(connection, "site.created", site, name=new.name, slug=slug.value)
            return site
    raise _taken(slug.value)


def _taken(slug: str) -> Problem:
    return Problem(SLUG_TAKEN, f"slug: {slug} is another site of the organisation, or one that is being erased")


async def change(connection: Any, site: UUID, changes: Mapping[str, Any], versions: Sequence[str] | None) -> None:
    """Change what `changes` names: name, timezone, latitude, longitude, address. The same again is no change.

    Raises the problems of `lock`, and of one coordinate without the other.
    """
    row = await lock(connection, site, versions)
    before = {name: row[name] for name in ("name", "timezone", *Location._fields)}
    after = {**before, **changes}
    _check_location(Location(*(after[name] for name in Location._fields)))
    if after != before:
        await connection.execute(_CHANGE, site, *after.values())
        await audit.record(connection, "site.updated", site, **changes)


async def begin_erasure(connection: Any, site: UUID, versions: Sequence[str] | None = None) -> None:
    """From the end of the transaction on it is not there, no token of its gateways is good, and the devices that
    stand there for good are removed.

    Raises the problems of `lock`.
    """
    await connection.execute(_ALONE)
    await lock(connection, site, versions)
    await connection.execute(_ERASE, site)
    await audit.record(connection, "site.deleted", site)


def check_coordinates(latitude: float | None, longitude: float | None) -> None:
    """Raises the problem of one without the other, which it names."""
    if (latitude is None) != (longitude is None):
        missing = "latitude" if latitude is None else "longitude"
        raise invalid(missing, "is missing: a place has both coordinates or neither")


def _check_location(location: Location) -> None:
    try:
        check_coordinates(location.latitude, location.longitude)
    except Problem as problem:
        (one,) = problem.details
        raise invalid(f"location.{one.field}", one.message) from None
