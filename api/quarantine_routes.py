"""The quarantine over HTTP: listing it needs a key that reads, changing it an owner's.

Filters stand in the query, for changes as for the list: what `GET …/quarantine?code=…` shows is what
`POST …/quarantine/replay?code=…` replays. Left out: what is asked of the database (`api.quarantine`).
"""

import asyncio
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, Final
from uuid import UUID

import msgspec
import orjson
from aiohttp import web

from api import quarantine
from api.auth import OWNER_SCOPE, READ_SCOPE, Authority, presented_key
from api.errors import ApiError, invalid_parameter
from api.parameters import cursor_of, known_once, limit_of, one_of, quarantine_filter
from api.quarantine import HELD, STATES, Filter, Place
from api.settings import ApiSettings
from runtime.secrets import BadSealError, Seal

PATH: Final = "/api/v1/admin/quarantine"

_FILTER: Final = frozenset({"code", "device_id", "request_id", "from", "to", "attempts_max"})
_LIST: Final = _FILTER | {"state", "limit", "cursor"}
_CHANGE: Final = _FILTER | {"limit"}
_SUMMARY: Final = _FILTER | {"state"}
_BODY_S: Final = 10.0
#: Beside what is sent in it: names, and escapes.
_BODY_ROOM: Final = 2_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class QuarantineRoutes:
    """The routes of one application."""

    def __init__(self, authority: Authority, seal: Seal, settings: ApiSettings) -> None:
        self._authority = authority
        self._cursors = _Cursors(seal)
        self._settings = settings

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get(PATH, self.page, allow_head=False)
        router.add_get(f"{PATH}/summary", self.summary, allow_head=False)
        router.add_post(f"{PATH}/replay", self.replay_found)
        router.add_post(f"{PATH}/discard", self.discard_found)
        router.add_get(f"{PATH}/{{id}}", self.one, allow_head=False)
        router.add_patch(f"{PATH}/{{id}}", self.edit)
        router.add_post(f"{PATH}/{{id}}/replay", self.replay)
        router.add_post(f"{PATH}/{{id}}/discard", self.discard)

    async def page(self, request: web.Request) -> web.Response:
        key, query = _asked(request, _LIST)
        wanted, state, cursor = quarantine_filter(query), one_of(query, "state", STATES), cursor_of(query)
        limit = limit_of(query, self._settings.api_quarantine_rows_default, self._settings.api_quarantine_rows_max)
        async with self._authority.session(key, READ_SCOPE) as session:
            mark = _fingerprint(session.organisation, wanted, state)
            after = None if cursor is None else self._cursors.take(mark, cursor)
            page = await quarantine.find(session.connection, wanted, state, limit, after)
        next_cursor = None if page.end is None else self._cursors.give(mark, page.end)
        return _answer({"data": [shown(row) for row in page.rows], "next_cursor": next_cursor})

    async def summary(self, request: web.Request) -> web.Response:
        key, query = _asked(request, _SUMMARY)
        wanted, state = quarantine_filter(query), one_of(query, "state", STATES) or HELD
        async with self._authority.session(key, READ_SCOPE) as session:
            rows = await quarantine.summary(session.connection, wanted, state, self._settings.api_quarantine_rows_max)
        return _answer(summed_up(rows))

    async def one(self, request: web.Request) -> web.Response:
        key, _ = _asked(request, frozenset())
        async with self._authority.session(key, READ_SCOPE) as session:
            row = await quarantine.get(session.connection, _id(request))
        return _answer(shown(row))

    async def edit(self, request: web.Request) -> web.Response:
        key, _ = _asked(request, frozenset())
        most = self._settings.api_quarantine_payload_bytes_max
        sent = await _body(request, _edit, most + _BODY_ROOM)
        payload = quarantine.checked_payload(bytes(sent.payload), most)
        async with self._authority.session(key, OWNER_SCOPE, writes=True) as session:
            row = await quarantine.edit(session.connection, _id(request), payload)
        return _answer(shown(row))

    async def replay(self, request: web.Request) -> web.Response:
        key, _ = _asked(request, frozenset())
        async with self._authority.session(key, OWNER_SCOPE, writes=True) as session:
            row = await quarantine.replay(session.connection, _id(request))
        return _answer(shown(row), 202 if row["state"] == quarantine.REPLAYING else 200)

    async def discard(self, request: web.Request) -> web.Response:
        key, _ = _asked(request, frozenset())
        note = await _note(request)
        async with self._authority.session(key, OWNER_SCOPE, writes=True) as session:
            row = await quarantine.discard(session.connection, _id(request), note)
        return _answer(shown(row))

    async def replay_found(self, request: web.Request) -> web.Response:
        key, wanted, limit = self._wanted(request)
        async with self._authority.session(key, OWNER_SCOPE, writes=True) as session:
            count = await quarantine.replay_found(session.connection, wanted, limit)
        return _answer({"requested": count, "more": count == limit}, 202)

    async def discard_found(self, request: web.Request) -> web.Response:
        key, wanted, limit = self._wanted(request)
        note = await _note(request)
        if not wanted.names_something:
            raise invalid_parameter("code", "or another filter says what to discard: everything is never meant")
        async with self._authority.session(key, OWNER_SCOPE, writes=True) as session:
            count = await quarantine.discard_found(session.connection, wanted, note, limit)
        return _answer({"discarded": count, "more": count == limit})

    def _wanted(self, request: web.Request) -> tuple[str, Filter, int]:
        key, query = _asked(request, _CHANGE)
        most = self._settings.api_quarantine_changes_max
        return key, quarantine_filter(query), limit_of(query, most, most)


