"""The landing session, and the one transaction in which a plan is written.

Its timestamps go in and out as microseconds since 2000, as records have them. Left out: what to do when it fails
(`worker`), whether this worker may write (`leases`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg

from runtime.errors import UnavailableError
from runtime.postgres import PostgresSettings, check_role, connect, copying
from workers.landing import books, columns, deliveries, marks, staging
from workers.landing.deliveries import Stretches
from workers.landing.failures import Cause, MiscountError, PositionMovedError, TombstonesMovedError, cause_of
from workers.landing.late import SpoolPart
from workers.landing.plan import Plan
from workers.landing.series import NEVER
from workers.landing.staging import Judgement
from workers.landing.tombstones import Tombstones
from workers.settings import LandingSettings

ROLE: Final = "sluice_worker"

_READING: Final = ("series_id", "quality", "ts", "value")

# A plain plan of an index look-up a row is right for every statement here; a hash of a whole chunk never is.
_PLANNER: Final = {"enable_hashjoin": "off", "enable_mergejoin": "off", "work_mem": "64MB"}

_SESSION: Final = "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()"

_POSITIONS: Final = """
SELECT partition, position, high_water, greatest(landed_until, position) AS landed_until, lost > 0 AS has_losses
FROM log_positions WHERE source = $1 AND partition = ANY ($2::int[])"""

# Partition p of a spool drains into partition p modulo the number of the log's.
_SPOOLS: Final = """
SELECT s.spool, s.partition, s.next, s.partition % g.partitions AS into
FROM spool_positions s JOIN log_generations g ON g.source = $1
WHERE s.partition % g.partitions = ANY ($2::int[])"""

# Locked in the order of partitions, so that two workers cannot hold each other up.
_ADVANCE: Final = """
WITH standing AS (
    SELECT partition FROM log_positions WHERE source = $1 AND partition = ANY ($2::int[])
    ORDER BY partition FOR UPDATE)
UPDATE log_positions p
SET position = w.position, landed_until = greatest(p.landed_until, w.position),
    high_water = greatest(p.high_water, w.high_water),
    received_through = greatest(p.received_through, w.received_through), updated_at = now()
FROM standing
JOIN unnest($2::int[], $3::bigint[], $4::bigint[], $5::timestamptz[], $6::timestamptz[])
    AS w (partition, expected, position, high_water, received_through) USING (partition)
WHERE p.source = $1 AND p.partition = w.partition AND p.position = w.expected
RETURNING p.partition"""

_SKIP: Final = """
WITH skipped AS (
    UPDATE log_positions SET position = $4, lost = lost + $4 - position, updated_at = now()
    WHERE source = $1 AND partition = $2 AND position = $3 RETURNING source)
