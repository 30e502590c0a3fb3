"""Closes buckets as readings land, and computes them once nobody can write there without leaving a mark.

Three steps, each committed before the next: `closing_through` moves on; an id is given out after it, and waited for
until no older transaction is in flight; then span by span is computed, and `computed_through` follows. Whoever goes
on after a stop begins with the step that is open. Left out: what is repaired (`repairing`).
"""

import asyncio
import time
from typing import Any, Final

from runtime.clock import Clock
from runtime.errors import UnavailableError
from runtime.log.port import Log
from runtime.postgres import PostgresSettings
from schemas.record import PG_EPOCH_US
from workers.rollups import sql
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.session import DAY, HOUR, LATEST, MINUTES_5, NEVER, Range, Session, floored, open_session
from workers.rollups.settings import RollupsSettings

_SETTLE_EVERY_S: Final = 0.05


class Closer:
    """One worker's part; of several one leads."""

    def __init__(
        self, postgres: PostgresSettings, settings: RollupsSettings, log: Log, clock: Clock, metrics: RollupsMetrics
    ) -> None:
        self._postgres = postgres
        self._settings = settings
        self._log = log
        self._clock = clock
        self._metrics = metrics
        self._span = HOUR
        self.trouble: str | None = None
        """What an operator should know."""

    async def keep(self) -> None:
        """One pass, if no other worker is at it. Raises what the database raises."""
        async with open_session(self._postgres, self._metrics) as session:
            if await session.leads("closing"):
                await self.follow(session)
            else:
                self.trouble = None

    async def follow(self, session: Session) -> None:
        """Close what has landed and compute what is closed."""
        began = time.monotonic()
        connection = session.connection
        await self._close(connection)
        state = await self._settled(connection)
        if state is None:
            self._metrics.unsettled.inc()
            self.trouble = "a transaction that has been open for long holds the roll-ups up: see pg_stat_activity"
        else:
            self.trouble = None
            computed, closing = state
            if computed < closing:
                await self._compute(session, computed, closing)
                self._metrics.passes.labels("close").observe(time.monotonic() - began)
        await self._show(connection)

    # ------------------------------------------------------------ how far

    async def _close(self, connection: Any) -> None:
        landed = await self._landed(connection)
        if landed is not None:
            await connection.execute(sql.LANDED_THROUGH, landed)
        state = await connection.fetchrow(sql.STATE)
        if state["computed_through"] < state["closing_through"]:
            return  # what was closed is computed first: an id that is waited for is not given up for a younger one
        if landed is not None:
            end = floored(landed - round(self._settings.rollups_delay_s * 1e6))
            await connection.execute(sql.CLOSE, end)

    async def _landed(self, connection: Any) -> int | None:
        """Everything received before this time has landed, as far as the log knows; None if nothing is known.

        A partition that has landed to its end, looked at after the time was noted, has landed what was received then.
        """
        now = self._clock.now_us() - PG_EPOCH_US
        try:
            ends = await self._log.bounds()
        except UnavailableError:
            return None
        through = now
        standing = {row["partition"]: row for row in await connection.fetch(sql.LANDED, self._log.source)}
        for partition, bounds in ends.items():
            row = standing.get(partition)
            if row is None or row["position"] < bounds.end:
                received = None if row is None else row["received_through"]
                if received is None:
                    return None
                through = min(through, received)
        return through

    async def _settled(self, connection: Any) -> tuple[int, int] | None:
        """From where to where buckets may be computed; None if older transactions stay in flight for too long."""
        until = self._clock.monotonic() + self._settings.rollups_settle_s
        while True:
            state = await connection.fetchrow(sql.STATE)
            computed, closing = state["computed_through"], state["closing_through"]
            if computed == closing or state["is_settled"]:
                return computed, closing
            if not state["is_numbered"]:
                await connection.execute(sql.NUMBER, closing)
            elif self._clock.monotonic() >= until:
                return None
            else:
                await asyncio.sleep(_SETTLE_EVERY_S)

    # ------------------------------------------------------------ computing

    async def _compute(self, session: Session, computed: int, closing: int) -> None:
        """Span by span. Times without any reading are passed over in one."""
        if computed == NEVER:  # nothing stands before the first reading
            computed = await self._move(session, NEVER, floored(await self._next(session, NEVER, closing)))
        is_empty = False
        while computed < closing:
            stop = min(closing, floored(computed + self._span))
            if is_empty and closing - computed > DAY:
                stop = max(stop, floored(await self._next(session, computed, closing)))
            is_empty = not await self._compute_span(session, computed, stop)
            computed = await self._move(session, computed, stop)

    async def _move(self, session: Session, computed: int, stop: int) -> int:
        """`computed_through` goes on to `stop`. Raises `UnavailableError` if it is not where this worker left it."""
        if await session.connection.execute(sql.COMPUTED, computed, stop) != "UPDATE 1":
            raise UnavailableError("the roll-ups are computed by another session")
        return stop

    async def _next(self, session: Session, first: int, stop: int) -> int:
        """The time of the first reading of `[first, stop)`, `stop` if there is none."""
        found = stop
        for row in await session.connection.fetch(sql.SLICES, sql.SLICE):
            low = row["slice"] * sql.SLICE
            earliest = await session.connection.fetchval(sql.NEXT, low, low + sql.SLICE, first, found)
            found = found if earliest is None else earliest
        return found

    async def _compute_span(self, session: Session, first: int, stop: int) -> int:
        """Buckets of all tiers that end after `first`, and by `stop`: how many of the finest there are."""
        await session.ensure(floored(first, DAY), stop)
        rows, slowest = 0, 0.0
        for row in await session.connection.fetch(sql.SLICES, sql.SLICE):
            began = time.monotonic()
            rows += await self._compute_slice(session, row["slice"], first, stop)
            took = time.monotonic() - began
            slowest = max(slowest, took)
            await asyncio.sleep(self._settings.rest_s(took))
        if slowest > self._settings.rollups_step_s:
            self._span = max(MINUTES_5, floored(self._span // 2))
        elif slowest < self._settings.rollups_step_s / 3:
            self._span = min(DAY, self._span * 2)
        return rows

    async def _compute_slice(self, session: Session, number: int, first: int, stop: int) -> int:
        low = number * sql.SLICE
        async with session.holding(number):
            series = await session.connection.fetchval(sql.SERIES, low, low + sql.SLICE)
            rows = 0
            for tier, width in enumerate((MINUTES_5, HOUR, DAY)):
                head, end = floored(first, width), floored(stop, width)
                ranges = [Range(series_id, head, end - width) for series_id in series or () if head < end]
                count = await session.compute(tier, ranges)
                rows += count if tier == 0 else 0
        return rows

    async def _show(self, connection: Any) -> None:
        computed = (await connection.fetchrow(sql.STATE))["computed_through"]
        if NEVER < computed < LATEST:
            self._metrics.lag.set((self._clock.now_us() - PG_EPOCH_US - computed) / 1e6)
