"""Claims and rows side by side, in the order of series and time: what is stored, lost, or explained by no record.

Left out: where the claims come from (`reading`).
"""

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from uuid import UUID

from workers.verify import tally
from workers.verify.claims import KEY_BYTES, UNJUDGED, Texts, turned, unpack, unpack_key
from workers.verify.pace import Pace
from workers.verify.reading import Span
from workers.verify.store import NEVER, ROWS_AT_ONCE, Row, SeriesRow, Store
from workers.verify.tally import Finding, Findings, Tally
from workers.verify.times import as_text

_LATE_AT_ONCE: Final = 5_000
_DAY_US: Final = 86_400_000_000
_DOUBLE: Final = struct.Struct(">d")
_VALUE: Final = slice(24, 32)
_GROUP: Final = slice(32, 36)
_FLAGS: Final = slice(36, 40)
_JUDGED: Final = bytes(4)
_LAST_TIME: Final = b"\xff" * 8


class Matching:
    """One table against the claims on it.

    `judged_from` gives for a device the time from which only records that were read can have brought rows.
    """

    def __init__(
        self,
        table: str,
        store: Store,
        span: Span,
        totals: Tally,
        findings: Findings,
        texts: Texts,
        pace: Pace,
        *,
        judged_from: Callable[[UUID], int],
        now: int,
    ) -> None:
        self._table = table
        self._store = store
        self._span = span
        self._tally = totals
        self._findings = findings
        self._texts = texts if table == "text_readings" else None
        self._pace = pace
        self._judged_from = judged_from
        self._now = now
        self._claims: Iterator[bytes] = iter(())
        self._next: bytes | None = None
        self._series: dict[int, SeriesRow] = {}
        self._from: dict[bytes, bytes] = {}
        self._late: list[bytes] = []
        self._late_key = b""
        self._end = turned(self._row_end)
        self.rows = 0
        self.rows_not_judged = 0
        """Rows without a record, brought since the beginning or perhaps by records that the log no longer has."""

    @property
    def _row_end(self) -> int:
        """Of a later reading the record may lie beyond the span."""
        return self._span.until

    async def run(self, claims: Iterator[bytes]) -> None:
        """Judge every claim, and every row that must have one."""
        self._claims = claims
        self._next = next(claims, None)
        after = 0
        while series := await self._store.series(after, self._span.organisation):
            await self._block(series)
            after = series[-1].series_id
        # Of series that are gone: there is nobody to name.
        await self._merge([], b"\xff" * KEY_BYTES, self._end)
        await self._look_up()

    async def _block(self, series: Sequence[SeriesRow]) -> None:
        self._series = {row.series_id: row for row in series}
        froms = {row.series_id: self._judged_from(row.device) for row in series}
        self._from = {series_id.to_bytes(4, "big"): turned(ts) for series_id, ts in froms.items()}
        scan_from = min(froms.values())
        limit = series[-1].series_id.to_bytes(4, "big") + _LAST_TIME
        ids = [row.series_id for row in series]
        after = NEVER
        while scan_from < self._row_end:
            rows = await self._store.rows(self._table, ids, after, scan_from, self._row_end)
            if len(rows) < ROWS_AT_ONCE:
                await self._merge(rows, limit, turned(scan_from))
                break
            await self._merge(rows, rows[-1].key, turned(scan_from))
            series_id, after = unpack_key(rows[-1].key)
            ids = ids[ids.index(series_id) :]
        else:
            await self._merge([], limit, self._end)
        await self._look_up()

    async def _merge(self, rows: Sequence[Row], limit: bytes, scan_from: bytes) -> None:
        """Judge the claims up to the key `limit`; `rows` are all there are up to it, from the time `scan_from` on."""
        standing = {row.key: row for row in rows}
        stored: dict[bytes, int] = {}
        repeated: dict[bytes, int] = {}
        last, row, count = b"", None, 0
        claim = self._next
        while claim is not None and claim[:KEY_BYTES] <= limit:
            count += 1
            key = claim[:KEY_BYTES]
            is_first = key != last
            if is_first:
                last, row = key, standing.pop(key, None)
            if row is not None:
                if claim[_FLAGS] == _JUDGED and claim[_VALUE] == row.value and self._texts is None:
                    group = claim[_GROUP]
                    stored[group] = stored.get(group, 0) + 1
                    if not is_first:
                        repeated[group] = repeated.get(group, 0) + 1
                    elif key[4:] < self._from[key[:4]]:
                        self._tally.add(int.from_bytes(group, "big"), tally.OPEN)
                else:
                    self._judge(claim, row.value, is_first)
            elif scan_from <= key[4:] < self._end:
                self._judge(claim, None, is_first)
            else:
                self._late.append(claim)
                if len(self._late) >= _LATE_AT_ONCE:
                    await self._look_up()
            claim = next(self._claims, None)
        self._next = claim
        for column, counts in ((tally.FOUND, stored), (tally.REPEATED, repeated)):
            for group, number in counts.items():
                self._tally.add(int.from_bytes(group, "big"), column, number)
        for left in standing.values():
            self._judge_row(left)
        self.rows += len(rows)
        await self._pace.spend(max(count, len(rows)), f"comparing {self._table}")

    async def _look_up(self) -> None:
        """Judge the claims on rows that are not read in their order: old ones, and those beyond the span."""
        late, self._late = self._late, []
        if not late:
            return
        found = await self._store.look_up(self._table, {unpack_key(claim[:KEY_BYTES]) for claim in late})
        for claim in late:
            key = claim[:KEY_BYTES]
            self._judge(claim, found.get(key), key != self._late_key)
            self._late_key = key

    def _judge(self, entry: bytes, standing: bytes | None, is_first: bool) -> None:
        claim = unpack(entry)
        if claim.flags & UNJUDGED:
            return
        if standing is not None and self._is_equal(claim.value, standing):
            self._tally.add(claim.group, tally.FOUND)
            if not is_first:
                self._tally.add(claim.group, tally.REPEATED)
            elif entry[4:KEY_BYTES] < self._from.get(entry[:4], b""):
                self._tally.add(claim.group, tally.OPEN)
            return
        series = self._series.get(claim.series_id)
        if standing is None and series is not None and claim.ts < self._now - series.retention_days * _DAY_US:
            self._tally.add(claim.group, tally.RETIRED)
            return
        self._tally.add(claim.group, tally.LOST)
        message = "neither stored nor in quarantine"
        if standing is not None:
            message = f"not in quarantine, and another value is stored: {self._shown(standing)!r}"
        self._findings.add(
            Finding(
                kind="lost",
                message=message,
                **self._names(series),
                time=as_text(claim.ts),
                value=self._shown(claim.value if self._texts is None else self._texts.get(claim.value)),
                partition=claim.partition,
                position=claim.position,
                item=claim.item,
            )
        )

    def _judge_row(self, row: Row) -> None:
        if not row.seen or row.key[4:] < self._from[row.key[:4]]:
            self.rows_not_judged += 1
            return
        series_id, ts = unpack_key(row.key)
        self._findings.add(
            Finding(
                kind="unexplained",
                message="stored, and no record brought it",
                **self._names(self._series.get(series_id)),
                time=as_text(ts),
                value=self._shown(row.value),
            )
        )

    def _is_equal(self, claimed: bytes, standing: bytes) -> bool:
        if self._texts is not None:
            return self._texts.get(claimed) == standing
        return claimed == standing or is_same_number(_DOUBLE.unpack(claimed)[0], _DOUBLE.unpack(standing)[0])

    def _shown(self, value: bytes) -> float | str:
        if self._texts is not None:
            return value.decode()
        number: float = _DOUBLE.unpack(value)[0]
        return number

    def _names(self, series: SeriesRow | None) -> dict[str, Any]:
        if series is None:
            return {}
        return {
            "organisation_id": series.organisation,
            "device_id": series.device,
            "metric": series.metric,
            "label": series.label,
        }


def is_same_number(value: float, standing: float) -> bool:
    """As landing has it: equal within 1e-9 of the larger one."""
    if value == standing or (math.isnan(value) and math.isnan(standing)):
        return True
    least, most = sorted((abs(value), abs(standing)))
    return (value < 0) == (standing < 0) and least >= most * (1 - 1e-9)