INSERT INTO log_losses (source, partition, first_position, end_position) SELECT source, $2, $3, $4 FROM skipped"""


_UNDECODABLE: Final = """
SELECT partition, position FROM quarantine
WHERE organisation_id IS NULL AND quarantined_at > now() - make_interval(secs => $2)
  AND source = $1 AND code = 'undecodable' LIMIT 10000"""

# What the database would check at COMMIT only, a trial must see at once.
_TRIALS: Final = "SET CONSTRAINTS ALL IMMEDIATE; SAVEPOINT trial"
_TAKE_BACK: Final = "ROLLBACK TO SAVEPOINT trial"


class Session(NamedTuple):
    """A database session, told from any other: pids come back."""

    pid: int
    start: datetime


class Standing(NamedTuple):
    """What has landed of a partition."""

    position: int
    high_water: int
    landed_until: int
    """Positions before it have landed, also where `position` was set back."""
    has_losses: bool
    spools: dict[SpoolPart, int]
    """The next record of each spool that drains into it."""
    deliveries: Stretches
    """Those that brokers may send again."""


class Landed(NamedTuple):
    """What a transaction wrote."""

    fresh: int
    suspects: Judgement
    texts: Judgement
    seconds: float


class Store:
    """Writes plans, one at a time, on one connection. Every call may raise what the database raises."""

    def __init__(self, postgres: PostgresSettings, settings: LandingSettings, source: UUID) -> None:
        self._postgres = postgres
        self._settings = settings
        self._source = source
        self._connection: Any = None
        self.in_doubt: tuple[Plan, Landed] | None = None
        """What a COMMIT that was sent and not answered was to write: all of it stands, or nothing."""

    @property
    def is_open(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    async def open(self) -> Session:
        """A new session; nothing may be written on it before the leases know it."""
        self.close()
        settings = self._settings
        seconds = {
            "statement_timeout": settings.landing_transaction_timeout_s,
            "lock_timeout": settings.landing_lock_timeout_s,
            "idle_in_transaction_session_timeout": settings.landing_idle_timeout_s,
        }
        limits = {name: f"{round(value * 1000)}ms" for name, value in seconds.items()}
        connection: Any = await connect(self._postgres, role=None, application="sluice landing", **_PLANNER, **limits)
        try:
            # The role that writes may not look at sessions, its own included.
            row = await connection.fetchrow(_SESSION)
            await connection.execute(f"SET ROLE {ROLE}")
            await check_role(connection)
            if connection.get_server_version().major >= 17:
                await connection.execute(f"SET transaction_timeout = {limits['statement_timeout']!r}")
            await connection.execute(staging.CREATE)
            await connection.set_type_codec(
                "timestamptz",
                schema="pg_catalog",
                format="tuple",
                encoder=lambda us: (us,),
                decoder=lambda row: row[0],
            )
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection
        return Session(row["pid"], row["backend_start"])

    def close(self) -> None:
        """Cut the connection: the database rolls back what was under way."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def _session(self) -> Any:
        if self._connection is None:
            raise UnavailableError("the landing session has ended")
        return self._connection

    def interrupt(self) -> None:
        """Cut the connection under whoever waits for an answer on it, and whoever asks on it next."""
        if self._connection is not None:
            self._connection.terminate()

    async def standing(self, partitions: Iterable[int]) -> dict[int, Standing]:
        """Where these partitions stand."""
        async with asyncio.timeout(self._settings.landing_transaction_timeout_s):
            rows = await self._connection.fetch(_POSITIONS, self._source, list(partitions))
            drained = await self._connection.fetch(_SPOOLS, self._source, list(partitions))
            delivered = await deliveries.standing(self._connection, self._source, list(partitions))
        spools: dict[int, dict[SpoolPart, int]] = {}
        for row in drained:
            spools.setdefault(row["into"], {})[row["spool"].bytes, row["partition"]] = row["next"]
        return {
            partition: Standing(
                position,
                NEVER if high_water is None else high_water,
                landed_until,
                lost,
                spools.get(partition, {}),
                delivered.get(partition, {}),
            )
            for partition, position, high_water, landed_until, lost in rows
        }

    async def learn(self, tombstones: Tombstones) -> None:
        """Bring them up to now."""
        async with asyncio.timeout(self._settings.landing_transaction_timeout_s):
            await tombstones.refresh(self._session())

    async def undecodable_since(self, seconds: float) -> list[tuple[int, int]]:
        """Where the records stand that were quarantined as undecodable in so many seconds, a bounded number."""
        async with asyncio.timeout(self._settings.landing_transaction_timeout_s):
            rows = await self._connection.fetch(_UNDECODABLE, self._source, float(seconds))
        return [(row["partition"], row["position"]) for row in rows]

    async def skip(self, partition: int, position: int, start: int) -> None:
        """Count the records from `position` to `start` as lost and go on from there."""
        async with asyncio.timeout(self._settings.landing_transaction_timeout_s):
            moved = await self._connection.execute(_SKIP, self._source, partition, position, start)
        if moved != "INSERT 0 1":
            raise PositionMovedError(f"partition {partition} does not stand at {position}")

    async def land(self, plan: Plan) -> Landed:
        """Write `plan` in one transaction. After any failure nothing of it is known to stand: read the positions."""
        began = time.monotonic()
        async with self._transaction(plan) as (connection, closing):
            wrote = await self._write(connection, plan, closing)
            self.in_doubt = plan, Landed(*wrote, time.monotonic() - began)
            await connection.execute("COMMIT")
            self.in_doubt = None
        return Landed(*wrote, time.monotonic() - began)

    @asynccontextmanager
    async def trial(self, refused: Plan) -> AsyncIterator[Callable[[Plan], Awaitable[str | None]]]:
        """A transaction in which plans are tried, each taken back before the next; at the end all of it is.

        Gives what tries one: what the database says if it refuses its content. Where rows met others' it is not
        refused: its landing will see. The positions are those of `refused`, in which all of them are.
        """
        async with self._transaction(refused) as (connection, closing):
            await connection.execute(_TRIALS)
            yield partial(self._attempt, connection, closing)
        await self._roll_back(connection)

    async def _attempt(self, connection: Any, closing: int, plan: Plan) -> str | None:
        said = None
        try:
            await self._write(connection, plan, closing)
        except Exception as error:
            cause = cause_of(error)
            if cause not in (Cause.CONTENT, Cause.CONTENTION):
                raise
            said = str(error) if cause is Cause.CONTENT else None
        await connection.execute(_TAKE_BACK)
        return said

    @asynccontextmanager
    async def _transaction(self, plan: Plan) -> AsyncIterator[tuple[Any, int]]:
        """Begun, with the positions of `plan` moved, and what the roll-ups have closed in it.

        Whoever asked ends it. Any failure does, or ends the session.
        """
        connection = self._session()
        try:
            async with asyncio.timeout(self._settings.landing_transaction_timeout_s):
                await connection.execute("BEGIN")
                yield connection, await self._advance(connection, plan)
        except asyncpg.PostgresError:
            await self._roll_back(connection)
            raise
        except BaseException:
            self.close()
            raise

    async def _roll_back(self, connection: Any) -> None:
        with suppress(Exception):
            async with asyncio.timeout(self._settings.landing_lock_timeout_s):
                await connection.execute("ROLLBACK")
                return
        self.close()

    async def _write(self, connection: Any, plan: Plan, closing: int) -> tuple[int, Judgement, Judgement]:
        fresh = 0
        if plan.fresh.times:
            rows = plan.fresh.sorted()
            fresh = rows.count
            source = columns.stream(columns.READING, rows)
            with copying(connection):
                await connection.copy_to_table("readings", source=source, columns=_READING, format="binary")
        suspects = await staging.land_suspects(connection, plan)
        texts = await staging.land_texts(connection, plan)
        _check(plan, fresh, suspects, texts)
        await marks.leave(connection, plan, closing)
        await books.write(connection, self._source, plan)
        return fresh, suspects, texts

    async def _advance(self, connection: Any, plan: Plan) -> int:
        """First of all: nothing is written unless every partition stands where the plan begins.

        Nor unless the plan knows every tombstone and horizon. A tombstone that is committed after they were asked for
        is not seen; but then this plan's records stood in the log before it, and whoever erases waits until those
        have landed. A horizon is waited for like the time before which the roll-ups are closed, which is what this
        gives: both are asked for once the transaction has its id.
        """
        parts = list(plan.parts.values())
        moved = await connection.fetch(
            _ADVANCE,
            self._source,
            [part.partition for part in parts],
            [part.expected for part in parts],
            [part.position for part in parts],
            [_or_none(part.high_water) for part in parts],
            [_or_none(part.received_through) for part in parts],
        )
        if len(moved) != len(parts):
            raise PositionMovedError(f"{len(moved)} of {len(parts)} positions stand where this worker left them")
        closing: int
        closing, epoch = await connection.fetchrow(marks.CLOSING)
        if epoch != plan.epoch:
            raise TombstonesMovedError(f"tombstones are at {epoch}, the plan knows those up to {plan.epoch}")
        return closing


def _check(plan: Plan, fresh: int, suspects: Judgement, texts: Judgement) -> None:
    """The books are written only if they will add up: every reading was stored, or is told of."""
    quarantined = sum(told.quarantined for told in plan.outcomes)
    erased = sum(told.erased for told in plan.outcomes)
    accounted = fresh + sum(suspects) + sum(texts) + quarantined + erased
    if accounted != plan.rows:
        raise MiscountError(f"of {plan.rows} readings {accounted} are accounted for")


def _or_none(time: int) -> int | None:
    return None if time == NEVER else time
