"""The quarantine, as operations: listing it needs a key that reads, changing it one that may.

Filters stand in the query, for changes as for the list: what `GET …/quarantine?code=…` shows is what
`POST …/quarantine/replay?code=…` replays. Left out: what is asked of the database (`api.quarantine`).
"""

from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec
import orjson

from api import quarantine
from api.access.scopes import QUARANTINE_WRITE, READINGS_READ
from api.faces import PLATFORM
from api.http.lists import Cursors, CursorText
from api.http.operations import Call, Nothing, Reply, Role, needs, operation
from api.http.parameters import Count, Name, Span, limit_within
from api.http.problems import invalid_parameter
from api.problems import INVALID_NOTE, INVALID_PAYLOAD, NOT_HELD, QUARANTINE_NOT_FOUND
from api.quarantine import Filter, Measurement, Place
from api.registry.texts import Reason
from api.settings import ApiSettings
from runtime.secrets import KeyRing, Seal

PATH: Final = "/api/v1/admin/quarantine"
_READS: Final = needs(Role.VIEWER, READINGS_READ)
_CHANGES: Final = needs(Role.ADMIN, QUARANTINE_WRITE)

#: Six for each character, as JSON may escape it, and room for the rest.
_NOTE_BYTES: Final = 6 * Reason.characters_max + 2_000

_MEASUREMENT: Final = {
    **msgspec.json.schema_components([Measurement])[1]["Measurement"],
    "additionalProperties": False,
}

State = Literal["held", "replaying", "released", "discarded", "expired"]


class One(msgspec.Struct):
    """Which row."""

    id: UUID


class Found(Span, kw_only=True):
    """Which rows, by receive time among others; a row that came back from a replay has an attempt more."""

    code: Name | None = None
    device_id: UUID | None = None
    request_id: Name | None = None
    attempts_max: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None

    @property
    def filter(self) -> Filter:
        return Filter(self.code, self.device_id, self.request_id, self.start, self.end, self.attempts_max)


class Listed(Found, kw_only=True):
    """Which rows, in which states, and how many."""

    state: State | None = None
    limit: Count | None = None
    cursor: CursorText | None = None


class Counted(Found, kw_only=True):
    """Which rows, and in which state."""

    state: State = "held"


class Changed(Found, kw_only=True):
    """Which held rows, and how many of them in this request."""

    limit: Count | None = None


class Payload(msgspec.Struct, forbid_unknown_fields=True):
    """One measurement."""

    payload: Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema=_MEASUREMENT)]


class Note(msgspec.Struct, forbid_unknown_fields=True):
    """Why something is discarded."""

    note: Annotated[str, msgspec.Meta(extra_json_schema=dict(Reason.schema))]


class Row(msgspec.Struct, kw_only=True):
    """A reading that was set aside: what was sent, and why it was refused."""

    quarantine_id: UUID
    device_id: UUID | None
    state: State
    code: str
    message: str
    request_id: str
    received_at: datetime
    quarantined_at: datetime
    changed_at: datetime | None
    replay_requested_at: datetime | None
    attempts: int
    note: str | None
    payload_bytes: int
    edited: bool
    payload: Any
    payload_base64: str | msgspec.UnsetType = msgspec.UNSET
    """In its place, where what was sent is no JSON."""
    original_payload: Any = msgspec.UNSET
    original_payload_base64: str | msgspec.UnsetType = msgspec.UNSET


class Rows(msgspec.Struct):
    """A page of rows, newest first."""

    data: list[Row]
    next_cursor: str | None


class Total(msgspec.Struct):
    """How many rows of a code and a device there are."""

    code: str
    device_id: UUID | None
    rows: int
    oldest: datetime
    newest: datetime


class Summary(msgspec.Struct):
    """How many rows there are in all, and by code and device, the most first."""

    total: int
    data: list[Total]


class Requested(msgspec.Struct):
    """How many replays were asked for, and whether the filter finds more."""

    requested: int
    more: bool


class Discarded(msgspec.Struct):
    """How many rows were discarded, and whether the filter finds more."""

    discarded: int
    more: bool


