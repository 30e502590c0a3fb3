"""Erases sites step by step: each is a bounded transaction that may be repeated, so that a kill costs nothing.

A site waits until its tokens are dead everywhere and all that stood in the log then has landed: whatever lands later
knows its tombstones. Then its readings go, then what the quarantine has of them, at last what the registry has. Every
worker tries; who has the lock of a site takes a step. Left out: what begins it (the schema's `begin_site_erasure`).
"""

import asyncio
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final
from uuid import UUID

import asyncpg

from runtime.clock import Clock
from runtime.errors import UnavailableError
from runtime.log.port import Log
from runtime.postgres import UNAVAILABLE, PostgresSettings, connect
from workers.erasure import sql
from workers.erasure.metrics import ErasureMetrics
from workers.erasure.settings import ErasureSettings
from workers.landing.quarantine import time_told
from workers.landing.tombstones import Span, within
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.session import DAY, HOUR, NEVER, Range, Session, floored
from workers.rollups.sql import SLICE
from workers.upkeep import OthersTurn, alone, repeat

_log = logging.getLogger("sluice.erasure")

ROLE: Final = "sluice_worker"

_WEEK_US: Final = 7 * 86_400_000_000
_TIMES_MAX: Final = 2**63 - 1
_NO_ID: Final = UUID(int=0)
_DEVICES_AT_ONCE: Final = 100
_ROWS_AT_ONCE: Final = 1_000
#: Of one statement, far beyond any in health: nothing waits for a step that hangs.
_STATEMENT_TIMEOUT_MS: Final = 60_000
#: An index look-up a row is right for every statement; each is planned for the times it is asked about.
_SESSION: Final = {
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_custom_plan",
    "statement_timeout": f"{_STATEMENT_TIMEOUT_MS}ms",
    "lock_timeout": "10000ms",
    "idle_in_transaction_session_timeout": "10000ms",
}


