"""Groups of devices: a name and members. Left out: what is done with all devices of a group."""

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

import asyncpg

from api.http.problems import Problem
from api.problems import DEVICE_NOT_FOUND, GROUP_LIMIT, GROUP_NAME_TAKEN, GROUP_NOT_FOUND
from api.registry import audit
from api.registry.organisations import lock
from api.registry.versions import check_version
from runtime.ids import uuid7

#: Of one organisation: whoever may change it may make them.
GROUPS_MAX: Final = 1_000

_COLUMNS: Final = "group_id, name, description, version, created_at, updated_at"
_LIST: Final = f"SELECT {_COLUMNS} FROM device_groups WHERE group_id > $1 ORDER BY group_id LIMIT $2"  # noqa: S608
_ONE: Final = f"SELECT {_COLUMNS} FROM device_groups WHERE group_id = $1"  # noqa: S608
_LOCK: Final = "SELECT version FROM device_groups WHERE group_id = $1 FOR UPDATE"
_NUMBER: Final = "SELECT count(*) FROM device_groups WHERE organisation_id = $1"
_INSERT: Final = "INSERT INTO device_groups (group_id, organisation_id, name, description) VALUES ($1, $2, $3, $4)"
_RENAME: Final = """
UPDATE device_groups SET name = $2, description = coalesce($3, description), version = version + 1, updated_at = now()
WHERE group_id = $1
"""
_REMOVE: Final = "DELETE FROM device_groups WHERE group_id = $1"
# Locked against being deleted meanwhile.
_DEVICE: Final = "SELECT FROM devices WHERE device_id = $1 AND status <> 'deleted' FOR NO KEY UPDATE"
_JOIN: Final = """
INSERT INTO device_group_members (group_id, device_id, organisation_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING
"""
_LEAVE: Final = "DELETE FROM device_group_members WHERE group_id = $1 AND device_id = $2"
_MEMBERS: Final = """
SELECT device_id FROM device_group_members WHERE group_id = $1 AND device_id > $2 ORDER BY device_id LIMIT $3
"""
FIRST: Final = UUID(int=0)


async def create(connection: Any, organisation: UUID, name: str, description: str = "") -> UUID:
    """Raises the problems of a name that is taken, and of too many."""
    await lock(connection, organisation)
    if await connection.fetchval(_NUMBER, organisation) >= GROUPS_MAX:
        raise Problem(GROUP_LIMIT, f"an organisation has up to {GROUPS_MAX} groups of devices")
    group = uuid7()
    try:
        await connection.execute(_INSERT, group, organisation, name, description)
    except asyncpg.UniqueViolationError:
        raise Problem(GROUP_NAME_TAKEN) from None
    await audit.record(connection, "device_group.created", group, name=name)
    return group


async def find(connection: Any, after: UUID | None, limit: int) -> list[Any]:
    """Up to `limit` groups in the order in which they were made, after that one."""
    rows: list[Any] = await connection.fetch(_LIST, after or FIRST, limit)
    return rows


async def get(connection: Any, group: UUID) -> Any:
    """Raises the problem of a group that is not there."""
    row = await connection.fetchrow(_ONE, group)
    if row is None:
        raise Problem(GROUP_NOT_FOUND)
    return row


async def rename(
    connection: Any, group: UUID, expected: Sequence[str] | None, name: str, description: str | None = None
) -> None:
    """A description of None stays.

    Raises the problems of a group that is not there or was changed meanwhile, and of a name that is taken.
    """
    await _lock(connection, group, expected)
    try:
        await connection.execute(_RENAME, group, name, description)
    except asyncpg.UniqueViolationError:
        raise Problem(GROUP_NAME_TAKEN) from None
    await audit.record(connection, "device_group.renamed", group, name=name)


async def remove(connection: Any, group: UUID, expected: Sequence[str] | None) -> None:
    """The group, not its devices. Raises the problems of one that is not there or was changed meanwhile."""
    await _lock(connection, group, expected)
    await connection.execute(_REMOVE, group)
    await audit.record(connection, "device_group.deleted", group)


async def members(connection: Any, group: UUID, after: UUID | None, limit: int) -> list[UUID]:
    """Up to `limit` devices of a group by id, after that one. Raises the problem of a group that is not there."""
    await get(connection, group)
    return [row["device_id"] for row in await connection.fetch(_MEMBERS, group, after or FIRST, limit)]


async def join(connection: Any, organisation: UUID, group: UUID, device: UUID) -> None:
    """May be repeated. Raises the problems of a group or a device that is not there."""
    await _lock(connection, group, None)
    if await connection.fetchrow(_DEVICE, device) is None:
        raise Problem(DEVICE_NOT_FOUND)
    if await connection.execute(_JOIN, group, device, organisation) == "INSERT 0 1":
        await audit.record(connection, "device_group.joined", group, device_id=device)


async def leave(connection: Any, group: UUID, device: UUID) -> None:
    """Raises the problems of a group that is not there, and of a device that is not in it."""
    await _lock(connection, group, None)
    if await connection.execute(_LEAVE, group, device) == "DELETE 0":
        raise Problem(DEVICE_NOT_FOUND)
    await audit.record(connection, "device_group.left", group, device_id=device)


async def _lock(connection: Any, group: UUID, expected: Sequence[str] | None) -> None:
    row = await connection.fetchrow(_LOCK, group)
    if row is None:
        raise Problem(GROUP_NOT_FOUND)
    check_version(row["version"], expected)
