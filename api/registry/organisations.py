"""Organisations, and acting for one."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import UUID

from api.http.problems import FORBIDDEN, NOT_FOUND, Problem
from api.problems import ORGANISATION_LIMIT
from api.registry import audit
from api.registry.versions import check_version
from runtime.ids import uuid7

ROLE: Final = "sluice_app"
#: That one person owns: whoever may log in may make them.
OWNED_MAX: Final = 20

_COLUMNS: Final = (
    "o.organisation_id, o.name, o.raw_retention_days, o.rollups_5m_days, o.rollups_1h_days, o.rollups_1d_days, "
    "o.series_max, o.version, o.created_at, o.updated_at"
)
# While no organisation is chosen, row-level security leaves those that the user is in; a super-admin, all.
_MINE: Final = f"""
SELECT {_COLUMNS}, m.role FROM organisations o
LEFT JOIN memberships m ON m.organisation_id = o.organisation_id AND m.user_id = $1
WHERE o.organisation_id > $2 ORDER BY o.organisation_id LIMIT $3
"""  # noqa: S608
_ONE: Final = f"SELECT {_COLUMNS} FROM organisations o WHERE o.organisation_id = $1"  # noqa: S608
_LOCK: Final = "SELECT version FROM organisations WHERE organisation_id = $1 FOR NO KEY UPDATE"
#: What a change may name.
_CHANGEABLE: Final = ("name", "raw_retention_days", "rollups_5m_days", "rollups_1h_days", "rollups_1d_days")
_CHANGE: Final = """
UPDATE organisations SET {columns}, version = version + 1, updated_at = now() WHERE organisation_id = $1
"""
_OWNED: Final = "SELECT count(*) FROM memberships WHERE user_id = $1 AND role = 'owner'"
_HOLD_USER: Final = "SELECT user_id FROM users WHERE user_id = $1 FOR NO KEY UPDATE"


@asynccontextmanager
async def acting_for(connection: Any, organisation: UUID) -> AsyncIterator[None]:
    """A transaction that sees and changes what `organisation` owns, and nothing else."""
    async with connection.transaction():
        await connection.execute(f"SET LOCAL ROLE {ROLE}")
        await connection.execute("SELECT set_config('sluice.organisation', $1, true)", str(organisation))
        yield


async def add_organisation(connection: Any, organisation: UUID, name: str) -> None:
    """In a transaction that acts for it. Each begins with an entry in the log: `deploy.auditing` looks for it."""
    await connection.execute("INSERT INTO organisations (organisation_id, name) VALUES ($1, $2)", organisation, name)
    await audit.record(connection, "organisation.created", organisation, name=name)


async def create(connection: Any, user: UUID, name: str) -> Any:
    """An organisation owned by the user, for whom alone the transaction acts until then.

    Raises the problem of too many.
    """
    await connection.fetchrow(_HOLD_USER, user)
    if await connection.fetchval(_OWNED, user) >= OWNED_MAX:
        raise Problem(ORGANISATION_LIMIT, f"a person owns up to {OWNED_MAX} organisations")
    organisation = uuid7()
    await connection.execute("SELECT set_config('sluice.organisation', $1, true)", str(organisation))
    await add_organisation(connection, organisation, name)
    await connection.execute(
        "INSERT INTO memberships (organisation_id, user_id, role) VALUES ($1, $2, 'owner')", organisation, user
    )
    return await get(connection, organisation)


async def mine(connection: Any, user: UUID, after: UUID, limit: int) -> list[Any]:
    """Those of a user, for whom alone the transaction acts, in the order in which they were made."""
    rows: list[Any] = await connection.fetch(_MINE, user, after, limit)
    return rows


async def get(connection: Any, organisation: UUID) -> Any:
    """Raises the problem of one that is not there."""
    row = await connection.fetchrow(_ONE, organisation)
    if row is None:
        raise Problem(NOT_FOUND, "no such organisation")
    return row


async def lock(connection: Any, organisation: UUID) -> int:
    """Its version; until the transaction ends nobody else changes it, its members or its invitations."""
    version: int | None = await connection.fetchval(_LOCK, organisation)
    if version is None:
        raise Problem(NOT_FOUND, "no such organisation")
    return version


async def change(
    connection: Any,
    organisation: UUID,
    expected: Sequence[str] | None,
    changes: Mapping[str, str | int | None],
    *,
    is_owner: bool,
) -> Any:
    """Raises the problems of a version that is not the one expected, and of what only owners change.

    What is kept for less long is gone for good: all but the name are an owner's matter.
    """
    check_version(await lock(connection, organisation), expected)
    if not is_owner and changes.keys() - {"name"}:
        raise Problem(FORBIDDEN, "only an owner changes how long readings are kept")
    names = [name for name in _CHANGEABLE if name in changes]
    if names:
        columns = ", ".join(f"{name} = ${number}" for number, name in enumerate(names, 2))
        await connection.execute(_CHANGE.format(columns=columns), organisation, *(changes[name] for name in names))
        await audit.record(connection, "organisation.updated", organisation, **changes)
    return await get(connection, organisation)
