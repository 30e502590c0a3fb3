"""Generations of the log: which one is active, how the first is made, and how one follows another.

A generation is one log, and what has landed of it. Everybody who has a log open holds a lock on its generation in
the database, so that none is closed under a process that still acknowledges into it. Left out: the engines.
"""

import asyncio
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import asyncpg

from runtime.errors import ConfigurationError, UnavailableError
from runtime.ids import uuid7
from runtime.log import Expected, LogMisfitError, LogSettings, check_positions, create_log, engine_of, open_log
from runtime.log.port import Log
from runtime.migrate import exclusively
from runtime.postgres import UNAVAILABLE, PostgresSettings, connect
from schemas.topics import log_name

_log = logging.getLogger("sluice.generation")

READER_ROLE: Final = "sluice_reader"
GUARD_EVERY_S: Final = 1.0
GUARD_TIMEOUT_S: Final = 5.0

_ACTIVE: Final = "SELECT source, engine, identity, partitions FROM log_generations WHERE closed_at IS NULL"
_POSITIONS: Final = "SELECT partition, position FROM log_positions WHERE source = $1"
_RECORD: Final = "INSERT INTO log_generations (source, engine, identity, partitions) VALUES ($1, $2, $3, $4)"
_ROWS: Final = "INSERT INTO {table} (source, partition) SELECT $1, generate_series(0, $2 - 1) ON CONFLICT DO NOTHING"
_ABANDON: Final = """
WITH standing AS (
    SELECT position FROM log_positions WHERE source = $1 AND partition = $2 AND position < $3 FOR UPDATE
), told AS (
    INSERT INTO log_losses (source, partition, first_position, end_position)
    SELECT $1, $2, position, $3 FROM standing
)
UPDATE log_positions p SET lost = p.lost + ($3 - standing.position), position = $3, updated_at = now()
FROM standing WHERE p.source = $1 AND p.partition = $2
"""


@dataclass(frozen=True)
class Generation:
    """One log as the database knows it."""

    source: UUID
    engine: str
    identity: str
    partitions: int

    @property
    def expected(self) -> Expected:
        return Expected(self.source, log_name(self.source), self.identity, self.partitions)


# ---------------------------------------------------------------- what a role asks


async def active_generation(connection: Any, log_url: str) -> Generation:
    """Raises `ConfigurationError` when there is none, or one of another engine than `log_url` names."""
    generation = await _find(connection)
    if generation is None:
        raise ConfigurationError("the database knows no log yet: run `sluice migrate`")
    _check_engine(generation, log_url)
    return generation


async def open_generation(connection: Any, settings: LogSettings, *, client_id: str) -> tuple[Generation, Log]:
    """The active generation and its log, which is certainly that one and has everything that landed.

    Raises `ConfigurationError` (`LogMisfitError` for a log that does not fit) and `UnavailableError`.
    """
    generation = await active_generation(connection, settings.log_url)
    # Read before the log's ends: what has landed only grows.
    positions = await landed_positions(connection, generation.source)
    log = await open_log(settings, generation.expected, client_id=client_id)
    try:
        check_positions(await log.bounds(), positions)
    except BaseException:
        await log.close()
        raise
    return generation, log


async def landed_positions(connection: Any, source: UUID) -> dict[int, int]:
    return {row["partition"]: row["position"] for row in await connection.fetch(_POSITIONS, source)}


class Guard:
    """Keeps a generation from being closed while this process uses its log.

    While the database is away the lock is lost with its session; it is taken again when that is back, and a
    generation that was closed meanwhile ends the process.
    """

    def __init__(self, settings: PostgresSettings, source: UUID, application: str) -> None:
        self._settings = settings
        self._source = source
        self._application = application
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None

    async def take(self) -> None:
        """Raises `UnavailableError`, and `ConfigurationError` for a generation that is closed."""
        connection = await connect(self._settings, role=READER_ROLE, application=f"{self._application} generation")
        try:
            await self._lock(connection)
            await self._check(connection)
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection

    async def keep(self) -> None:
        """Hold on for ever; its owner cancels it. Raises `ConfigurationError` when the generation was closed."""
        while True:
            await asyncio.sleep(GUARD_EVERY_S)
            try:
                if self._connection is None:
                    await self.take()
                else:
                    await self._check(self._connection)
            except (UnavailableError, *UNAVAILABLE) as error:
                _log.debug("the lock on the generation is lost", extra={"reason": str(error)})
                self._drop()

    async def release(self) -> None:
        self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _lock(self, connection: Any) -> None:
        if not await connection.fetchval("SELECT pg_try_advisory_lock_shared($1)", _lock_key(self._source)):
            raise UnavailableError("this generation of the log is being closed")

    async def _check(self, connection: Any) -> None:
        closed = await connection.fetchval(
            "SELECT closed_at FROM log_generations WHERE source = $1", self._source, timeout=GUARD_TIMEOUT_S
        )
        if closed is not None:
            raise ConfigurationError(
                f"generation {self._source} of the log was closed: start again to use the new one"
            )


# ---------------------------------------------------------------- what the owner does


