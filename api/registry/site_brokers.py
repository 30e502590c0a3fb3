"""How a site's own devices come in over MQTT: the prefix of their topics, and the password that the broker asks for.

The prefix is also the user name, and stays the site's. Left out: the broker (its clients follow the registry), and
what the devices publish (`ingest.mqtt`).
"""

import secrets
from typing import Any, Final
from uuid import UUID

from api.http.problems import Problem
from api.problems import SITE_BROKER_NOT_FOUND, SITE_NOT_FOUND
from api.registry import audit, sites
from api.registry.broker_passwords import Handovers, make_password

_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
_CHARACTERS: Final = 8
#: One in a million million is taken for each that there is.
_TRIES_MAX: Final = 5

_ONE: Final = """
SELECT b.prefix, b.temperature_unit, b.issued_at, b.revoked_at
FROM sites s LEFT JOIN site_brokers b USING (site_id) WHERE s.site_id = $1
"""
_ROTATE: Final = """
UPDATE site_brokers SET password_hash = $2, issued_at = now(), revoked_at = NULL WHERE site_id = $1
"""
_ISSUE: Final = """
INSERT INTO site_brokers (site_id, organisation_id, prefix, password_hash) VALUES ($1, $2, $3, $4)
ON CONFLICT (prefix) DO NOTHING
"""
_CHANGE: Final = "UPDATE site_brokers SET temperature_unit = $2 WHERE site_id = $1"
_REVOKE: Final = "UPDATE site_brokers SET revoked_at = now() WHERE site_id = $1 AND revoked_at IS NULL"


async def get(connection: Any, site: UUID) -> Any:
    """Raises the problems of a site that is not there, and of one that has none."""
    row = await connection.fetchrow(_ONE, site)
    if row is None:
        raise Problem(SITE_NOT_FOUND)
    if row["prefix"] is None:
        raise Problem(SITE_BROKER_NOT_FOUND)
    return row


async def issue(connection: Any, handovers: Handovers, organisation: UUID, site: UUID) -> str:
    """A password, which is shown this once: the site's first, or in place of the former one, which ends.

    Raises the problem of a site that is not there.
    """
    await sites.lock(connection, site)
    password = make_password()
    hashed = await handovers.give_site(connection, organisation, site, password)
    if await connection.execute(_ROTATE, site, hashed) == "UPDATE 0":
        await _give_prefix(connection, organisation, site, hashed)
    await audit.record(connection, "site.mqtt_password_issued", site)
    return password


async def change(connection: Any, site: UUID, temperature_unit: str) -> None:
    """In what its devices mean temperatures that tell no unit. Raises the problem of a site that has no prefix."""
    await sites.lock(connection, site)
    if await connection.execute(_CHANGE, site, temperature_unit) == "UPDATE 0":
        raise Problem(SITE_BROKER_NOT_FOUND)
    await audit.record(connection, "site.mqtt_changed", site, temperature_unit=temperature_unit)


async def revoke(connection: Any, site: UUID) -> None:
    """Nobody publishes for the site any more, until it is given another password.

    Raises the problem of a site that has none.
    """
    await sites.lock(connection, site)
    if await connection.execute(_REVOKE, site) == "UPDATE 0":
        raise Problem(SITE_BROKER_NOT_FOUND)
    await audit.record(connection, "site.mqtt_revoked", site)


async def _give_prefix(connection: Any, organisation: UUID, site: UUID, hashed: str) -> None:
    for _ in range(_TRIES_MAX):
        prefix = "".join(secrets.choice(_ALPHABET) for _ in range(_CHARACTERS))
        if await connection.execute(_ISSUE, site, organisation, prefix, hashed) != "INSERT 0 0":
            return
    raise RuntimeError("no prefix is free")