class Eraser:
    """One worker's part. `run` is all of it; it ends by being cancelled and never fails."""

    def __init__(
        self,
        postgres: PostgresSettings,
        settings: ErasureSettings,
        log: Log,
        clock: Clock,
        metrics: ErasureMetrics,
        rollups_metrics: RollupsMetrics,
    ) -> None:
        self._postgres = postgres
        self._settings = settings
        self._log = log
        self._clock = clock
        self._metrics = metrics
        self._rollups_metrics = rollups_metrics
        self._noticed: dict[UUID, float] = {}
        """When a site that waits was seen first, in monotonic seconds."""
        self._doing: str | None = None

    @property
    def doing(self) -> str | None:
        """What an operator should know; None while there is nothing to erase."""
        return self._doing

    async def run(self) -> None:
        """Look every now and then, for ever."""
        await repeat(self.keep, self._settings.erasure_check_s, _log, "sites could not be erased")

    async def keep(self) -> None:
        """Once, as far as each site can be erased now. Raises what the database raises."""
        connection = await self._connect()
        try:
            rows = await connection.fetch(sql.OPEN)
            self._show(rows)
            failures: list[Exception] = []
            for row in rows:
                try:
                    await self._go_on(connection, row)
                except OthersTurn:
                    pass
                except asyncpg.PostgresError as error:  # one site must not hold up the others
                    failures.append(error)
            if failures:
                raise failures[0]
        finally:
            with suppress(*UNAVAILABLE):
                await connection.close()

    async def _connect(self) -> Any:
        connection: Any = await connect(self._postgres, role=ROLE, application="sluice erasure", **_SESSION)
        await connection.set_type_codec(
            "timestamptz", schema="pg_catalog", format="tuple", encoder=lambda us: (us,), decoder=lambda row: row[0]
        )
        return connection

    def _show(self, rows: Sequence[Any]) -> None:
        self._metrics.open.set(len(rows))
        waiting = sum(row["state"] == "waiting" for row in rows)
        self._doing = f"{len(rows)} deleted sites to erase, {waiting} wait for the log to land" if rows else None
        sites = {row["site_id"] for row in rows}
        self._noticed = {site: since for site, since in self._noticed.items() if site in sites}

    async def _go_on(self, connection: Any, row: Any) -> None:
        site = row["site_id"]
        if row["state"] == "waiting" and not await self._may_begin(connection, row):
            return
        await self._erase_readings(connection, site, row["organisation_id"], row["erased_through"] or _NO_ID)
        await self._erase_quarantined(connection, site, row["organisation_id"])
        await self._erase_registered(connection, site, row["organisation_id"])
        _log.info("a site was erased", extra={"site_id": str(site)})

    # ------------------------------------------------------------ waiting

    async def _may_begin(self, connection: Any, row: Any) -> bool:
        """Whether nothing that does not know the tombstones can be written any more."""
        site, now = row["site_id"], self._clock.monotonic()
        if row["ends"] is None:
            if now < self._noticed.setdefault(site, now) + self._settings.erasure_tokens_s:
                return False
            with suppress(UnavailableError):
                ends = {partition: bounds.end for partition, bounds in (await self._log.bounds()).items()}
                await connection.execute(sql.CAPTURE, site, self._log.source, json.dumps(ends))
            row = await connection.fetchrow("SELECT source, ends FROM erasures WHERE site_id = $1", site)
        if row["ends"] is None or not await connection.fetchval(sql.LANDED, row["source"], row["ends"]):
            return False
        await connection.execute(sql.BEGIN_ERASING, site)
        return True

    # ------------------------------------------------------------ erasing

    async def _erase_readings(self, connection: Any, site: UUID, organisation: UUID, through: UUID) -> None:
        """Device by device. Raises `OthersTurn`."""
        while rows := await connection.fetch(sql.DEVICES, site, through, _DEVICES_AT_ONCE):
            for row in rows:
                for span in map(Span, row["firsts"], row["ends"]):
                    for column in sql.COLUMNS:
                        await self._erase_span(connection, site, column, row["series"], span)
                    await self._erase_rolled_up(connection, organisation, row["series"], span)
            through = rows[-1]["device_id"]
            await self._step(connection, site, sql.THROUGH, site, through)

    async def _erase_span(self, connection: Any, site: UUID, column: str, series: Sequence[int], span: Span) -> None:
        """Week by week of those that have rows, so that few chunks are looked into."""
        first, step = span.first, self._settings.erasure_step_rows
        while series and first < span.end:
            first = await connection.fetchval(sql.NEXT[column], series, first, span.end)
            if first is None:
                return
            end = min(span.end, first + _WEEK_US)
            gone = step
            while gone == step:
                gone = await self._step(connection, site, sql.ERASE[column], site, series, first, end, step)
                self._metrics.rows.labels(column).inc(gone)
                await self._pause(gone)
            first = end

    async def _erase_rolled_up(self, connection: Any, organisation: UUID, series: Sequence[int], span: Span) -> None:
        """What is left of readings that retention has let go: of all others a mark leads to it.

        Horizons are asked for once all marks of the span stand: none moves over them from then on.
        """
        horizons = dict(await connection.fetch(sql.WAIT_FOR_HORIZONS, organisation))
        stop = min(span.end, horizons.get("raw", NEVER))
        day = span.first if span.first == NEVER else floored(span.first, DAY)
        session = Session(connection, self._rollups_metrics)
        while series and day < stop:
            found = await connection.fetchval(sql.NEXT_DAY, series, day, stop)
            if found is None:
                return
            for number in {one // SLICE for one in series}:
                of_slice = [one for one in series if one // SLICE == number]
                async with session.holding(number):
                    await self._erase_day(session, organisation, of_slice, span, found)
            await self._pause(self._settings.erasure_step_rows)
            day = found + DAY

    async def _erase_day(
        self, session: Session, organisation: UUID, series: Sequence[int], span: Span, day: int
    ) -> None:
        """Of each tier the buckets that the span touches and that nothing is left to compute from; then the next."""
        horizons = dict(await session.connection.fetch(sql.HORIZONS, organisation))
        ranges = {
            1: [Range(one, day, day + DAY - HOUR) for one in series],
            2: [Range(one, day, day) for one in series],
        }
        for tier, below in enumerate(sql.TIERS):
            if tier:
                await session.compute(tier, ranges[tier])
            stop = min(span.end, day + DAY, horizons.get(below, NEVER))
            if day < stop:
                erase = sql.ERASE_ROLLED_UP[tier]
                done = await session.connection.execute(erase, series, span.first, day, stop)
                self._metrics.rows.labels("rollups").inc(int(done.rpartition(" ")[2]))

    async def _erase_quarantined(self, connection: Any, site: UUID, organisation: UUID) -> None:
        spans: dict[UUID, list[Span]] = {}
        for statement in sql.QUARANTINED:
            received_at, last = -_TIMES_MAX - 1, _NO_ID
            while rows := await connection.fetch(statement, site, organisation, received_at, last, _ROWS_AT_ONCE):
                for device in {row["device_id"] for row in rows} - spans.keys():
                    spans[device] = [Span(*span) for span in await connection.fetch(sql.SPANS, site, device)]
                doomed = [row["quarantine_id"] for row in rows if within((*spans[row["device_id"]],), _time(row))]
                if doomed:
                    gone = await self._step(connection, site, sql.ERASE_QUARANTINED, site, doomed)
                    self._metrics.rows.labels("quarantined").inc(gone)
                    await self._pause(gone)
                received_at, last = rows[-1]["received_at"], rows[-1]["quarantine_id"]

    async def _erase_registered(self, connection: Any, site: UUID, organisation: UUID) -> None:
        is_done = False
        while not is_done:
            most = self._settings.erasure_step_devices
            is_done = await self._step(connection, site, sql.ERASE_ROWS, organisation, site, most)
            await self._pause(self._settings.erasure_step_rows)

    async def _step(self, connection: Any, site: UUID, statement: str, *arguments: Any) -> Any:
        """One transaction. Raises `OthersTurn`."""
        async with alone(connection, sql.ALONE, site):
            return await connection.fetchval(statement, *arguments)

    async def _pause(self, rows: int) -> None:
        """After so many: in whole for a step in whole."""
        share = min(1.0, rows / self._settings.erasure_step_rows)
        await asyncio.sleep(share * self._settings.erasure_pause_ms / 1000)


def _time(row: Any) -> int:
    return time_told(row["payload"], row["received_at"], row["item"])
