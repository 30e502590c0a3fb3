"""The registry, as far as the pipeline needs it: organisations, sites, devices, and their credentials.

Every write acts for one organisation, under row-level security. Left out: routes (another issue), and reading it.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from runtime.ids import uuid7
from runtime.secrets import API_KEY_PREFIX, DEVICE_PREFIX, GATEWAY_PREFIX, TokenHasher, make_token

ROLE: Final = "sluice_app"


@asynccontextmanager
async def acting_for(connection: Any, organisation: UUID) -> AsyncIterator[None]:
    """A transaction that sees and changes what `organisation` owns, and nothing else."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL ROLE {ROLE}")
        await connection.execute("SELECT set_config('sluice.organisation', $1, true)", str(organisation))
        yield


async def add_organisation(connection: Any, organisation: UUID, name: str) -> None:
    await connection.execute("INSERT INTO organisations (organisation_id, name) VALUES ($1, $2)", organisation, name)


async def add_site(connection: Any, organisation: UUID, name: str) -> UUID:
    site = uuid7()
    await connection.execute(
        "INSERT INTO sites (site_id, organisation_id, name) VALUES ($1, $2, $3)", site, organisation, name
    )
    return site


async def add_device(connection: Any, organisation: UUID, site: UUID | None, name: str, local_id: str) -> UUID:
    """A device, standing at `site` from now on."""
    device = uuid7()
    await connection.execute(
        "INSERT INTO devices (device_id, organisation_id, name, local_id) VALUES ($1, $2, $3, $4)",
        device,
        organisation,
        name,
        local_id,
    )
    await connection.execute(
        "INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from) VALUES ($1, $2, $3, now())",
        device,
        organisation,
        site,
    )
    return device


class Credentials:
    """Makes tokens; what is returned is shown once, the database keeps a hash."""

    def __init__(self, connection: Any, hasher: TokenHasher) -> None:
        self._connection = connection
        self._hasher = hasher

    async def add_device_token(
        self, organisation: UUID, device: UUID, *, name: str = "", expires_at: datetime | None = None
    ) -> str:
        return await self._add(DEVICE_PREFIX, "device", organisation, device=device, name=name, expires_at=expires_at)

    async def add_gateway_token(
        self, organisation: UUID, site: UUID, *, name: str = "", expires_at: datetime | None = None
    ) -> str:
        return await self._add(GATEWAY_PREFIX, "gateway", organisation, site=site, name=name, expires_at=expires_at)

    async def add_api_key(
        self, organisation: UUID, scopes: Sequence[str], *, name: str = "", expires_at: datetime | None = None
    ) -> str:
        return await self._add(
            API_KEY_PREFIX, "api_key", organisation, scopes=scopes, name=name, expires_at=expires_at
        )

    async def revoke_named(self, name: str) -> None:
        """Revoke every credential of the organisation that has this name."""
        await self._connection.execute(
            "UPDATE credentials SET revoked_at = now() WHERE name = $1 AND revoked_at IS NULL", name
        )

    async def _add(
        self,
        prefix: str,
        kind: str,
        organisation: UUID,
        *,
        device: UUID | None = None,
        site: UUID | None = None,
        scopes: Sequence[str] = (),
        name: str,
        expires_at: datetime | None,
    ) -> str:
        token = make_token(prefix)
        await self._connection.execute(
            "INSERT INTO credentials (credential_id, organisation_id, kind, device_id, site_id, token_hash, name,"
            " scopes, expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            uuid7(),
            organisation,
            kind,
            device,
            site,
            self._hasher.digest(token),
            name,
            list(scopes),
            expires_at,
        )
        return token


async def set_limits(
    connection: Any,
    organisation: UUID,
    values: Mapping[str, int | None],
    *,
    device: UUID | None = None,
    site: UUID | None = None,
) -> dict[str, int | None]:
    """Override limits of a device, of a site's gateways, or of the organisation itself; what is not named stays.

    `values` by name: None is what the settings say, 0 no limit. Returns all of them, as they are now.
    """
    subject = device or site or organisation
    row = await connection.fetchrow(_LIMITS_OF, subject)
    limits: dict[str, int | None] = dict.fromkeys(LIMITS) if row is None else dict(row)
    if not values:
        return limits
    limits |= values
    if any(value is not None for value in limits.values()):
        await connection.execute(_SET_LIMITS, organisation, device, site, *limits.values())
    elif row is not None:
        await connection.execute("DELETE FROM limit_overrides WHERE subject_id = $1", subject)
    return limits


LIMITS: Final = ("requests_per_minute", "readings_per_minute", "bytes_per_day")
_LIMITS_OF: Final = """
SELECT requests_per_minute, readings_per_minute, bytes_per_day FROM limit_overrides
WHERE subject_id = $1 FOR UPDATE
"""
_SET_LIMITS: Final = """
INSERT INTO limit_overrides
    (organisation_id, device_id, site_id, requests_per_minute, readings_per_minute, bytes_per_day)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (subject_id) DO UPDATE SET requests_per_minute = EXCLUDED.requests_per_minute,
    readings_per_minute = EXCLUDED.readings_per_minute, bytes_per_day = EXCLUDED.bytes_per_day, changed_at = now()
"""
