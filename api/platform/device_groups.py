"""Groups of devices, as operations. Left out: what is asked of the database (`api.registry.groups`)."""

from dataclasses import replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import msgspec

from api.access.scopes import DEVICES_READ, DEVICES_WRITE
from api.faces import PLATFORM
from api.http.lists import Cursors, CursorText, Limit, cut
from api.http.operations import Call, Nothing, Reply, Role, needs, operation
from api.http.problems import STALE
from api.problems import DEVICE_NOT_FOUND, GROUP_LIMIT, GROUP_NAME_TAKEN, GROUP_NOT_FOUND
from api.registry import groups
from api.registry.texts import GroupDescription, Name
from runtime.secrets import KeyRing, Seal

PATH: Final = "/api/v1/device-groups"
_ONE: Final = f"{PATH}/{{id}}"
_MEMBER: Final = f"{_ONE}/devices/{{deviceId}}"
_MISSING: Final = {"id": GROUP_NOT_FOUND, "deviceId": DEVICE_NOT_FOUND}
_READS: Final = needs(Role.VIEWER, DEVICES_READ)
_CHANGES: Final = needs(Role.MEMBER, DEVICES_WRITE)


class One(msgspec.Struct):
    """Which group."""

    id: UUID


class Member(msgspec.Struct, rename="camel"):
    """Which device of which group."""

    id: UUID
    device_id: UUID


class Paged(msgspec.Struct, kw_only=True):
    """Which part of a list."""

    limit: Limit = 50
    cursor: CursorText | None = None


class Named(msgspec.Struct, forbid_unknown_fields=True):
    """What a group is called, and what it is; what is absent of the latter stays."""

    name: Name
    description: GroupDescription | msgspec.UnsetType = msgspec.UNSET


class Group(msgspec.Struct):
    """A group of devices."""

    group_id: UUID
    name: str
    description: str
    created_at: datetime
    updated_at: datetime


class Groups(msgspec.Struct):
    """A page of groups, in the order in which they were made."""

    data: list[Group]
    next_cursor: str | None


class Members(msgspec.Struct):
    """A page of the ids of a group's devices."""

    data: list[UUID]
    next_cursor: str | None


class DeviceGroupOperations:
    """`/api/v1/device-groups`."""

    def __init__(self, ring: KeyRing) -> None:
        self._cursors: Cursors[UUID] = Cursors(Seal(ring, "device groups cursor"), UUID)

    @operation(PLATFORM, "GET", PATH, _READS)
    async def device_groups(self, call: Call[Nothing, Paged, Nothing]) -> Groups:
        """List the groups of devices"""
        mark = (str(call.organisation), "groups")
        after = self._cursors.take(mark, call.query.cursor)
        rows, more = cut(await groups.find(call.connection, after, call.query.limit + 1), call.query.limit)
        data = [_shown(row) for row in rows]
        return Groups(data, self._cursors.give(mark, data[-1].group_id) if more else None)

    @operation(
        PLATFORM, "POST", PATH, _CHANGES, status=201, repeatable=True, problems=[GROUP_NAME_TAKEN, GROUP_LIMIT]
    )
    async def create_device_group(self, call: Call[Nothing, Nothing, Named]) -> Reply[Group]:
        """Create a group of devices"""
        description = _described(call.body) or ""
        group = await groups.create(call.connection, call.organisation, call.body.name.value, description)
        return replace(await _found(call, group), headers={"Location": _ONE.format(id=group)})

    @operation(PLATFORM, "GET", _ONE, _READS, missing=GROUP_NOT_FOUND)
    async def device_group(self, call: Call[One, Nothing, Nothing]) -> Reply[Group]:
        """Get a group of devices"""
        return await _found(call, call.path.id)

    @operation(PLATFORM, "PATCH", _ONE, _CHANGES, missing=GROUP_NOT_FOUND, problems=[GROUP_NAME_TAKEN, STALE])
    async def rename_device_group(self, call: Call[One, Nothing, Named]) -> Reply[Group]:
        """Rename a group of devices"""
        name, description = call.body.name.value, _described(call.body)
        await groups.rename(call.connection, call.path.id, call.versions, name, description)
        return await _found(call, call.path.id)

    @operation(PLATFORM, "DELETE", _ONE, _CHANGES, status=204, missing=GROUP_NOT_FOUND, problems=[STALE])
    async def delete_device_group(self, call: Call[One, Nothing, Nothing]) -> None:
        """Delete a group; its devices stay"""
        await groups.remove(call.connection, call.path.id, call.versions)

    @operation(PLATFORM, "GET", f"{_ONE}/devices", _READS, missing=GROUP_NOT_FOUND)
    async def device_group_members(self, call: Call[One, Paged, Nothing]) -> Members:
        """List a group's devices, by id"""
        mark = (str(call.organisation), str(call.path.id))
        after = self._cursors.take(mark, call.query.cursor)
        found = await groups.members(call.connection, call.path.id, after, call.query.limit + 1)
        page, more = cut(found, call.query.limit)
        data = [UUID(int=device.int) for device in page]
        return Members(data, self._cursors.give(mark, data[-1]) if more else None)

    @operation(PLATFORM, "PUT", _MEMBER, _CHANGES, status=204, missing=_MISSING)
    async def join_device_group(self, call: Call[Member, Nothing, Nothing]) -> None:
        """Put a device into a group; it may be there already"""
        await groups.join(call.connection, call.organisation, call.path.id, call.path.device_id)

    @operation(PLATFORM, "DELETE", _MEMBER, _CHANGES, status=204, missing=_MISSING)
    async def leave_device_group(self, call: Call[Member, Nothing, Nothing]) -> None:
        """Take a device out of a group"""
        await groups.leave(call.connection, call.path.id, call.path.device_id)


async def _found(call: Call[Any, Any, Any], group: UUID) -> Reply[Group]:
    row = await groups.get(call.connection, group)
    return Reply(_shown(row), version=str(row["version"]))


def _described(body: Named) -> str | None:
    return None if isinstance(body.description, msgspec.UnsetType) else body.description.value


def _shown(row: Any) -> Group:
    return Group(UUID(int=row["group_id"].int), row["name"], row["description"], row["created_at"], row["updated_at"])
