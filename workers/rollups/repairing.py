"""Repairs roll-ups where marks say that readings came or went behind their back.

Slice by slice, those with the oldest marks first. Left out: who leaves marks (`workers.landing.marks`).
"""

import asyncio
import time
from typing import Final

import asyncpg

from runtime.postgres import PostgresSettings
from workers.rollups import sql
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.session import DAY, HOUR, MINUTES_5, Range, Session, floored, open_session
from workers.rollups.settings import RollupsSettings

_MARKS_MAX: Final = 5_000


class Repairer:
    """One worker's part; of several one leads, though nothing breaks if more do."""

    def __init__(self, postgres: PostgresSettings, settings: RollupsSettings, metrics: RollupsMetrics) -> None:
        self._postgres = postgres
        self._settings = settings
        self._metrics = metrics
        self._most = 200

    async def keep(self) -> None:
        """Repair all that is marked now, if no other worker is at it. Raises what the database raises."""
        async with open_session(self._postgres, self._metrics) as session:
            if await session.leads("repair"):
                await self.follow(session)

    async def follow(self, session: Session) -> None:
        """Repair all that is marked now."""
        began = time.monotonic()
        newest = await self._show(session)
        if newest is not None:
            await self.repair(session, newest)
            self._metrics.passes.labels("repair").observe(time.monotonic() - began)
            await self._show(session)

    async def repair(self, session: Session, newest: int) -> None:
        """All marks up to `newest`."""
        while (number := await session.connection.fetchval(sql.MARKED, sql.SLICE, newest)) is not None:
            began = time.monotonic()
            try:
                await self._repair_slice(session, number)
            except asyncpg.QueryCanceledError:
                self._most = max(1, self._most // 4)
                raise
            took = time.monotonic() - began
            self._adapt(took)
            await asyncio.sleep(self._settings.rest_s(took))

    async def _show(self, session: Session) -> int | None:
        """Tell what waits; the newest mark of it."""
        waiting = await session.connection.fetchrow(sql.WAITING)
        self._metrics.marks.set(waiting["marks"])
        self._metrics.oldest_mark.set(waiting["age"] or 0)
        newest: int | None = waiting["newest"]
        return newest

    async def _repair_slice(self, session: Session, number: int) -> None:
        """Some marks of a slice, its oldest ones."""
        low = number * sql.SLICE
        seen = await session.connection.fetch(sql.MARKS, low, low + sql.SLICE, self._most)
        for first in sorted({floored(row["first_bucket"], DAY) for row in seen}):
            await session.ensure(first, first + DAY)
        ids = [row["mark_id"] for row in seen]
        async with session.holding(number):
            marks = await session.connection.fetch(sql.STILL_MARKED, ids)
            for tier, width in enumerate((MINUTES_5, HOUR, DAY)):
                ranges = {
                    Range(row["series_id"], floored(row["first_bucket"], width), floored(row["last_bucket"], width))
                    for row in marks
                }
                await session.compute(tier, sorted(ranges))
            await session.connection.execute(sql.UNMARK, [row["mark_id"] for row in marks])

    def _adapt(self, seconds: float) -> None:
        if seconds > self._settings.rollups_step_s:
            self._most = max(1, self._most // 2)
        elif seconds < self._settings.rollups_step_s / 3:
            self._most = min(_MARKS_MAX, self._most * 2)
