"""What an operator does to the registry from the command line: a demo organisation, and credentials.

Left out: everything else about the registry (`api`).
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from api.access.scopes import OWNER
from api.registry import audit
from api.registry.credentials import Credentials
from api.registry.devices import add_device
from api.registry.limits import LIMITS, set_limits
from api.registry.organisations import acting_for, add_organisation
from api.registry.sites import add_site
from api.registry.texts import Name
from deploy.people import parsed
from runtime.errors import ConfigurationError
from runtime.ids import uuid7
from runtime.secrets import TokenHasher

#: Sees every organisation, which the API's role must not: an operator names a device, not its organisation.
LOOKUP_ROLE: Final = "sluice_ingest"
DEMO_NAME: Final = "Demo organisation"
#: The name of the demo's credentials.
SEED: Final = "seed"
SEED_LOCK: Final = 0x736C_7569_6365_0002

_DEMO: Final = """
SELECT o.organisation_id, d.device_id, s.site_id
FROM organisations o JOIN devices d USING (organisation_id) JOIN sites s USING (organisation_id)
WHERE o.name = $1 AND d.local_id = 'demo' AND d.status <> 'deleted' AND s.erasing_since IS NULL
ORDER BY o.created_at, d.created_at, s.created_at LIMIT 1
"""
_OWNERS: Final = {
    "device": "SELECT organisation_id FROM devices WHERE device_id = $1 AND status <> 'deleted'",
    "site": "SELECT organisation_id FROM sites WHERE site_id = $1 AND erasing_since IS NULL",
    "organisation": "SELECT organisation_id FROM organisations WHERE organisation_id = $1",
}


@dataclass(frozen=True)
class Demo:
    """The demo organisation; the tokens are known only to the run that made them."""

    organisation_id: UUID
    site_id: UUID
    device_id: UUID
    ingest_token: str | None = None
    api_key: str | None = None


async def seed(connection: Any, hasher: TokenHasher, *, renew: bool = False) -> Demo:
    """The demo organisation, made if there is none; `renew` replaces tokens that nobody was shown.

    `connection` is a session of the login itself, without a role.
    """
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", SEED_LOCK)
        await connection.execute(f"SET LOCAL ROLE {LOOKUP_ROLE}")
        row = await connection.fetchrow(_DEMO, DEMO_NAME)
        organisation = uuid7() if row is None else row["organisation_id"]
        async with acting_for(connection, organisation):
            if row is None:
                demo = await _make_demo(connection, organisation)
            else:
                demo = Demo(organisation, row["site_id"], row["device_id"])
            if row is None or renew:
                demo = await _make_tokens(connection, hasher, demo)
    return demo


async def _make_demo(connection: Any, organisation: UUID) -> Demo:
    await add_organisation(connection, organisation, DEMO_NAME)
    site = await add_site(connection, organisation, "Demo site")
    device = await add_device(connection, organisation, site, "Demo device", "demo")
    # Who tries things out measures what the machine can do, not a setting.
    unlimited = dict.fromkeys(LIMITS, 0)
    await set_limits(connection, organisation, unlimited)
    await set_limits(connection, organisation, unlimited, device=device)
    return Demo(organisation, site, device)


async def _make_tokens(connection: Any, hasher: TokenHasher, demo: Demo) -> Demo:
    credentials = Credentials(connection, hasher)
    await credentials.revoke_named(SEED)
    ingest_token = await credentials.add_device_token(demo.organisation_id, demo.device_id, name=SEED)
    api_key = await credentials.add_api_key(demo.organisation_id, [OWNER], name=SEED)
    return Demo(demo.organisation_id, demo.site_id, demo.device_id, ingest_token, api_key)


async def issue_token(
    connection: Any,
    hasher: TokenHasher,
    kind: str,
    owner: UUID,
    *,
    name: str,
    scopes: list[str],
    expires_at: datetime | None,
) -> str:
    """A token for an existing device, site (a gateway's) or organisation (an API key). It may have no name."""
    if name:
        name = parsed(Name, "the name", name)
    organisation = await organisation_of(
        connection, {"gateway": "site", "api-key": "organisation"}.get(kind, kind), owner
    )
    async with acting_for(connection, organisation):
        credentials = Credentials(connection, hasher)
        if kind == "device":
            token = await credentials.add_device_token(organisation, owner, name=name, expires_at=expires_at)
        elif kind == "gateway":
            token = await credentials.add_gateway_token(organisation, owner, name=name, expires_at=expires_at)
        else:
            token = await credentials.add_api_key(organisation, scopes, name=name, expires_at=expires_at)
        await audit.record(connection, "token.created", owner, kind=kind, name=name, expires_at=expires_at)
        return token


async def override_limits(
    connection: Any, what: str, owner: UUID, values: dict[str, int | None]
) -> dict[str, int | None]:
    """Change limits of a device, site (its gateways) or organisation; with no `values`, tell them. None: default."""
    organisation = await organisation_of(connection, what, owner)
    device = owner if what == "device" else None
    site = owner if what == "site" else None
    async with acting_for(connection, organisation):
        limits = await set_limits(connection, organisation, values, device=device, site=site)
        if values:
            await audit.record(connection, "limits.changed", owner, of=what, **values)
        return limits


async def organisation_of(connection: Any, what: str, identifier: UUID) -> UUID:
    """Whose a device or site is, or which organisation. Raises `ConfigurationError` for one that is not there."""
    async with connection.transaction(readonly=True):
        await connection.execute(f"SET LOCAL ROLE {LOOKUP_ROLE}")
        organisation: UUID | None = await connection.fetchval(_OWNERS[what], identifier)
    if organisation is None:
        raise ConfigurationError(f"there is no {what} {identifier}")
    return organisation
