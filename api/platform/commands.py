"""Commands to devices, and whether they are there, as operations.

Left out: what carries a command (`workers.commands`), and what a device's answer does.
"""

from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Self
from uuid import UUID

import msgspec

from api.access.scopes import DEVICES_READ, DEVICES_WRITE
from api.faces import PLATFORM
from api.http.lists import LIMIT_DEFAULT, Cursors, CursorText, Limit, cut
from api.http.operations import Call, Nothing, Reply, Role, needs, operation
from api.http.spelt import STORABLE
from api.problems import COMMAND_LIMIT, COMMAND_NOT_FOUND, DEVICE_INACTIVE, DEVICE_NOT_FOUND
from api.registry import commands, devices
from api.registry.commands import NewCommand
from api.registry.texts import CommandTarget
from api.settings import ApiSettings
from runtime.secrets import KeyRing, Seal

_ONE: Final = "/api/v1/devices/{id}"
PATH: Final = f"{_ONE}/commands"
_READS: Final = needs(Role.VIEWER, DEVICES_READ)
_CHANGES: Final = needs(Role.MEMBER, DEVICES_WRITE)
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255, extra_json_schema=STORABLE)]


class OneDevice(msgspec.Struct):
    """Which device."""

    id: UUID


class OneCommand(msgspec.Struct):
    """Which command of which device."""

    id: UUID
    commandId: UUID  # noqa: N815 - as paths spell it


class Page(msgspec.Struct):
    """Which part of the list."""

    limit: Limit = LIMIT_DEFAULT
    cursor: CursorText | None = None


class CommandToSend(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a device, or one behind it, is to do."""

    command: _Name
    payload: dict[str, Any] = {}
    target: CommandTarget | None = None


class Command(msgspec.Struct, kw_only=True):
    """A command, and what became of it: PENDING, SENT, ACKNOWLEDGED, SUCCESS, FAILED or TIMEOUT."""

    command_id: UUID
    device_id: UUID
    command: str
    payload: dict[str, Any]
    target: str | None
    state: str
    response: dict[str, Any] | None
    created_at: datetime
    sent_at: datetime | None
    acked_at: datetime | None

    @classmethod
    def of(cls, row: Any) -> Self:
        names = ("command", "target", "state", "created_at", "sent_at", "acked_at")
        return cls(
            **{name: row[name] for name in names},
            command_id=UUID(int=row["command_id"].int),
            device_id=UUID(int=row["device_id"].int),
            payload=_json(row["payload"]),
            response=_json(row["response"]),
        )


class Commands(msgspec.Struct):
    """A page of a device's commands, the newest first."""

    data: list[Command]
    next_cursor: str | None


class Report(msgspec.Struct):
    """What a device said of itself last, as it said it, and when."""

    report: dict[str, Any]
    reported_at: datetime


class Health(msgspec.Struct, kw_only=True):
    """Whether a device is there, since when it is so, and what it said of itself last."""

    device_id: UUID
    online: bool
    online_changed_at: datetime | None
    """Since when `online` is what it is; null for a device that was never heard."""
    last_seen_at: datetime | None
    fw_version: str | None
    health: Report | None
    info: Report | None
    config: Report | None


class DeviceCommandOperations:
    """`/api/v1/devices/{id}/commands` and `/health`."""

    def __init__(self, ring: KeyRing, settings: ApiSettings) -> None:
        self._cursors: Cursors[UUID] = Cursors(Seal(ring, "commands cursor"), UUID)
        self._timeout = timedelta(seconds=settings.command_timeout_s)
        self._open_max = settings.commands_open_max

    @operation(PLATFORM, "GET", PATH, _READS, missing=DEVICE_NOT_FOUND)
    async def device_commands(self, call: Call[OneDevice, Page, Nothing]) -> Commands:
        """List the commands of a device, and what became of them"""
        device, limit = call.path.id, call.query.limit
        await devices.get(call.connection, device)
        mark = ("commands", str(call.organisation), str(device))
        after = self._cursors.take(mark, call.query.cursor)
        rows, more = cut(await commands.newest(call.connection, device, after, limit + 1), limit)
        data = [Command.of(row) for row in rows]
        return Commands(data, self._cursors.give(mark, data[-1].command_id) if more else None)

    @operation(
        PLATFORM, "POST", PATH, _CHANGES, status=201, missing=DEVICE_NOT_FOUND, repeatable=True,
        problems=[COMMAND_LIMIT, DEVICE_INACTIVE],
    )  # fmt: skip
    async def send_device_command(self, call: Call[OneDevice, Nothing, CommandToSend]) -> Reply[Command]:
        """Send a command to a device by MQTT

        It is answered before it is sent: the command tells what became of it. It is published to
        `v1/gateways/{organisation}/{device}/commands`, and for a plant to `cpi/{plant}/command`, signed.
        """
        device, body = call.path.id, call.body
        target = None if body.target is None else body.target.value
        new = NewCommand(body.command, body.payload, target)
        row = await commands.ask_device(
            call.connection, call.organisation, device, new, timeout=self._timeout, open_max=self._open_max
        )
        made = Command.of(row)
        location = f"{PATH.replace('{id}', str(device))}/{made.command_id}"
        return Reply(made, headers={"Location": location})

    @operation(PLATFORM, "GET", f"{PATH}/{{commandId}}", _READS, missing=COMMAND_NOT_FOUND)
    async def device_command(self, call: Call[OneCommand, Nothing, Nothing]) -> Command:
        """Get a command"""
        return Command.of(await commands.get(call.connection, call.path.id, call.path.commandId))

    @operation(PLATFORM, "GET", f"{_ONE}/health", _READS, missing=DEVICE_NOT_FOUND)
    async def device_health(self, call: Call[OneDevice, Nothing, Nothing]) -> Health:
        """Whether a device is there, and what it said of itself last

        It is there while it is heard as often as it usually is, and until its broker says that it is gone.
        """
        row = await devices.get(call.connection, call.path.id)
        said = await devices.reports(call.connection, call.path.id)
        reports = {one["kind"]: Report(_json(one["report"]), one["reported_at"]) for one in said}
        return Health(
            device_id=call.path.id,
            **{name: row[name] for name in ("online", "online_changed_at", "last_seen_at", "fw_version")},
            health=reports.get("health"),
            info=reports.get("info"),
            config=reports.get("config"),
        )


def _json(text: str | None) -> Any:
    """As the database wrote it."""
    return None if text is None else msgspec.Raw(text.encode())