# ---------------------------------------------------------------- what is sent


class _Edit(msgspec.Struct, forbid_unknown_fields=True):
    payload: msgspec.Raw


class _Discard(msgspec.Struct, forbid_unknown_fields=True):
    note: str


_edit: Final = msgspec.json.Decoder(_Edit)
_discard: Final = msgspec.json.Decoder(_Discard)


def _asked(request: web.Request, parameters: frozenset[str]) -> tuple[str, dict[str, str]]:
    """Who asks, and with which parameters. Raises the error to answer with; costs no look-up."""
    return presented_key(request.headers.get("Authorization")), known_once(request.query, parameters)


def _id(request: web.Request) -> UUID:
    try:
        return UUID(request.match_info["id"])
    except ValueError:
        raise quarantine.not_found() from None


async def _note(request: web.Request) -> str:
    sent = await _body(request, _discard, 6 * quarantine.NOTE_CHARACTERS_MAX + _BODY_ROOM)
    return quarantine.checked_note(sent.note)


async def _body(request: web.Request, decoder: "msgspec.json.Decoder[Any]", bytes_max: int) -> Any:
    """The decoded body. Raises the error of one that is too large, too slow, or not of its shape."""
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > bytes_max:
                    raise ApiError(413, "body_too_large", f"the body has up to {bytes_max} bytes")
    except TimeoutError:
        raise ApiError(408, "request_timeout", f"the body did not come within {_BODY_S:g} s") from None
    except (web.RequestPayloadError, ConnectionError):
        raise ApiError(400, "bad_request", "the body was cut off") from None
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_body", f"the body: {error}") from None


# ---------------------------------------------------------------- what is answered


def shown(row: Any) -> dict[str, Any]:
    """A row as JSON has it: its payload as it is where that is JSON, otherwise as base64."""
    found = {name: value for name, value in row.items() if name not in ("payload", "original_payload")}
    found |= _shown_payload("payload", row["payload"])
    if "original_payload" in row:
        found |= _shown_payload("original_payload", row["original_payload"])
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
        msgspec.json.decode(raw)
        raw.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _answer(content: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(status=status, body=as_json(content), content_type="application/json")


def as_json(content: dict[str, Any]) -> bytes:
    return orjson.dumps(content, default=str, option=orjson.OPT_UTC_Z)  # str: the driver's own kind of UUID


# ---------------------------------------------------------------- cursors


class _Cursor(msgspec.Struct, array_like=True, frozen=True):
    query: bytes
    received_us: int
    quarantine_id: bytes


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_Cursor)


class _Cursors:
    """Places between requests: opaque, and only for the query they were given out for."""

    def __init__(self, seal: Seal) -> None:
        self._seal = seal

    def give(self, query: bytes, place: Place) -> str:
        received_us = (place.received_at - _EPOCH) // _MICROSECOND
        return self._seal.seal(_encoder.encode(_Cursor(query, received_us, place.quarantine_id.bytes)))

    def take(self, query: bytes, text: str) -> Place:
        """Raises the error of a parameter that this service did not give out for this query."""
        try:
            cursor = _decoder.decode(self._seal.open(text))
            place = Place(_EPOCH + cursor.received_us * _MICROSECOND, UUID(bytes=cursor.quarantine_id))
        except (BadSealError, msgspec.DecodeError, OverflowError, ValueError):
            raise invalid_parameter("cursor", "was not given out by this service") from None
        if cursor.query != query:
            raise invalid_parameter("cursor", "belongs to a query with other parameters")
        return place


def _fingerprint(organisation: UUID, wanted: Filter, state: str | None) -> bytes:
    return blake2b(repr((organisation, wanted, state)).encode(), digest_size=12).digest()
