"""`sluice verify`: the log read again, the store beside it, the ledger beside both.

Positions first; then only what lies below them, a snapshot a slice, so that a live system goes on unhindered and
nothing that lands meanwhile is mistaken for a difference. Left out: opening the log and printing (`deploy`).
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from uuid import UUID

from runtime.clock import Clock
from runtime.errors import ConfigurationError
from runtime.log.port import Log
from runtime.postgres import PostgresSettings
from schemas.topics import partition_of
from workers.settings import LandingSettings
from workers.verify import ledger, tally
from workers.verify.claims import Blobs, Sorter
from workers.verify.ledger import Compared
from workers.verify.leftovers import find_left_overs
from workers.verify.matching import Matching
from workers.verify.pace import Pace
from workers.verify.reading import Covered, LogReading, Span, Target, oldest_received
from workers.verify.settings import VerifySettings
from workers.verify.store import ALWAYS, NEVER, Start, Store, Tombstone, open_store
from workers.verify.strays import find_strays
from workers.verify.tally import HOUR_US, Finding, Findings, Group, Tally

#: How long after its receive time a record may be appended, and how far the clocks of ingest's machines may differ.
_SLACK_US: Final = 60_000_000


@dataclass
class Totals:
    """What became of the readings of an organisation; `by_rule`: discarded, expired, or beyond the retention.

    `erased`: of a site that is, or is being, erased.

    `altered` of those stored have other flags than their records, or another note.
    """

    received: int = 0
    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0
    quarantined: int = 0
    by_rule: int = 0
    erased: int = 0
    lost: int = 0
    altered: int = 0
    unexplained: int = 0


@dataclass
class Report:
    """What was verified, and how much of everything that is."""

    source: UUID
    organisations: dict[UUID, Totals]
    findings: Findings
    covered: dict[int, Covered]
    judged_from: dict[int, int]
    """By partition: rows of earlier times may have been brought by records that were not read."""
    compared: Compared
    repeats: int
    rows: int
    rows_not_judged: int
    notes_compared: int
    notes: list[str] = field(default_factory=list)
    """What was not covered, and why."""

    @property
    def differs(self) -> bool:
        return self.findings.count > 0

    @property
    def records(self) -> int:
        """Read, whether or not they lie in the span."""
        return sum(part.records for part in self.covered.values())

    @property
    def readings(self) -> int:
        return sum(part.readings for part in self.covered.values())

    @property
    def judged(self) -> int:
        """Readings that were received in the span."""
        return sum(totals.received for totals in self.organisations.values())

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing to compare with anything."""
        return not (self.judged or self.compared.hours or self.compared.set_aside or self.findings.count)


