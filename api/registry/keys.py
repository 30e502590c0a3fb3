"""API keys: made within the rights of who makes them, shown once, revoked at once."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from api.access.scopes import OWNER
from api.http.operations import Caller, Role
from api.http.problems import FORBIDDEN, Problem, invalid
from api.problems import KEY_LIMIT, KEY_NOT_FOUND
from api.registry import audit
from api.registry.credentials import Credentials
from api.registry.organisations import lock
from runtime.ids import uuid7

#: That have not ended, of one organisation.
KEYS_MAX: Final = 500

_COLUMNS: Final = "credential_id, name, scopes, created_at, created_by, expires_at, last_used_at, revoked_at"
_LISTED: Final = f"""
SELECT {_COLUMNS} FROM credentials
WHERE organisation_id = $1 AND kind = 'api_key' AND credential_id > $2
ORDER BY credential_id LIMIT $3
"""  # noqa: S608
_ONE: Final = f"SELECT {_COLUMNS} FROM credentials WHERE credential_id = $1 AND kind = 'api_key'"  # noqa: S608
_LIVING: Final = """
SELECT count(*) FROM credentials WHERE organisation_id = $1 AND kind = 'api_key' AND revoked_at IS NULL
    AND (expires_at IS NULL OR expires_at > now())
"""
_REVOKE: Final = """
UPDATE credentials SET revoked_at = now() WHERE credential_id = $1 AND kind = 'api_key' AND revoked_at IS NULL
RETURNING name, scopes
"""


class NewKey(NamedTuple):
    """What a key is made for."""

    name: str
    scopes: Sequence[str]
    expires_at: datetime | None


class Made(NamedTuple):
    """A key, and its token, which is told once."""

    row: Any
    token: str


async def keys(connection: Any, organisation: UUID, after: UUID, limit: int) -> list[Any]:
    """In the order in which they were made, those that have ended too."""
    rows: list[Any] = await connection.fetch(_LISTED, organisation, after, limit)
    return rows


async def make(connection: Any, credentials: Credentials, caller: Caller, organisation: UUID, new: NewKey) -> Made:
    """Raises the problems of rights that the caller lacks, of a time that is past, and of too many keys."""
    await lock(connection, organisation)
    await _check_rights(connection, caller, new)
    if await connection.fetchval(_LIVING, organisation) >= KEYS_MAX:
        raise Problem(KEY_LIMIT, f"an organisation has up to {KEYS_MAX} API keys: revoke some first")
    credential = uuid7()
    scopes = sorted(set(new.scopes))
    token = await credentials.add_api_key(
        organisation, scopes, name=new.name, expires_at=new.expires_at, credential=credential, created_by=caller.user
    )
    await audit.record(connection, "key.created", credential, name=new.name, scopes=scopes, expires_at=new.expires_at)
    return Made(await connection.fetchrow(_ONE, credential), token)


async def _check_rights(connection: Any, caller: Caller, new: NewKey) -> None:
    if new.expires_at is not None and new.expires_at <= datetime.now(UTC):
        raise invalid("expires_at", "is past")
    if OWNER in new.scopes and caller.role is not Role.OWNER:
        raise Problem(FORBIDDEN, "only an owner makes a key with the scope owner")
    if caller.credential is None:
        return
    own = await connection.fetchrow(_ONE, caller.credential)
    missing = set(new.scopes) - set(own["scopes"])
    if missing and OWNER not in own["scopes"]:
        raise Problem(
            FORBIDDEN, f"the API key makes others with its own scopes only, not {', '.join(sorted(missing))}"
        )
    if own["expires_at"] is not None and (new.expires_at is None or new.expires_at > own["expires_at"]):
        raise Problem(FORBIDDEN, "the API key makes others that end when it ends, or before")


async def revoke(connection: Any, caller: Caller, credential: UUID) -> None:
    """From the next request on it is refused. Raises the problems of one that is not there, and of an owner's."""
    row = await connection.fetchrow(_REVOKE, credential)
    if row is None:
        raise Problem(KEY_NOT_FOUND)
    if OWNER in row["scopes"] and caller.role is not Role.OWNER:
        raise Problem(FORBIDDEN, "only an owner revokes a key with the scope owner")
    await audit.record(connection, "key.revoked", credential, name=row["name"])