class QuarantineOperations:
    """`/api/v1/admin/quarantine`."""

    def __init__(self, ring: KeyRing, settings: ApiSettings) -> None:
        self._cursors: Cursors[Place] = Cursors(Seal(ring, "quarantine cursor"), Place)
        self._settings = settings

    @operation(PLATFORM, "GET", PATH, _READS)
    async def quarantine(self, call: Call[Nothing, Listed, Nothing]) -> Reply[Rows]:
        """What was set aside, and why"""
        query, limits = call.query, self._settings
        wanted = query.filter
        limit = limit_within(query.limit, limits.api_quarantine_rows_default, limits.api_quarantine_rows_max)
        mark = (call.organisation, wanted, query.state)
        after = self._cursors.take(mark, query.cursor)
        page = await quarantine.find(call.connection, wanted, query.state, limit, after)
        next_cursor = None if page.end is None else self._cursors.give(mark, page.end)
        return Reply(as_json({"data": [shown(row) for row in page.rows], "next_cursor": next_cursor}))

    @operation(PLATFORM, "GET", f"{PATH}/summary", _READS)
    async def quarantine_summary(self, call: Call[Nothing, Counted, Nothing]) -> Reply[Summary]:
        """How much was set aside, by code and device"""
        rows = await quarantine.summary(
            call.connection, call.query.filter, call.query.state, self._settings.api_quarantine_rows_max
        )
        return Reply(as_json(summed_up(rows)))

    @operation(PLATFORM, "POST", f"{PATH}/replay", _CHANGES, status=202)
    async def replay_found(self, call: Call[Nothing, Changed, Nothing]) -> Requested:
        """Judge again what a filter finds, the oldest first"""
        limit = self._changes(call.query)
        count = await quarantine.replay_found(call.connection, call.query.filter, limit)
        return Requested(count, count == limit)

    @operation(PLATFORM, "POST", f"{PATH}/discard", _CHANGES, problems=[INVALID_NOTE], body_bytes_max=_NOTE_BYTES)
    async def discard_found(self, call: Call[Nothing, Changed, Note]) -> Discarded:
        """Throw away what a filter finds, the oldest first

        A filter has to say what: everything is never meant.
        """
        wanted, limit, note = call.query.filter, self._changes(call.query), quarantine.checked_note(call.body.note)
        if not wanted.names_something:
            raise invalid_parameter("code", "or another filter says what to discard: everything is never meant")
        count = await quarantine.discard_found(call.connection, wanted, note, limit)
        return Discarded(count, count == limit)

    @operation(PLATFORM, "GET", f"{PATH}/{{id}}", _READS, missing=QUARANTINE_NOT_FOUND)
    async def quarantined(self, call: Call[One, Nothing, Nothing]) -> Reply[Row]:
        """One row, with the whole of what was sent"""
        return Reply(as_json(shown(await quarantine.get(call.connection, call.path.id))))

    @operation(
        PLATFORM,
        "PATCH",
        f"{PATH}/{{id}}",
        _CHANGES,
        missing=QUARANTINE_NOT_FOUND,
        problems=[NOT_HELD, INVALID_PAYLOAD],
    )
    async def edit_quarantined(self, call: Call[One, Nothing, Payload]) -> Reply[Row]:
        """Mend what was sent, to be replayed

        What was sent first is kept beside it.
        """
        most = self._settings.api_quarantine_payload_bytes_max
        payload = quarantine.checked_payload(bytes(call.body.payload), most)
        return Reply(as_json(shown(await quarantine.edit(call.connection, call.path.id, payload))))

    @operation(
        PLATFORM, "POST", f"{PATH}/{{id}}/replay", _CHANGES, status=202, missing=QUARANTINE_NOT_FOUND,
        problems=[NOT_HELD],
    )  # fmt: skip
    async def replay_quarantined(self, call: Call[One, Nothing, Nothing]) -> Reply[Row]:
        """Judge a row again

        With its first receive time, on its device's own way; 200 for one that was released already.
        """
        row = await quarantine.replay(call.connection, call.path.id)
        return Reply(as_json(shown(row)), status=202 if row["state"] == quarantine.REPLAYING else 200)

    @operation(
        PLATFORM, "POST", f"{PATH}/{{id}}/discard", _CHANGES, missing=QUARANTINE_NOT_FOUND,
        problems=[NOT_HELD, INVALID_NOTE], body_bytes_max=_NOTE_BYTES,
    )  # fmt: skip
    async def discard_quarantined(self, call: Call[One, Nothing, Note]) -> Reply[Row]:
        """Throw a row away for good"""
        note = quarantine.checked_note(call.body.note)
        return Reply(as_json(shown(await quarantine.discard(call.connection, call.path.id, note))))

    def _changes(self, query: Changed) -> int:
        most = self._settings.api_quarantine_changes_max
        return limit_within(query.limit, most, most)


# ---------------------------------------------------------------- what is answered


def shown(row: Any, *payloads: str) -> dict[str, Any]:
    """A row as JSON has it: its payloads as they are where that is JSON, otherwise as base64."""
    named = payloads or ("payload", "original_payload")
    found = {name: value for name, value in row.items() if name not in named}
    for name in named:
        if name in row:
            found |= _shown_payload(name, row[name])
    return found


def summed_up(rows: Sequence[Any]) -> dict[str, Any]:
    data = [{name: value for name, value in row.items() if name != "total"} for row in rows]
    return {"total": rows[0]["total"] if rows else 0, "data": data}


def _shown_payload(name: str, raw: bytes | None) -> dict[str, Any]:
    if not raw:
        return {name: None}
    if _is_json(raw):
        return {name: orjson.Fragment(raw)}
    return {name: None, f"{name}_base64": b64encode(raw).decode()}


def _is_json(raw: bytes) -> bool:
    try:
        msgspec.json.decode(raw, type=msgspec.Raw)  # which takes numbers of any size
        raw.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def as_json(content: dict[str, Any]) -> bytes:
    return orjson.dumps(content, default=str, option=orjson.OPT_UTC_Z)  # str: the driver's own kind of UUID