class Verification:
    """One run."""

    def __init__(
        self,
        postgres: PostgresSettings,
        settings: VerifySettings,
        landing: LandingSettings,
        log: Log,
        span: Span,
        *,
        clock: Clock,
        emit: Callable[[Finding], None],
        say: Callable[[str], None],
    ) -> None:
        self._postgres = postgres
        self._settings = settings
        self._future_us = round(landing.landing_future_s * 1e6)
        self._log = log
        self._span = span
        self._pace = Pace(settings.verify_rate, clock, say)
        self._findings = Findings(emit)
        self._tally = Tally()
        self._compared = Compared()
        self._finished: list[Tombstone] = []

    async def run(self) -> Report:
        """Raises `UnavailableError`, `ConfigurationError`."""
        try:
            directory = TemporaryDirectory(prefix="sluice-verify-", dir=self._settings.verify_dir or None)
        except OSError as error:
            raise ConfigurationError(f"SLUICE_VERIFY_DIR: {error}") from error
        with directory as path:
            async with open_store(self._postgres, self._log.source) as store:
                return await self._run(store, Path(path))

    async def _run(self, store: Store, directory: Path) -> Report:
        booked_from = await self._booked_from()
        start = await self._begin(store, booked_from)
        with closing(Blobs(directory)) as blobs:
            target = self._target(directory, blobs)
            log = LogReading(self._log, store, self._span, target, self._pace, knows_beginnings=start.is_first)
            await log.run(start.positions)
            judged_from = {partition: self._judged_from(start, part) for partition, part in log.covered.items()}
            matched = [
                await self._match(store, table, sorter, blobs, judged_from, start.now)
                for table, sorter in (("readings", target.numbers), ("text_readings", target.words))
            ]
        if self._span.organisation is None:
            for table in ("readings", "text_readings"):
                await find_strays(store, table, self._span, self._findings, self._pace)
        await find_left_overs(store, self._finished, self._span, self._findings, self._pace)
        self._compare_ledger(start, log.covered, booked_from)
        report = Report(
            source=self._log.source,
            organisations=self._totals(),
            findings=self._findings,
            covered=log.covered,
            judged_from=judged_from,
            compared=self._compared,
            repeats=log.repeats,
            rows=sum(one.rows for one in matched),
            rows_not_judged=sum(one.rows_not_judged for one in matched),
            notes_compared=sum(one.notes for one in matched),
        )
        report.notes = _notes(report, start, self._span)
        return report

    def _target(self, directory: Path, blobs: Blobs) -> Target:
        numbers, words = (
            Sorter(directory, name, self._settings.verify_sort_readings_max) for name in ("readings", "text_readings")
        )
        return Target(self._tally, self._findings, numbers, words, blobs)

    async def _match(
        self, store: Store, table: str, sorter: Sorter, blobs: Blobs, judged_from: dict[int, int], now: int
    ) -> Matching:
        matching = Matching(
            table,
            store,
            self._span,
            self._tally,
            self._findings,
            blobs,
            self._pace,
            judged_from=lambda device: judged_from[partition_of(device.bytes, self._log.partitions)],
            now=now,
        )
        await matching.run(sorter.in_order())
        return matching

    def _compare_ledger(self, start: Start, covered: dict[int, Covered], booked_from: int) -> None:
        whole_from = {
            partition: max(booked_from, self._appended_by(start, part)) for partition, part in covered.items()
        }
        ledger.compare(self._tally, self._findings, self._compared, lambda group: self._is_whole(group, whole_from))

    async def _booked_from(self) -> int:
        """The ledger reaches back further than the log: of older hours there is nothing to compare."""
        oldest = await oldest_received(self._log)
        return max(self._span.since, oldest if oldest in (NEVER, ALWAYS) else oldest - oldest % HOUR_US)

    async def _begin(self, store: Store, booked_from: int) -> Start:
        """Positions, and the books as they stood with them."""
        span = self._span
        async with store.begin() as start:
            organisations = await store.organisations(span.organisation)
            self._finished = await store.finished(span.organisation)
            async for group, booked in store.ledger(booked_from, span.until, span.organisation):
                self._tally.book(group, booked)
            await self._compare_set_aside(store, organisations)
            for loss in await store.losses(span.since, span.until) if span.organisation is None else ():
                self._findings.add(
                    Finding(
                        kind="gap",
                        message=f"records {loss.first} to {loss.end - 1} were gone from the log before they landed",
                        source=loss.source,
                        partition=loss.partition,
                        position=loss.first,
                        readings=loss.end - loss.first,
                    )
                )
        return start

    async def _compare_set_aside(self, store: Store, organisations: Sequence[UUID]) -> None:
        """The ledger and the quarantine know of hours of which the log has no record any more."""
        first, end = _whole_hours(self._span)
        for organisation in organisations if first < end else ():
            async for group, found in store.set_aside(organisation, first, end):
                ledger.compare_set_aside(group, found, self._findings, self._compared)

    # ------------------------------------------------------------ what can be judged

    def _appended_by(self, start: Start, part: Covered) -> int:
        """No record that was not read was appended later. Its readings cannot be much newer."""
        if start.is_first and part.start == 0 and not part.is_broken:
            return NEVER
        if part.start == 0 and not part.is_broken:
            return start.created_at + _SLACK_US
        return ALWAYS if part.direct_received is None else part.direct_received + _SLACK_US

    def _judged_from(self, start: Start, part: Covered) -> int:
        """Rows from this time on were brought by records that were read: nothing lands from far ahead."""
        appended = max(self._appended_by(start, part), self._span.since)
        return appended if appended in (NEVER, ALWAYS) else min(ALWAYS, appended + self._future_us)

    def _is_whole(self, group: Group, whole_from: dict[int, int]) -> bool:
        """Whether every record of the hour was read: from its first moment on, in the span."""
        first = group.hour * HOUR_US
        if first < self._span.since or first + HOUR_US > self._span.until:
            return False
        if group.source == self._log.source.bytes:
            return first >= whole_from.get(group.partition, ALWAYS)
        # A spool's records may have been drained into any part of the log, or into the log before.
        return all(begin == NEVER for begin in whole_from.values())

    def _totals(self) -> dict[UUID, Totals]:
        found: dict[UUID, Totals] = {}
        for group, counts, _ in self._tally.groups():
            totals = found.setdefault(UUID(bytes=group.organisation), Totals())
            duplicates = min(counts[tally.FOUND], max(counts[tally.REPEATED], counts[tally.TOLD]))
            totals.received += counts[tally.RECEIVED]
            totals.stored += counts[tally.FOUND] - duplicates
            totals.duplicates += duplicates
            totals.conflicts += counts[tally.CONFLICTS]
            totals.quarantined += counts[tally.QUARANTINED]
            totals.by_rule += counts[tally.DISCARDED] + counts[tally.EXPIRED] + counts[tally.RETIRED]
            totals.erased += counts[tally.ERASED]
            totals.lost += counts[tally.LOST]
            totals.altered += counts[tally.ALTERED]
        for (organisation, kind), count in self._findings.counts.items():
            if kind == "unexplained" and organisation is not None:
                found.setdefault(organisation, Totals()).unexplained += count
        return found


