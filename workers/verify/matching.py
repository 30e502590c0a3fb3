"""Claims and rows side by side, in the order of series and time: what is stored, lost, or explained by no record.

Left out: where the claims come from (`reading`).
"""

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final
from uuid import UUID

from workers.landing.tombstones import Spans, within
from workers.verify import notes, tally
from workers.verify.claims import (
    CONTENT,
    GROUP,
    KEY_BYTES,
    NOTED,
    QUALITY,
    TAIL_BYTES,
    UNJUDGED,
    Blobs,
    Claim,
    turned,
    unpack,
    unpack_key,
)
from workers.verify.notes import Noted, Notes
from workers.verify.pace import Pace
from workers.verify.reading import Span
from workers.verify.store import NEVER, ROWS_AT_ONCE, Row, SeriesRow, Store
from workers.verify.tally import Finding, Findings, Tally
from workers.verify.times import as_text

_LATE_AT_ONCE: Final = 5_000
_DAY_US: Final = 86_400_000_000
_DOUBLE: Final = struct.Struct(">d")
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
        blobs: Blobs,
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
        self._blobs = blobs
        self._is_text = table == "text_readings"
        self._notes = Notes(table, store)
        self._pace = pace
        self._judged_from = judged_from
        self._now = now
        self._claims: Iterator[bytes] = iter(())
        self._next: bytes | None = None
        self._series: dict[int, SeriesRow] = {}
        self._from: dict[bytes, bytes] = {}
        self._erased: dict[bytes, Spans] = {}
        """By series, the times of which nothing need stand, and nothing that stands has to have a claim."""
        self._late: list[bytes] = []
        self._late_key = b""
        self._end = turned(self._row_end)
        self.rows = 0
        self.rows_not_judged = 0
        """Rows without a record, brought since the beginning or perhaps by records that the log no longer has."""

    @property
    def notes(self) -> int:
        """Compared."""
        return self._notes.compared

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
        self._find_erased()
        scan_from = min(froms.values())
        limit = series[-1].series_id.to_bytes(4, "big") + _LAST_TIME
        ids = [row.series_id for row in series]
        after = NEVER
        while scan_from < self._row_end:
            rows = await self._store.rows(self._table, ids, after, scan_from, self._row_end)
            await self._learn()
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
            if self._erased and self._is_erased(key):
                self._tell_erased(claim)
            elif row is None:
                await self._judge_absent(claim, scan_from, is_first)
            elif claim[CONTENT] == row.content and not self._is_text:
                group = claim[GROUP]
                stored[group] = stored.get(group, 0) + 1
                if not is_first:
                    repeated[group] = repeated.get(group, 0) + 1
                elif key[4:] < self._from[key[:4]]:
                    self._tally.add(int.from_bytes(group, "big"), tally.OPEN)
            else:
                self._judge(claim, row.content, is_first)
            claim = next(self._claims, None)
        self._next = claim
        for column, counts in ((tally.FOUND, stored), (tally.REPEATED, repeated)):
            for group, number in counts.items():
                self._tally.add(int.from_bytes(group, "big"), column, number)
        for left in standing.values():
            self._judge_row(left)
        self.rows += len(rows)
        await self._check_notes()
        await self._pace.spend(max(count, len(rows)), f"comparing {self._table}")

    async def _judge_absent(self, claim: bytes, scan_from: bytes, is_first: bool) -> None:
        """Of a series that is not among those at hand, and of times that were not read, the row is looked up."""
        if scan_from <= claim[4:KEY_BYTES] < self._end and claim[:4] in self._from:
            self._judge(claim, None, is_first)
            return
        self._late.append(claim)
        if len(self._late) >= _LATE_AT_ONCE:
            await self._look_up()

    async def _look_up(self) -> None:
        """Judge the claims on rows that are not read in their order: old ones, and those beyond the span."""
        late, self._late = self._late, []
        if not late:
            return
        found = await self._store.look_up(self._table, {unpack_key(claim[:KEY_BYTES]) for claim in late})
        await self._learn()
        await self._find_gone(late)
        for claim in late:
            key = claim[:KEY_BYTES]
            if self._is_erased(key):
                self._tell_erased(claim)
            else:
                self._judge(claim, found.get(key), key != self._late_key)
            self._late_key = key
        await self._check_notes()

    async def _check_notes(self) -> None:
        differing = await self._notes.differing()
        if differing:
            await self._learn()
        for claim, noted, matter in differing:
            is_erased = self._is_erased(claim.series_id.to_bytes(4, "big") + turned(claim.ts))
            if not is_erased and not self._is_retired(claim):
                self._tell_altered(claim, noted.value, matter)

    # ------------------------------------------------------------ what is erased

    async def _learn(self) -> None:
        """After rows were read, before they are judged: what is gone by then had its tombstone before."""
        if await self._store.learn():
            self._find_erased()

    def _find_erased(self) -> None:
        spans = self._store.tombstones.spans
        found = {row.series_id: spans.get(row.device.bytes) for row in self._series.values()} if spans else {}
        self._erased = {series_id.to_bytes(4, "big"): one for series_id, one in found.items() if one is not None}

    async def _find_gone(self, claims: Sequence[bytes]) -> None:
        """Series that went with their device since the log was read."""
        unknown = {unpack_key(claim[:KEY_BYTES])[0] for claim in claims} - self._series.keys()
        devices = await self._store.erased_series([*unknown]) if unknown else {}
        for series_id, device in devices.items():
            self._erased[series_id.to_bytes(4, "big")] = self._store.tombstones.spans.get(device.bytes, ())

    def _is_erased(self, key: bytes) -> bool:
        spans = self._erased.get(key[:4])
        return spans is not None and within(spans, unpack_key(key)[1])

    def _tell_erased(self, entry: bytes) -> None:
        claim = unpack(entry)
        if not claim.flags & UNJUDGED:
            self._tally.add(claim.group, tally.ERASED)

    def _judge(self, entry: bytes, standing: bytes | None, is_first: bool) -> None:
        """`standing`: the content of the row at its place."""
        claim = unpack(entry)
        if claim.flags & UNJUDGED:
            return
        is_noted = claim.flags & NOTED
        value = self._blobs.get(claim.value) if is_noted or self._is_text else claim.value
        noted: Noted | None = None
        if is_noted:
            noted = notes.decode(value)
            value = noted.value
        if standing is None or not self._is_equal(value, standing[:-TAIL_BYTES]):
            self._judge_missing(claim, value, standing)
            return
        self._tally.add(claim.group, tally.FOUND)
        if not is_first:
            self._tally.add(claim.group, tally.REPEATED)
        elif entry[4:KEY_BYTES] < self._from.get(entry[:4], b""):
            self._tally.add(claim.group, tally.OPEN)
        elif entry[QUALITY] != standing[-TAIL_BYTES:][:2]:
            flags = int.from_bytes(standing[-TAIL_BYTES:][:2], "big")
            self._tell_altered(claim, value, f"its flags are {flags}, and were {claim.quality} in its record")
        elif noted is not None:
            self._notes.expect(claim, noted)

    def _judge_missing(self, claim: Claim, value: bytes, standing: bytes | None) -> None:
        if standing is None and self._is_retired(claim):
            self._tally.add(claim.group, tally.RETIRED)
            return
        self._tally.add(claim.group, tally.LOST)
        message = "neither stored nor in quarantine"
        if standing is not None:
            shown = self._shown(standing[:-TAIL_BYTES])
            message = f"not in quarantine, and another value is stored: {shown!r}"
        self._tell("lost", claim, value, message)

    def _is_retired(self, claim: Claim) -> bool:
        """Whether its organisation does not keep readings of its time, or has let them go once."""
        series = self._series.get(claim.series_id)
        if series is None:
            return False
        horizon = self._store.tombstones.horizons.get(series.organisation.bytes, NEVER)
        return claim.ts < max(horizon, self._now - series.retention_days * _DAY_US)

    def _tell_altered(self, claim: Claim, value: bytes, message: str) -> None:
        self._tally.add(claim.group, tally.ALTERED)
        self._tell("altered", claim, value, message)

    def _tell(self, kind: str, claim: Claim, value: bytes, message: str) -> None:
        self._findings.add(
            Finding(
                kind=kind,
                message=message,
                **self._names(self._series.get(claim.series_id)),
                time=as_text(claim.ts),
                value=self._shown(value),
                partition=claim.partition,
                position=claim.position,
                item=claim.item,
            )
        )

    def _judge_row(self, row: Row) -> None:
        if self._is_erased(row.key):
            return  # on its way out, or a left-over, which is looked for by itself
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
                value=self._shown(row.content[:-TAIL_BYTES]),
            )
        )

    def _is_equal(self, claimed: bytes, standing: bytes) -> bool:
        if claimed == standing:
            return True
        return not self._is_text and is_same_number(_DOUBLE.unpack(claimed)[0], _DOUBLE.unpack(standing)[0])

    def _shown(self, value: bytes) -> float | str:
        return shown(value, is_text=self._is_text)

    def _names(self, series: SeriesRow | None) -> dict[str, Any]:
        if series is None:
            return {}
        return {
            "organisation_id": series.organisation,
            "device_id": series.device,
            "metric": series.metric,
            "label": series.label,
        }


def shown(value: bytes, *, is_text: bool) -> float | str:
    """For findings."""
    if is_text:
        return value.decode()
    number: float = _DOUBLE.unpack(value)[0]
    return number


def is_same_number(value: float, standing: float) -> bool:
    """As landing has it: equal within 1e-9 of the larger one."""
    if value == standing or (math.isnan(value) and math.isnan(standing)):
        return True
    least, most = sorted((abs(value), abs(standing)))
    return (value < 0) == (standing < 0) and least >= most * (1 - 1e-9)
