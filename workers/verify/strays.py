"""Rows under a series id that no series has: nobody's, and seen by nobody, whatever brought them.

They are looked for between the ids of series that there are. Left out: rows of series (`matching`).
"""

from collections.abc import AsyncIterator
from typing import Final

from workers.verify.claims import TAIL_BYTES, unpack_key
from workers.verify.matching import shown
from workers.verify.pace import Pace
from workers.verify.reading import Span
from workers.verify.store import NEVER, ROWS_AT_ONCE, Gap, Row, Store
from workers.verify.tally import Finding, Findings
from workers.verify.times import as_text

_FIRST_ID: Final = -(2**31)
_LAST_ID: Final = 2**31 - 1
_GAPS_AT_ONCE: Final = 500


async def find_strays(store: Store, table: str, span: Span, findings: Findings, pace: Pace) -> None:
    """Tell of every such row with a time in the span. One that lands meanwhile has its series by then."""
    async for gaps in _gaps(store):
        left, after = gaps, NEVER
        while left:
            rows = await store.strays(table, left, after, span.since, span.until)
            for row in rows:
                if row.seen:
                    findings.add(_finding(table, row))
            await pace.spend(len(rows), f"looking for series of {table}")
            if len(rows) < ROWS_AT_ONCE:
                break
            series_id, after = _place(rows[-1])
            left = [gap for gap in left if gap.last >= series_id]
            left[0] = Gap(series_id, left[0].last)


async def _gaps(store: Store) -> AsyncIterator[list[Gap]]:
    """All ids of no series, in order."""
    found: list[Gap] = []
    after = next_id = _FIRST_ID
    while ids := await store.series_ids(after):
        for series_id in ids:
            if series_id > next_id:
                found.append(Gap(next_id, series_id - 1))
            next_id = series_id + 1
            if len(found) == _GAPS_AT_ONCE:
                yield found
                found = []
        after = ids[-1]
    if next_id <= _LAST_ID:
        found.append(Gap(next_id, _LAST_ID))
    if found:
        yield found


def _finding(table: str, row: Row) -> Finding:
    series_id, ts = _place(row)
    return Finding(
        kind="unexplained",
        message=f"stored in {table} under series {series_id}, which does not exist",
        time=as_text(ts),
        value=shown(row.content[:-TAIL_BYTES], is_text=table == "text_readings"),
    )


def _place(row: Row) -> tuple[int, int]:
    """Series and time. Claims know no id below 0."""
    series_id, ts = unpack_key(row.key)
    return (series_id if series_id <= _LAST_ID else series_id - 2**32), ts
