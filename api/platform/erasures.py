"""Erasures of sites, as operations. Left out: what is asked of the database (`api.registry.erasures`)."""

from datetime import datetime
from typing import Final, Literal
from uuid import UUID

import msgspec

from api.access.scopes import SITES_READ
from api.faces import PLATFORM
from api.http.lists import LIMIT_DEFAULT, Cursors, CursorText, Limit, cut
from api.http.operations import Call, Nothing, Role, needs, operation
from api.problems import ERASURE_NOT_FOUND
from api.registry import erasures
from api.registry.erasures import Place
from runtime.secrets import KeyRing, Seal

PATH: Final = "/api/v1/erasures"
_READS: Final = needs(Role.ADMIN, SITES_READ)


class One(msgspec.Struct):
    """Which deleted site, by the id that it had."""

    id: UUID


class Listed(msgspec.Struct):
    """Which part of the list."""

    limit: Limit = LIMIT_DEFAULT
    cursor: CursorText | None = None


class Erasure(msgspec.Struct):
    """How far a deleted site is erased, and how much was removed so far.

    `waiting`: until what its devices had sent before has landed; `erasing`; `done`: nothing of it is left.
    """

    site_id: UUID
    state: Literal["waiting", "erasing", "done"]
    requested_at: datetime
    finished_at: datetime | None
    readings: int
    text_readings: int
    notes: int
    quarantined: int
    devices_removed: int


class Erasures(msgspec.Struct):
    """A page of erasures, those asked for last first."""

    data: list[Erasure]
    next_cursor: str | None


class ErasureOperations:
    """`/api/v1/erasures`."""

    def __init__(self, ring: KeyRing) -> None:
        self._cursors: Cursors[Place] = Cursors(Seal(ring, "erasure cursor"), Place)

    @operation(PLATFORM, "GET", PATH, _READS)
    async def erasures(self, call: Call[Nothing, Listed, Nothing]) -> Erasures:
        """Deleted sites, and how far each is erased"""
        limit, mark = call.query.limit, ("erasures", call.organisation)
        after = self._cursors.take(mark, call.query.cursor)
        rows, more = cut(await erasures.find(call.connection, call.organisation, after, limit + 1), limit)
        last = Place(rows[-1]["requested_at"], UUID(int=rows[-1]["site_id"].int)) if more else None
        return Erasures([Erasure(**row) for row in rows], None if last is None else self._cursors.give(mark, last))

    @operation(PLATFORM, "GET", f"{PATH}/{{id}}", _READS, missing=ERASURE_NOT_FOUND)
    async def erasure(self, call: Call[One, Nothing, Nothing]) -> Erasure:
        """How far a deleted site is erased"""
        return Erasure(**await erasures.get(call.connection, call.path.id))