async def ensure_generation(connection: Any, settings: LogSettings, partitions: int) -> Generation:
    """The active generation, made with its log where there is none. As the owner; may be repeated.

    Raises `ConfigurationError`, `UnavailableError`.
    """
    async with exclusively(connection):
        generation = await _find(connection)
        if generation is None:
            return await _make(connection, settings, partitions)
        _check_engine(generation, settings.log_url)
        return generation


@dataclass(frozen=True)
class Closed:
    """What became of the generation before: `lost` records that had not landed, None when nobody can say."""

    generation: Generation
    lost: int | None


async def follow_generation(
    connection: Any, settings: LogSettings, partitions: int, *, closing_url: str, abandon: bool
) -> tuple[Closed | None, Generation]:
    """Close the active generation and make the next on the log that `settings` name. As the owner.

    Raises `ConfigurationError` while processes use it, or while it holds what has not landed and `abandon` does not
    say to count that as lost.
    """
    async with exclusively(connection):
        generation = await _find(connection)
        if generation is None:
            return None, await _make(connection, settings, partitions)
        await _nobody_uses(connection, generation)
        try:
            old = dataclasses.replace(settings, log_url=closing_url or settings.log_url)
            ends = await _ends(old, generation, abandon=abandon)
            closed = await _count(connection, generation, ends, abandon=abandon)
            # The new log first: an old one that is closed without a successor would stop everything.
            new = await _make(connection, settings, partitions, closing=(closed, ends))
        finally:
            await connection.execute("SELECT pg_advisory_unlock($1)", _lock_key(generation.source))
        return closed, new


async def _find(connection: Any) -> Generation | None:
    row = await connection.fetchrow(_ACTIVE)
    return None if row is None else Generation(**row)


def _check_engine(generation: Generation, log_url: str) -> None:
    engine = engine_of(log_url)
    if engine != generation.engine:
        raise LogMisfitError(
            f"SLUICE_LOG_URL names a {engine} log, this database's readings come from a {generation.engine} one: "
            "set it back, or let `sluice migrate --new-generation` close that log and open a new one"
        )


async def _make(
    connection: Any,
    settings: LogSettings,
    partitions: int,
    *,
    closing: tuple[Closed, Mapping[int, int]] | None = None,
) -> Generation:
    """The log first, then everything about it in one transaction.

    A crash in between leaves an empty log that nobody knows; the next run makes another.
    """
    source = uuid7()
    engine = engine_of(settings.log_url)
    identity = await create_log(settings, source=source, name=log_name(source), partitions=partitions)
    async with connection.transaction():
        if closing is not None:
            await _close(connection, *closing)
        await connection.execute(_RECORD, source, engine, identity, partitions)
        for table in ("log_positions", "partition_leases"):
            await connection.execute(_ROWS.format(table=table), source, partitions)
    _log.info("a generation of the log was made", extra={"source": str(source), "engine": engine})
    return Generation(source, engine, identity, partitions)


async def _nobody_uses(connection: Any, generation: Generation) -> None:
    if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _lock_key(generation.source)):
        raise ConfigurationError(
            "the log is in use: let a worker land everything, then stop every `sluice ingest`, `sluice worker` and "
            "`sluice up`"
        )


async def _ends(settings: LogSettings, generation: Generation, *, abandon: bool) -> dict[int, int]:
    """Where each partition ends; empty when that cannot be known and does not matter."""
    engine = engine_of(settings.log_url)
    if engine != generation.engine and not abandon:
        raise ConfigurationError(
            f"the log to be closed is a {generation.engine} one, SLUICE_LOG_URL names a {engine} one: "
            "SLUICE_CLOSING_LOG_URL has to say where it stands; --abandon gives up what had not landed"
        )
    try:
        _check_engine(generation, settings.log_url)
        log = await open_log(settings, generation.expected, client_id="sluice-migrate")
        try:
            return {partition: bounds.end for partition, bounds in (await log.bounds()).items()}
        finally:
            await log.close()
    except (LogMisfitError, UnavailableError) as error:
        if abandon:
            return {}
        raise ConfigurationError(
            f"the log to be closed cannot be read, so nobody can say whether all of it has landed: {error}. "
            "SLUICE_CLOSING_LOG_URL says where it stands; --abandon gives up what had not landed"
        ) from error


async def _count(connection: Any, generation: Generation, ends: Mapping[int, int], *, abandon: bool) -> Closed:
    if not ends:
        return Closed(generation, None)
    positions = await landed_positions(connection, generation.source)
    waiting = sum(max(0, end - positions.get(partition, 0)) for partition, end in ends.items())
    if waiting and not abandon:
        raise ConfigurationError(
            f"{waiting} records of the log have not landed: run `sluice worker` until they have, or add --abandon to "
            "count them as lost"
        )
    return Closed(generation, waiting)


async def _close(connection: Any, closed: Closed, ends: Mapping[int, int]) -> None:
    source = closed.generation.source
    for partition, end in sorted(ends.items()):
        await connection.execute(_ABANDON, source, partition, end)
    await connection.execute("UPDATE log_generations SET closed_at = now() WHERE source = $1", source)


def _lock_key(source: UUID) -> int:
    return int.from_bytes(source.bytes[8:], "big", signed=True)
