"""Logins of the database for dashboards: each sees one organisation, which its name decides, and nothing else.

Left out: what they see (the views of `schemas/sql`), and the dashboards (`deploy/grafana`).
"""

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import asyncpg

from api.registry.organisations import acting_for
from runtime.errors import ConfigurationError

#: Of one login at once. Nothing else bounds what it costs: a session may lift its other limits itself.
CONNECTIONS_MAX: Final = 10
STATEMENT_TIMEOUT_MS: Final = 30_000
IDLE_TIMEOUT_MS: Final = 60_000

_PREFIX: Final = "sluice_dashboard_"
_GROUP: Final = "sluice_dashboard"
_SALT_BYTES: Final = 16
_ITERATIONS: Final = 4_096
_EXISTS: Final = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)"
_ORGANISATION: Final = "SELECT EXISTS (SELECT FROM organisations WHERE organisation_id = $1)"
#: What is set here a session can change, but for the number of connections: for dashboards that mean no harm.
_DEFAULTS: Final = {
    "search_path": "dashboards",
    "default_transaction_read_only": "on",
    "statement_timeout": str(STATEMENT_TIMEOUT_MS),
    "idle_in_transaction_session_timeout": str(IDLE_TIMEOUT_MS),
    "TimeZone": "UTC",
}


@dataclass(frozen=True)
class DashboardUser:
    """A login and its password, which is kept nowhere."""

    user: str
    password: str
    database: str


def login_of(organisation: UUID) -> str:
    return f"{_PREFIX}{organisation.hex}"


async def create(login: Any, owner: Any, organisation: UUID) -> DashboardUser:
    """The organisation's login with a new password, made if there is none; sessions under an old one go on.

    `login` is a session of ours without a role, `owner` one of the owner. Raises `ConfigurationError`.
    """
    async with acting_for(login, organisation):
        if not await login.fetchval(_ORGANISATION, organisation):
            raise ConfigurationError(f"there is no organisation {organisation}")
    user, password = login_of(organisation), secrets.token_urlsafe(32)
    try:
        async with owner.transaction():
            await _make(owner, user, password)
    except (asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedObjectError) as error:
        raise ConfigurationError(
            f"the owner of the tables may not make logins: {error}: run deploy/sql/bootstrap.sql again, as superuser"
        ) from error
    return DashboardUser(user, password, await owner.fetchval("SELECT current_database()"))


async def _make(owner: Any, user: str, password: str) -> None:
    exists = await owner.fetchval(_EXISTS, user)
    # The server is sent what it would keep, so that no log of statements holds the password.
    await owner.execute(
        f"{'ALTER' if exists else 'CREATE'} ROLE {user} LOGIN CONNECTION LIMIT {CONNECTIONS_MAX}"
        f" PASSWORD '{verifier(password)}'"
    )
    await owner.execute(f"GRANT {_GROUP} TO {user} WITH ADMIN FALSE, INHERIT TRUE, SET FALSE")
    for name, value in _DEFAULTS.items():
        await owner.execute(f"ALTER ROLE {user} SET {name} = '{value}'")


async def drop(owner: Any, organisation: UUID) -> bool:
    """Whether there was a login to end. Its sessions see nothing from then on."""
    user = login_of(organisation)
    if not await owner.fetchval(_EXISTS, user):
        return False
    await owner.execute(f"DROP ROLE {user}")
    return True


def verifier(password: str) -> str:
    """What PostgreSQL keeps of an ASCII password (RFC 5802, SCRAM-SHA-256)."""
    salt = secrets.token_bytes(_SALT_BYTES)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _ITERATIONS)
    stored = hashlib.sha256(_mac(salted, b"Client Key")).digest()
    told = (base64.b64encode(part).decode() for part in (salt, stored, _mac(salted, b"Server Key")))
    return "SCRAM-SHA-256${}:{}${}:{}".format(_ITERATIONS, *told)


def _mac(key: bytes, text: bytes) -> bytes:
    return hmac.digest(key, text, "sha256")
