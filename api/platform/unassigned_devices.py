"""The tray of devices that no name is known for yet, as operations. Left out: what claiming does (`api.registry`)."""

from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec

from api import quarantine
from api.access.scopes import DEVICES_READ, DEVICES_WRITE
from api.faces import PLATFORM
from api.http.lists import LIMIT_DEFAULT, Cursors, CursorText, Limit, cut
from api.http.operations import Call, Nothing, Reply, Role, needs, operation
from api.http.problems import invalid
from api.platform.quarantine import Note, as_json, shown
from api.problems import (
    DEVICE_NOT_FOUND,
    INVALID_NOTE,
    LOCAL_ID_TAKEN,
    UNASSIGNED_ELSEWHERE,
    UNASSIGNED_NOT_FOUND,
    UNKNOWN_MODEL,
)
from api.registry import unassigned
from api.registry.texts import Name, Reason
from runtime.secrets import KeyRing, Seal
from schemas import models

PATH: Final = "/api/v1/unassigned-devices"
_ONE: Final = f"{PATH}/{{id}}"
_READS: Final = needs(Role.VIEWER, DEVICES_READ)
_CHANGES: Final = needs(Role.MEMBER, DEVICES_WRITE)
_NOTE_BYTES: Final = 6 * Reason.characters_max + 2_000
_MODEL_CHARACTERS_MAX: Final = 64
_Model = Annotated[
    str,
    msgspec.Meta(min_length=1, max_length=_MODEL_CHARACTERS_MAX, extra_json_schema={"enum": [*models.MODELS]}),
]


class One(msgspec.Struct):
    """Which of them."""

    id: UUID


class Listed(msgspec.Struct):
    """Which part of the list, of all sites or of one."""

    site_id: UUID | None = None
    limit: Limit = LIMIT_DEFAULT
    cursor: CursorText | None = None


class ToClaim(msgspec.Struct, forbid_unknown_fields=True):
    """Which device it is: one that stands at the same site, or a new one of a name and model."""

    device_id: UUID | None = None
    name: Name | None = None
    model: _Model | None = None

    def __post_init__(self) -> None:
        if self.device_id is not None and (self.name is not None or self.model is not None):
            raise invalid("device_id", "must be left out, or else name and model, which are a new device's")


class Unassigned(msgspec.Struct, kw_only=True):
    """A name that a site's device calls itself by in its topics, and how many of its readings are held."""

    unassigned_id: UUID
    site_id: UUID
    name: str
    format: str
    first_seen_at: datetime
    last_seen_at: datetime
    held: int
    last_payload: Any
    """The reading that came last."""
    last_payload_base64: str | msgspec.UnsetType = msgspec.UNSET


class UnassignedDevices(msgspec.Struct):
    """A page of them, in the order in which they were first heard."""

    data: list[Unassigned]
    next_cursor: str | None


class Claimed(msgspec.Struct):
    """Which device it is now, and of how many readings the replay was asked for."""

    device_id: UUID
    replaying: int


class DiscardedReadings(msgspec.Struct):
    """How many readings were thrown away."""

    discarded: int


class UnassignedDeviceOperations:
    """`/api/v1/unassigned-devices`."""

    def __init__(self, ring: KeyRing) -> None:
        self._cursors: Cursors[UUID] = Cursors(Seal(ring, "unassigned devices cursor"), UUID)

    @operation(PLATFORM, "GET", PATH, _READS)
    async def unassigned_devices(self, call: Call[Nothing, Listed, Nothing]) -> Reply[UnassignedDevices]:
        """List devices that nobody has claimed yet

        They publish under a site's prefix, and no device of the site has their name.
        """
        query = call.query
        mark = (str(call.organisation), "unassigned", str(query.site_id))
        after = self._cursors.take(mark, query.cursor)
        found = await unassigned.find(call.connection, query.site_id, query.limit + 1, after)
        rows, more = cut(found, query.limit)
        end = self._cursors.give(mark, UUID(int=rows[-1]["unassigned_id"].int)) if more else None
        return Reply(as_json({"data": [shown(row, "last_payload") for row in rows], "next_cursor": end}))

    @operation(
        PLATFORM, "POST", f"{_ONE}/claim", _CHANGES, missing=UNASSIGNED_NOT_FOUND, repeatable=True,
        problems=[DEVICE_NOT_FOUND, LOCAL_ID_TAKEN, UNKNOWN_MODEL, UNASSIGNED_ELSEWHERE],
    )  # fmt: skip
    async def claim_unassigned_device(self, call: Call[One, Nothing, ToClaim]) -> Claimed:
        """Let it be a device of its site

        A new one, or one that stands there and has this local_id from now on. What is held is replayed as that
        device's, with the times at which it came.
        """
        identity, body = call.path.id, call.body
        if body.device_id is not None:
            rows = await unassigned.bind(call.connection, identity, body.device_id)
            return Claimed(body.device_id, rows)
        name = None if body.name is None else body.name.value
        rows = await unassigned.create(call.connection, call.organisation, identity, name, body.model)
        return Claimed(identity, rows)

    @operation(
        PLATFORM, "POST", f"{_ONE}/discard", _CHANGES, missing=UNASSIGNED_NOT_FOUND, problems=[INVALID_NOTE],
        body_bytes_max=_NOTE_BYTES,
    )  # fmt: skip
    async def discard_unassigned_device(self, call: Call[One, Nothing, Note]) -> DiscardedReadings:
        """Throw away what is held of it

        It comes back when it is heard again.
        """
        note = quarantine.checked_note(call.body.note)
        return DiscardedReadings(await unassigned.discard(call.connection, call.path.id, note))
