"""Commands to devices: asked for here, sent by `workers.commands`, settled by what devices answer.

Left out: sending them.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec

from api.http.problems import Problem, invalid
from api.problems import COMMAND_LIMIT, COMMAND_NOT_FOUND, DEVICE_INACTIVE, DEVICE_NOT_FOUND
from api.registry import audit
from runtime.ids import uuid7
from schemas.commands import TooLargeError, Way, check
from schemas.plants import Lifecycle
from schemas.signing import NotCanonicalError

_COLUMNS: Final = """
command_id, device_id, command, payload::text AS payload, target, state, response::text AS response, created_at,
sent_at, acked_at"""
_INSERT: Final = f"""
INSERT INTO commands (command_id, organisation_id, device_id, command, payload, target, way, expires_at)
VALUES ($1, $2, $3, $4, $5::text::jsonb, $6, $7, now() + $8) RETURNING {_COLUMNS}
"""  # noqa: S608
_OPEN: Final = """
SELECT count(*) FROM commands WHERE device_id = $1 AND state IN ('PENDING', 'SENT', 'ACKNOWLEDGED')
"""
_ONE: Final = f"SELECT {_COLUMNS} FROM commands WHERE device_id = $1 AND command_id = $2"  # noqa: S608
_NEWEST: Final = f"""
SELECT {_COLUMNS} FROM commands WHERE device_id = $1 AND ($2::uuid IS NULL OR command_id < $2)
ORDER BY command_id DESC LIMIT $3
"""  # noqa: S608
_HOLD: Final = """
SELECT d.status, p.lifecycle FROM devices d LEFT JOIN plants p ON p.device_id = d.device_id
WHERE d.device_id = $1 AND d.status <> 'deleted' FOR NO KEY UPDATE OF d
"""
_NUMBER: Final = "SELECT count(*) FROM commands WHERE device_id = $1"
_PAGE: Final = f"""
SELECT {_COLUMNS} FROM commands WHERE device_id = $1 ORDER BY command_id DESC LIMIT $2 OFFSET $3
"""  # noqa: S608
_GIVE_UP: Final = """
UPDATE commands SET state = 'FAILED', finished_at = now(), response = $2::text::jsonb
WHERE device_id = $1 AND state IN ('PENDING', 'SENT', 'ACKNOWLEDGED')
"""


class NewCommand(NamedTuple):
    """What a device is to do."""

    command: str
    payload: Mapping[str, Any]
    target: str | None = None
    """A device behind it, by its own name for that."""
    way: Way = Way.GATEWAY


async def ask(
    connection: Any, organisation: UUID, device: UUID, new: NewCommand, *, timeout: timedelta, open_max: int
) -> Any:
    """A command that waits to be sent, as it stands. The device is held by the caller.

    Raises the problems of too many that wait, and of one that cannot be sent.
    """
    if await connection.fetchval(_OPEN, device) >= open_max:
        raise Problem(COMMAND_LIMIT, f"{open_max} commands wait for the device, as many as may")
    command = uuid7()
    try:
        check(device, command, new.command, new.payload, new.target)
    except (TooLargeError, NotCanonicalError) as error:
        raise invalid("payload", str(error)) from None
    payload = msgspec.json.encode(new.payload).decode()
    row = await connection.fetchrow(
        _INSERT, command, organisation, device, new.command, payload, new.target, new.way, timeout
    )
    await audit.record(
        connection, "command.asked", device, command_id=command, command=new.command, target=new.target
    )
    return row


async def ask_device(
    connection: Any, organisation: UUID, device: UUID, new: NewCommand, *, timeout: timedelta, open_max: int
) -> Any:
    """The same of any device, which is held from then on; a plant's goes the plant's way.

    Raises also the problems of a device that is not there, or takes no commands as it is.
    """
    held = await connection.fetchrow(_HOLD, device)
    if held is None:
        raise Problem(DEVICE_NOT_FOUND)
    lifecycle = held["lifecycle"]
    if held["status"] != "active" or lifecycle not in (None, Lifecycle.ACTIVE):
        raise Problem(DEVICE_INACTIVE, f"the device is {lifecycle or held['status']}: it takes no commands")
    if lifecycle is not None:
        new = new._replace(way=Way.PLANT)
    return await ask(connection, organisation, device, new, timeout=timeout, open_max=open_max)


async def get(connection: Any, device: UUID, command: UUID) -> Any:
    """Raises the problem of a command that is not there."""
    row = await connection.fetchrow(_ONE, device, command)
    if row is None:
        raise Problem(COMMAND_NOT_FOUND)
    return row


async def newest(connection: Any, device: UUID, before: UUID | None, limit: int) -> list[Any]:
    """Up to `limit` commands, the newest first, those that were asked for before that one."""
    rows: list[Any] = await connection.fetch(_NEWEST, device, before, limit)
    return rows


async def find(connection: Any, device: UUID, offset: int, limit: int) -> tuple[list[Any], int]:
    """Up to `limit` commands, the newest first, behind so many; and how many there are in all."""
    total: int = await connection.fetchval(_NUMBER, device)
    rows: list[Any] = await connection.fetch(_PAGE, device, limit, offset) if offset < total else []
    return rows, total


async def give_up(connection: Any, device: UUID, reason: str) -> None:
    """Those that are under way will not be: nobody is there any more to do them."""
    await connection.execute(_GIVE_UP, device, msgspec.json.encode({"reason": reason}).decode())
