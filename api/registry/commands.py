"""Commands to devices: asked for here, sent by `workers.commands`, settled by what devices answer.

Left out: sending them.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec

from api.http.problems import Problem, invalid
from api.problems import COMMAND_LIMIT
from api.registry import audit
from runtime.ids import uuid7
from schemas.commands import TooLargeError, Way, check
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


async def find(connection: Any, device: UUID, offset: int, limit: int) -> tuple[list[Any], int]:
    """Up to `limit` commands, the newest first, behind so many; and how many there are in all."""
    total: int = await connection.fetchval(_NUMBER, device)
    rows: list[Any] = await connection.fetch(_PAGE, device, limit, offset) if offset < total else []
    return rows, total


async def give_up(connection: Any, device: UUID, reason: str) -> None:
    """Those that are under way will not be: nobody is there any more to do them."""
    await connection.execute(_GIVE_UP, device, msgspec.json.encode({"reason": reason}).decode())
