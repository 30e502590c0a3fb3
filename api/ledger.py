"""The books over HTTP: what became of an organisation's readings, by the hour in which they were received.

Left out: whether the books tell the truth, which is `sluice verify`'s to find out.
"""

from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, Final
from uuid import UUID

import msgspec
import orjson
from aiohttp import web

from api.auth import READ_SCOPE, Authority, presented_key
from api.errors import invalid_parameter
from api.parameters import Span, known_once, one_of, span
from api.settings import ApiSettings
from runtime.secrets import BadSealError, Seal
from schemas.ledger import COLUMNS, SUMS

PATH: Final = "/api/v1/ledger"

_PARAMETERS: Final = frozenset({"from", "to", "by", "limit", "cursor"})
HOUR, DAY, TOTAL = "hour", "day", "total"
_BY: Final = (HOUR, DAY, TOTAL)


def _with_sums(sql: str) -> str:
    return sql.format(sums=SUMS)


# Row-level security leaves the session's organisation, whose rows stand together in the index.
_ROWS: Final = _with_sums("""
SELECT date_trunc($1, hour, 'UTC') AS start, {sums} FROM ledger
WHERE hour >= coalesce($2::timestamptz, '-infinity') AND hour < coalesce($3::timestamptz, 'infinity')
  AND ($4::timestamptz IS NULL OR date_trunc($1, hour, 'UTC') > $4)
GROUP BY 1 ORDER BY 1 LIMIT $5
""")
_TOTAL: Final = _with_sums("""
SELECT min(hour) AS start, {sums} FROM ledger
WHERE hour >= coalesce($1::timestamptz, '-infinity') AND hour < coalesce($2::timestamptz, 'infinity')
""")
# A partition in which nothing has landed yet says nothing.
_COMPLETE: Final = """
SELECT min(p.received_through) FROM log_positions p JOIN log_generations g USING (source) WHERE g.closed_at IS NULL
"""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class LedgerRoutes:
    """The routes of one application."""

    def __init__(self, authority: Authority, seal: Seal, settings: ApiSettings) -> None:
        self._authority = authority
        self._seal = seal
        self._settings = settings

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get(PATH, self.page, allow_head=False)

    async def page(self, request: web.Request) -> web.Response:
        key = presented_key(request.headers.get("Authorization"))
        query = known_once(request.query, _PARAMETERS)
        by = one_of(query, "by", _BY) or HOUR
        limits = self._settings
        wanted = span(query, limit_default=limits.api_page_readings_default, limit_max=limits.api_page_readings_max)
        async with self._authority.session(key, READ_SCOPE) as session:
            mark = _fingerprint(session.organisation, by, wanted)
            after = None if wanted.cursor is None else self._after(mark, wanted.cursor)
            # First, so that the rows are at least as complete as is said of them.
            complete = await session.connection.fetchval(_COMPLETE)
            rows = await _read(session.connection, by, wanted, after)
        next_cursor = None
        if len(rows) > wanted.limit:
            rows = rows[: wanted.limit]
            next_cursor = self._seal.seal(msgspec.msgpack.encode(_Cursor(mark, _microseconds(rows[-1]["start"]))))
        answer = {"data": [shown(row) for row in rows], "complete_through": complete, "next_cursor": next_cursor}
        return web.Response(body=orjson.dumps(answer, option=orjson.OPT_UTC_Z), content_type="application/json")

    def _after(self, mark: bytes, text: str) -> datetime:
        """Raises the error of a parameter that this service did not give out for this query."""
        try:
            cursor = _decoder.decode(self._seal.open(text))
            after = _EPOCH + timedelta(microseconds=cursor.start_us)
        except (BadSealError, msgspec.DecodeError, OverflowError):
            raise invalid_parameter("cursor", "was not given out by this service") from None
        if cursor.query != mark:
            raise invalid_parameter("cursor", "belongs to a query with other parameters")
        return after


async def _read(connection: Any, by: str, wanted: Span, after: datetime | None) -> list[Any]:
    """One row more than wanted where there is one."""
    if by == TOTAL:
        return [await connection.fetchrow(_TOTAL, wanted.start, wanted.end)]
    rows: list[Any] = await connection.fetch(_ROWS, by, wanted.start, wanted.end, after, wanted.limit + 1)
    return rows


def shown(row: Any) -> dict[str, Any]:
    """A row of the answer. `in_quarantine`: set aside, and neither released nor gone by a rule since."""
    counts = {column: row[column] for column in COLUMNS}
    fates = counts["stored"] + counts["duplicates"] + counts["conflicts"] + counts["quarantined"]
    left = counts["replayed"] + counts["discarded"] + counts["expired"]
    in_quarantine = counts["conflicts"] + counts["quarantined"] - left
    adds_up = counts["received"] == fates and in_quarantine >= 0
    return {"start": row["start"], **counts, "in_quarantine": in_quarantine, "adds_up": adds_up}


class _Cursor(msgspec.Struct, array_like=True, frozen=True):
    query: bytes
    start_us: int


_decoder: Final = msgspec.msgpack.Decoder(_Cursor)


def _microseconds(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)


def _fingerprint(organisation: UUID, by: str, wanted: Span) -> bytes:
    """Of everything that decides which rows follow which; the limit may change from page to page."""
    return blake2b(repr((organisation, by, wanted.start, wanted.end)).encode(), digest_size=12).digest()
