"""The books: what became of an organisation's readings, by the hour in which they were received.

Left out: HTTP (`api.platform.ledger`), and whether the books tell the truth, which is `sluice verify`'s to find out.
"""

from datetime import datetime
from typing import Any, Final
from uuid import UUID

import msgspec

from schemas.ledger import COLUMNS, FATES, LOST_RECORDS, SUMS

HOUR, DAY, SOURCE, TOTAL = "hour", "day", "source", "total"


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
_BY_SOURCE: Final = _with_sums("""
SELECT min(hour) AS start, source, {sums} FROM ledger
WHERE hour >= coalesce($1::timestamptz, '-infinity') AND hour < coalesce($2::timestamptz, 'infinity')
GROUP BY source ORDER BY start, source LIMIT $3
""")
# What has landed of each partition, or, where nothing comes any more, what the workers saw to be all of it.
_COMPLETE: Final = """
SELECT greatest(min(p.received_through), (SELECT nullif(landed_through, '-infinity') FROM rollup_state))
FROM log_positions p JOIN log_generations g USING (source) WHERE g.closed_at IS NULL
"""


class Lost(msgspec.Struct):
    """Records of the whole installation that were lost: nobody can tell any more whose they were."""

    log: int
    spool: int


async def complete_through(connection: Any) -> datetime | None:
    """The receive time up to which every partition has landed; None where nothing has."""
    time: datetime | None = await connection.fetchval(_COMPLETE)
    return time


async def lost_records(connection: Any) -> Lost:
    return Lost(**await connection.fetchrow(LOST_RECORDS))


async def read(
    connection: Any, by: str, start: datetime | None, end: datetime | None, after: datetime | None, limit: int
) -> list[Any]:
    """Sums of the hours that begin in `[start, end)`: by hour or day those after `after`, by source, or in all."""
    if by == TOTAL:
        return [await connection.fetchrow(_TOTAL, start, end)]
    if by == SOURCE:
        sources: list[Any] = await connection.fetch(_BY_SOURCE, start, end, limit)
        return sources
    rows: list[Any] = await connection.fetch(_ROWS, by, start, end, after, limit)
    return rows


class Sums(msgspec.Struct, kw_only=True):
    """What became of the readings received from `start` on, for an hour, a day, or all the time asked for."""

    start: datetime | None
    source: UUID | msgspec.UnsetType = msgspec.UNSET
    """The log's generation or the spool that they came through, where they are told apart by it."""
    received: int
    stored: int
    duplicates: int
    conflicts: int
    quarantined: int
    erased: int
    """Of a deleted site: dropped in landing, or taken out of the quarantine; what was stored stays told as stored."""
    replayed: int
    discarded: int
    expired: int
    lost: int
    """Told of nobody so far: what is lost cannot be read, see `lost_records`."""
    handed_over: int
    """Of those in quarantine: gone to another organisation, with their device."""
    taken_over: int
    """Beside those received: come into the quarantine with a device that was another organisation's."""
    in_quarantine: int
    """Set aside, and neither released nor gone by a rule since."""
    adds_up: bool


def sums(row: Any) -> Sums:
    counts = {column: row[column] for column in COLUMNS}
    fates = sum(counts[fate] for fate in FATES)
    left = counts["replayed"] + counts["discarded"] + counts["expired"]
    set_aside = counts["conflicts"] + counts["quarantined"] + counts["taken_over"] - counts["handed_over"]
    in_quarantine = set_aside - left
    adds_up = counts["received"] == fates and in_quarantine >= 0
    source = row.get("source", msgspec.UNSET)
    return Sums(start=row["start"], source=source, **counts, in_quarantine=in_quarantine, adds_up=adds_up)
