"""The books, as an operation. Left out: what is asked of the database (`api.ledger`)."""

from datetime import datetime
from typing import Final, Literal

import msgspec

from api.access.scopes import READINGS_READ
from api.faces import PLATFORM
from api.http.lists import Cursors, CursorText, cut
from api.http.operations import Call, Nothing, Role, needs, operation
from api.http.parameters import Count, Span, limit_within
from api.ledger import DAY, HOUR, Lost, Sums, complete_through, lost_records, read, sums
from api.settings import ApiSettings
from runtime.secrets import KeyRing, Seal

_READS: Final = needs(Role.VIEWER, READINGS_READ)


class Books(Span, kw_only=True):
    """Which hours of receipt, those that begin in the span, and how they are summed up."""

    by: Literal["hour", "day", "source", "total"] = "hour"
    limit: Count | None = None
    cursor: CursorText | None = None


class Ledger(msgspec.Struct):
    """A page of the books; whatever was received up to `complete_through` is in them."""

    data: list[Sums]
    complete_through: datetime | None
    lost_records: Lost
    next_cursor: str | None


class LedgerOperations:
    """`/api/v1/ledger`."""

    def __init__(self, ring: KeyRing, settings: ApiSettings) -> None:
        self._cursors: Cursors[datetime] = Cursors(Seal(ring, "ledger cursor"), datetime)
        self._settings = settings

    @operation(PLATFORM, "GET", "/api/v1/ledger", _READS)
    async def ledger(self, call: Call[Nothing, Books, Nothing]) -> Ledger:
        """What became of the organisation's readings

        By the hour in which they were received: how many were stored, were duplicates or conflicts, or stand in
        quarantine, and what became of those later.
        """
        query, limits = call.query, self._settings
        limit = limit_within(query.limit, limits.api_page_readings_default, limits.api_page_readings_max)
        mark = (call.organisation, query.by, query.start, query.end)
        after = self._cursors.take(mark, query.cursor)
        # First, so that the rows are at least as complete as is said of them.
        complete = await complete_through(call.connection)
        rows, more = cut(await read(call.connection, query.by, query.start, query.end, after, limit + 1), limit)
        next_cursor = self._cursors.give(mark, rows[-1]["start"]) if more and query.by in (HOUR, DAY) else None
        return Ledger([sums(row) for row in rows], complete, await lost_records(call.connection), next_cursor)