def _whole_hours(span: Span) -> tuple[int, int]:
    """The beginning of the first, and the end of the last."""
    first = span.since if span.since == NEVER else -(-span.since // HOUR_US) * HOUR_US
    end = span.until if span.until == ALWAYS else span.until // HOUR_US * HOUR_US
    return first, end


def _notes(report: Report, start: Start, span: Span) -> list[str]:
    notes = []
    if report.is_empty:
        notes.append(
            "nothing was compared: neither the log nor the books have anything that was received in the span"
        )
    elif not report.judged:
        notes.append("no reading was compared: the log has none that was received in the span")
    truncated = [partition for partition, part in report.covered.items() if part.start > 0]
    if truncated:
        records = sum(report.covered[partition].start for partition in truncated)
        notes.append(f"{records} landed records are no longer in the log, of {len(truncated)} partitions")
    broken = [partition for partition, part in report.covered.items() if part.is_broken]
    if broken:
        notes.append(f"the log deleted records of partitions {broken} while they were being read")
    if not start.is_first:
        notes.append("records of earlier generations of the log were not read")
    if report.rows_not_judged:
        notes.append(
            f"{report.rows_not_judged} rows without a record landed meanwhile, or may have come from records not read"
        )
    if report.compared.not_whole:
        notes.append(f"{report.compared.not_whole} rows of the ledger are of hours that were not read whole")
    if report.compared.forgotten:
        notes.append(
            f"{report.compared.forgotten} readings left the quarantine longer ago than it is remembered "
            "(SLUICE_BOOKS_MEMORY_DAYS): whether as replayed, discarded or expired was not compared"
        )
    if span.organisation is not None:
        notes.append("rows of series that do not exist are no organisation's: they were not looked for")
    return notes
