"""Lets go what nobody keeps any more: announces how far that is, waits until nobody stores there, and drops it.

Each step is committed before the next and may be repeated, so that a kill costs nothing:

1. `refused_through` moves on: from then on landing refuses what is older.
2. An id is given out, and waited for until no older transaction is in flight: whoever lands knows the horizon.
3. `dropped_through` follows once all before it is computed and has no mark: nothing is computed anew there.
   A computation under way is waited for, slice by slice, since a chunk would vanish under its snapshot.
4. Chunks before which all organisations' horizons lie are dropped; of others, rows of those who keep less go.

Commands that are over go by their age alone, with each pass.

Left out: what may go (`planning`), how a chunk is dropped (the schema's `drop_retired`).
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

from runtime.postgres import PostgresSettings, transaction
from workers.retention import sql
from workers.retention.metrics import REASONS, RetentionMetrics
from workers.retention.planning import TIERS, Chunk, Days, Horizon, Share, Standing, effective, retired, shares
from workers.retention.settings import RetentionSettings
from workers.rollups import sql as rollups
from workers.rollups.metrics import RollupsMetrics
from workers.rollups.session import DAY, NEVER, Session, open_session
from workers.upkeep import repeat

_log = logging.getLogger("sluice.retention")

_SETTLE_EVERY_S: Final = 0.05
_SERIES_AT_ONCE: Final = 200


class Went(NamedTuple):
    """What a pass let go: whole chunks, how many rows of those who keep less than others, and how many commands."""

    chunks: list[Chunk]
    rows: Mapping[Share, int]
    commands: int


class Retention:
    """One worker's part. `run` is all of it; it ends by being cancelled and never fails."""

    def __init__(
        self,
        postgres: PostgresSettings,
        settings: RetentionSettings,
        metrics: RetentionMetrics,
        rollups_metrics: RollupsMetrics,
    ) -> None:
        self._postgres = postgres
        self._settings = settings
        self._metrics = metrics
        self._rollups_metrics = rollups_metrics
        self.doing: str | None = None
        """What an operator should know."""

    async def run(self) -> None:
        """Look every now and then, for ever."""
        self._metrics.passed.set_to_current_time()
        await repeat(self.keep, self._settings.retention_check_s, _log, "what is beyond retention could not go")

    async def keep(self) -> None:
        """Once, unless another worker is at it. Raises what the database raises."""
        try:
            async with open_session(self._postgres, self._rollups_metrics) as session:
                if await session.connection.fetchval(sql.LEAD):
                    await self.follow(session)
                else:
                    self._tell([], "")
                    self._metrics.shares.set(0)
        except Exception:
            self._metrics.waiting.labels("failed").set(1)
            raise

    async def follow(self, session: Session) -> Went:
        """Let go what may go now."""
        connection = session.connection
        await self._make_ahead(session)
        await self._announce(connection)
        why = await self._advance(connection)
        standing = await self.look(connection)
        await self._wait_for_computations(session, standing)
        went = await self._drop(connection, standing)
        standing = await self.look(connection)
        self._show(standing)
        rows = await self._delete_rows(connection, standing)
        commands = await self._forget_commands(connection)
        self._tell(retired(standing), why or "locked")
        self._show(await self.look(connection))
        self._metrics.passed.set_to_current_time()
        return Went(went, rows, commands)

    async def look(self, connection: Any) -> Standing:
        """How everything stands."""
        settings = self._settings
        defaults = 0, settings.retention_5m_days, settings.retention_1h_days, settings.retention_1d_days
        now = await connection.fetchval(sql.NOW)
        rows = await connection.fetch(sql.ORGANISATIONS)
        days: dict[UUID, Days] = {row[0]: effective(tuple(row)[1:], defaults) for row in rows}
        horizons = {(row[0], row[1]): Horizon(*tuple(row)[2:]) for row in await connection.fetch(sql.HORIZONS)}
        chunks = [Chunk(*row) for row in await connection.fetch(sql.CHUNKS)]
        return Standing(now, days, horizons, chunks)

    # ------------------------------------------------------------ how far

    async def _announce(self, connection: Any) -> None:
        standing = await self.look(connection)
        moved = [
            (organisation, tier, through)
            for organisation in standing.days
            for tier, through in standing.wanted(organisation).items()
            if through > standing.horizon(organisation, tier).refused
        ]
        if moved:
            await connection.execute(sql.ANNOUNCE, *(list(column) for column in zip(*moved, strict=True)))

    async def _advance(self, connection: Any) -> str:
        """Let go what nobody stores and nobody has to compute any more; else why not all of it."""
        if not await self._settled(connection):
            return "unsettled"
        why = ""
        computed = await connection.fetchval(sql.COMPUTED)
        for organisation, tier, through in await connection.fetch(sql.SETTLED):
            below = TIERS[TIERS.index(tier) - 1] if tier != TIERS[0] else None
            async with transaction(connection):
                await connection.execute(sql.HOLD, organisation, tier)
                moved = await connection.execute(sql.ADVANCE, organisation, tier, through, below)
            if moved != "UPDATE 1":
                why = "uncomputed" if computed < through else why or "marked"
        return why

    async def _settled(self, connection: Any) -> bool:
        """Whether everybody who stores knows what was announced."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._settings.retention_settle_s
        while True:
            state = await connection.fetchrow(sql.STATE)
            if state["is_settled"] or not state["announced_epoch"]:
                return True
            if not state["is_numbered"]:
                await connection.execute(sql.NUMBER, state["announced_epoch"])
            elif loop.time() >= until:
                return False
            else:
                await asyncio.sleep(_SETTLE_EVERY_S)

    async def _wait_for_computations(self, session: Session, standing: Standing) -> None:
        """Whoever holds a slice from now on sees the horizons."""
        if any(one.deleted < one.dropped for one in standing.horizons.values()) or _gone(standing):
            for row in await session.connection.fetch(rollups.SLICES, rollups.SLICE):
                async with session.holding(row["slice"]):
                    pass

    # ------------------------------------------------------------ letting go

    async def _drop(self, connection: Any, standing: Standing) -> list[Chunk]:
        went: list[Chunk] = []
        for chunk in _gone(standing):
            dropped = await self._try_to_drop(connection, chunk)
            if dropped is not None:
                went.append(chunk)
                self._metrics.chunks.labels(chunk.tier).inc()
                self._metrics.bytes.labels(chunk.tier).inc(dropped)
                _log.info("a chunk beyond retention was dropped", extra={"chunk": chunk.name, "bytes": dropped})
        return went

    async def _try_to_drop(self, connection: Any, chunk: Chunk) -> int | None:
        """How many bytes that was; None if it stands."""
        wait_ms = self._settings.retention_lock_timeout_ms
        for _ in range(self._settings.retention_lock_tries):
            try:
                async with transaction(connection):
                    await connection.execute(f"SET LOCAL lock_timeout = {wait_ms}")
                    dropped: int | None = await connection.fetchval(sql.DROP, chunk.name)
                    return dropped
            except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
                await asyncio.sleep(2 * wait_ms / 1000)
        return None

    async def _delete_rows(self, connection: Any, standing: Standing) -> dict[Share, int]:
        gone: dict[Share, int] = {}
        for (organisation, tier), horizon in standing.horizons.items():
            if horizon.deleted < horizon.dropped:
                gone |= await self._delete_behind(connection, standing, organisation, tier)
        return gone

    async def _delete_behind(
        self, connection: Any, standing: Standing, organisation: UUID, tier: str
    ) -> dict[Share, int]:
        """Up to a chunk that goes as a whole later, or that the horizon cuts."""
        gone: dict[Share, int] = {}
        horizon, passed = standing.horizon(organisation, tier), standing.passed(tier)
        until = horizon.dropped
        chunks = [one for one in standing.chunks if one.tier == tier and one.stop > horizon.deleted]
        for chunk in sorted(chunks, key=lambda one: one.first):
            if chunk.stop <= passed or chunk.stop > horizon.dropped:
                until = max(horizon.deleted, min(until, chunk.first))
                break
            first = max(chunk.first, horizon.deleted)
            rows = await self._delete(connection, organisation, chunk.relation, first, chunk.stop)
            if rows:
                gone[Share(organisation, chunk)] = rows
        if until > horizon.deleted:
            if tier == "raw":
                await self._delete(connection, organisation, "reading_notes", horizon.deleted, until)
            await connection.execute(sql.DELETED, organisation, tier, horizon.deleted, until)
        return gone

    async def _delete(self, connection: Any, organisation: UUID, table: str, first: int, stop: int) -> int:
        """How many rows that were."""
        after, rows = 0, 0
        while series := await self._series(connection, organisation, after):
            rows += await self._in_steps(connection, table, sql.DELETE[table], series, first, stop)
            after = series[-1]
        return rows

    async def _forget_commands(self, connection: Any) -> int:
        """How many were over for long enough; one that is open stays, however old it is."""
        days = self._settings.retention_commands_days
        return await self._in_steps(connection, "commands", sql.FORGET_COMMANDS, days) if days else 0

    async def _in_steps(self, connection: Any, table: str, statement: str, *arguments: Any) -> int:
        """How many rows it deleted, so many at once as it is told behind its arguments, until fewer are left."""
        step, rows = self._settings.retention_step_rows, 0
        gone = step
        while gone == step:
            done = await connection.execute(statement, *arguments, step)
            gone = int(done.rpartition(" ")[2])
            rows += gone
            self._metrics.rows.labels(table).inc(gone)
            await asyncio.sleep(min(1.0, gone / step) * self._settings.retention_pause_ms / 1000)
        return rows

    async def _series(self, connection: Any, organisation: UUID, after: int) -> list[int]:
        return [row[0] for row in await connection.fetch(sql.SERIES, organisation, after, _SERIES_AT_ONCE)]

    # ------------------------------------------------------------ beside

    async def _make_ahead(self, session: Session) -> None:
        """Partitions of the weeks to come, where the database does not make them by itself."""
        if await session.connection.fetchval(sql.IS_EXTENDED):
            return
        now = await session.connection.fetchval(sql.NOW)
        weeks = self._settings.retention_ahead_weeks
        for week in range(weeks + 1):
            await session.connection.execute(sql.ENSURE_WEEK, now + week * 7 * DAY)
        await session.ensure(now, now + weeks * 7 * DAY + 1)

    def _tell(self, waiting: Sequence[Chunk], why: str) -> None:
        """What should be gone and is not."""
        for reason in REASONS:
            self._metrics.waiting.labels(reason).set(len(waiting) if reason == why else 0)
        self.doing = f"{len(waiting)} chunks beyond retention wait: {why}" if waiting else None

    def _show(self, standing: Standing) -> None:
        self._metrics.shares.set(len(shares(standing)))
        for tier in TIERS:
            first = min((one.first for one in standing.chunks if one.tier == tier), default=standing.now)
            self._metrics.oldest.labels(tier).set(0 if first == NEVER else max(0, standing.now - first) / 1e6)


def _gone(standing: Standing) -> list[Chunk]:
    """Chunks before which all horizons lie."""
    passed = {tier: standing.passed(tier) for tier in TIERS}
    return [chunk for chunk in standing.chunks if chunk.stop <= passed[chunk.tier]]
