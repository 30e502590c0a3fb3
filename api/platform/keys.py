"""API keys, as operations. Left out: what a key may be made for (`api.registry.keys`)."""

from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec

from api.access.scopes import KEYS_READ, KEYS_WRITE, Scope
from api.faces import PLATFORM
from api.http.lists import LIMIT_DEFAULT, Cursors, CursorText, Limit, cut
from api.http.operations import Call, Nothing, Role, needs, operation
from api.http.spelt import Moment
from api.problems import KEY_LIMIT, KEY_NOT_FOUND
from api.registry import keys
from api.registry.credentials import Credentials
from api.registry.texts import Name
from runtime.secrets import KeyRing, Seal, TokenHasher

PATH: Final = "/api/v1/api-keys"
_READS: Final = needs(Role.ADMIN, KEYS_READ)
_CHANGES: Final = needs(Role.ADMIN, KEYS_WRITE)
_FIRST: Final = UUID(int=0)


class One(msgspec.Struct):
    """Which key."""

    id: UUID


class Page(msgspec.Struct):
    """Which part of the list."""

    limit: Limit = LIMIT_DEFAULT
    cursor: CursorText | None = None


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    """What it is called, what it may do, and until when; without an end, until it is revoked."""

    name: Name
    scopes: Annotated[list[Scope], msgspec.Meta(min_length=1, max_length=32)]
    expires_at: Moment | None = None


class Key(msgspec.Struct):
    """An API key, without its secret; `last_used_at` to the hour."""

    credential_id: UUID
    name: str
    scopes: list[str]
    created_at: datetime
    created_by: UUID | None
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class Keys(msgspec.Struct):
    """A page of the organisation's keys."""

    data: list[Key]
    next_cursor: str | None


class NewlyMade(Key):
    """An API key with its secret, which is shown here and never again."""

    api_key: str = ""


class KeyOperations:
    """`/api/v1/api-keys`."""

    def __init__(self, ring: KeyRing) -> None:
        self._cursors: Cursors[UUID] = Cursors(Seal(ring, "key cursor"), UUID)
        self._hasher = TokenHasher(ring)

    @operation(PLATFORM, "GET", PATH, _READS)
    async def api_keys(self, call: Call[Nothing, Page, Nothing]) -> Keys:
        """The organisation's API keys, those that have ended too"""
        limit, mark = call.query.limit, ("keys", call.organisation)
        after = self._cursors.take(mark, call.query.cursor) or _FIRST
        rows, more = cut(await keys.keys(call.connection, call.organisation, after, limit + 1), limit)
        last = self._cursors.give(mark, UUID(int=rows[-1]["credential_id"].int)) if more else None
        return Keys([Key(**row) for row in rows], last)

    @operation(PLATFORM, "POST", PATH, _CHANGES, status=201, repeatable=True, problems=[KEY_LIMIT])
    async def make_api_key(self, call: Call[Nothing, Nothing, NewKey]) -> NewlyMade:
        """Make an API key, within one's own rights; it is shown once"""
        body = call.body
        expires_at = None if body.expires_at is None else body.expires_at.value
        made = await keys.make(
            call.connection,
            Credentials(call.connection, self._hasher),
            call.caller,
            call.organisation,
            keys.NewKey(str(body.name), body.scopes, expires_at),
        )
        content: dict[str, Any] = dict(made.row)
        return NewlyMade(**content, api_key=made.token)

    @operation(PLATFORM, "DELETE", f"{PATH}/{{id}}", _CHANGES, status=204, missing=KEY_NOT_FOUND)
    async def revoke_api_key(self, call: Call[One, Nothing, Nothing]) -> None:
        """Revoke an API key: the next request with it is refused"""
        await keys.revoke(call.connection, call.caller, call.path.id)
