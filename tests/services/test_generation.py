"""Generations of the log: made once, opened only where they fit, closed only when nothing is lost by it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from deploy.database import connect_owner
from deploy.generation import (
    READER_ROLE,
    Generation,
    Guard,
    active_generation,
    ensure_generation,
    follow_generation,
    landed_positions,
    open_generation,
)
from runtime.errors import ConfigurationError, UnavailableError
from runtime.log import LogMisfitError, LogSettings, create_log
from runtime.postgres import connect
from schemas.topics import log_name
from tests.databases import Database
from tests.support import run

PARTITIONS = 3
HOLDER = """
SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database
WHERE datname = current_database() AND locktype = 'advisory' AND mode = 'ShareLock' AND granted
"""


@pytest.fixture(params=["sqlite", "kafka"])
def log_settings(request: pytest.FixtureRequest, tmp_path: Path, services: dict[str, str]) -> LogSettings:
    """Where a test's logs are kept: each engine in turn."""
    if request.param == "kafka":
        return LogSettings(log_url=services["SLUICE_LOG_URL"])
    return LogSettings(log_url=f"sqlite:///{tmp_path / 'log'}")


@asynccontextmanager
async def owner(database: Database) -> AsyncIterator[Any]:
    connection = await connect_owner(database.settings)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def reader(database: Database) -> AsyncIterator[Any]:
    connection = await connect(database.settings, role=READER_ROLE, application="test")
    try:
        yield connection
    finally:
        await connection.close()


async def ensure(database: Database, settings: LogSettings) -> Generation:
    async with owner(database) as connection:
        return await ensure_generation(connection, settings, PARTITIONS)


async def follow(
    database: Database, settings: LogSettings, *, closing_url: str = "", abandon: bool = False
) -> tuple[Any, Generation]:
    async with owner(database) as connection:
        return await follow_generation(connection, settings, PARTITIONS, closing_url=closing_url, abandon=abandon)


async def append(database: Database, settings: LogSettings, partition: int, count: int) -> None:
    async with reader(database) as connection:
        _, log = await open_generation(connection, settings, client_id="test")
    await asyncio.gather(*(log.append(partition, b"x") for _ in range(count)))
    await log.close()


async def land(database: Database, source: UUID, partition: int, position: int) -> None:
    async with owner(database) as connection:
        await connection.execute(
            "UPDATE log_positions SET position = $3 WHERE source = $1 AND partition = $2", source, partition, position
        )


# ---------------------------------------------------------------- the first


def test_many_at_once_make_one(database: Database, log_settings: LogSettings) -> None:
    async def test() -> None:
        made = await asyncio.gather(*(ensure(database, log_settings) for _ in range(4)))
        assert len({generation.source for generation in made}) == 1
        async with reader(database) as connection:
            assert await active_generation(connection, log_settings.log_url) == made[0]
            assert await landed_positions(connection, made[0].source) == dict.fromkeys(range(PARTITIONS), 0)
        async with owner(database) as connection:
            assert await connection.fetchval("SELECT count(*) FROM partition_leases") == PARTITIONS
        await append(database, log_settings, 1, 5)

    run(test())


def test_one_that_a_crash_left_half_made_is_replaced(database: Database, log_settings: LogSettings) -> None:
    async def test() -> None:
        left = UUID(int=1)
        await create_log(log_settings, source=left, name=f"{log_name(left)}.{database.name}", partitions=PARTITIONS)
        generation = await ensure(database, log_settings)
        assert generation.source != left
        await append(database, log_settings, 0, 1)

    run(test())


def test_a_database_without_one_names_the_command(database: Database, log_settings: LogSettings) -> None:
    async def test() -> None:
        async with reader(database) as connection:
            with pytest.raises(ConfigurationError, match="run `sluice migrate`"):
                await active_generation(connection, log_settings.log_url)

    run(test())


# ---------------------------------------------------------------- one that does not fit


def test_another_engine_on_a_used_database_is_refused_and_named(
    database: Database, tmp_path: Path, services: dict[str, str]
) -> None:
    async def test() -> None:
        sqlite = LogSettings(log_url=f"sqlite:///{tmp_path / 'log'}")
        kafka = LogSettings(log_url=services["SLUICE_LOG_URL"])
        await ensure(database, sqlite)
        refusal = "names a kafka log.*come from a sqlite one.*`sluice migrate --new-generation`"
        async with reader(database) as connection:
            with pytest.raises(LogMisfitError, match=refusal):
                await open_generation(connection, kafka, client_id="test")
        with pytest.raises(LogMisfitError, match=refusal):
            await ensure(database, kafka)

    run(test())


def test_a_log_made_anew_under_the_same_name_is_refused(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        settings = LogSettings(log_url=f"sqlite:///{tmp_path / 'log'}")
        generation = await ensure(database, settings)
        for file in (tmp_path / "log").iterdir():
            file.unlink()
        name = log_name(generation.source)
        await create_log(settings, source=generation.source, name=name, partitions=PARTITIONS)
        async with reader(database) as connection:
            with pytest.raises(LogMisfitError, match="`sluice migrate --new-generation`"):
                await open_generation(connection, settings, client_id="test")

    run(test())


def test_a_log_that_ends_before_what_landed_is_refused(database: Database, log_settings: LogSettings) -> None:
    async def test() -> None:
        generation = await ensure(database, log_settings)
        await append(database, log_settings, 2, 3)
        await land(database, generation.source, 2, 4)
        async with reader(database) as connection:
            with pytest.raises(LogMisfitError, match=r"partition 2 of the log ends at 3.*landed it up to 4"):
                await open_generation(connection, log_settings, client_id="test")

    run(test())


# ---------------------------------------------------------------- one after another


def test_a_generation_is_closed_once_everything_has_landed(database: Database, log_settings: LogSettings) -> None:
    async def test() -> None:
        first = await ensure(database, log_settings)
        await append(database, log_settings, 1, 5)
        with pytest.raises(ConfigurationError, match=r"5 records of the log have not landed.*--abandon"):
            await follow(database, log_settings)
        await land(database, first.source, 1, 5)
        closed, second = await follow(database, log_settings)
        assert (closed.generation, closed.lost) == (first, 0)
        async with reader(database) as connection:
            assert await active_generation(connection, log_settings.log_url) == second
            assert (await landed_positions(connection, first.source))[1] == 5
        await append(database, log_settings, 1, 1)

    run(test())


def test_what_is_abandoned_is_counted_as_lost(database: Database, log_settings: LogSettings) -> None:
    async def test() -> None:
        first = await ensure(database, log_settings)
        await append(database, log_settings, 0, 7)
        await append(database, log_settings, 2, 2)
        await land(database, first.source, 0, 3)
        closed, _ = await follow(database, log_settings, abandon=True)
        assert closed.lost == 6
        async with owner(database) as connection:
            rows = await connection.fetch(
                "SELECT position, lost FROM log_positions WHERE source = $1 ORDER BY partition", first.source
            )
            assert [tuple(row) for row in rows] == [(7, 4), (0, 0), (2, 2)]

    run(test())


def test_from_sqlite_to_kafka(database: Database, tmp_path: Path, services: dict[str, str]) -> None:
    async def test() -> None:
        sqlite = LogSettings(log_url=f"sqlite:///{tmp_path / 'log'}")
        kafka = LogSettings(log_url=services["SLUICE_LOG_URL"])
        first = await ensure(database, sqlite)
        await append(database, sqlite, 0, 1)
        with pytest.raises(ConfigurationError, match="SLUICE_CLOSING_LOG_URL"):
            await follow(database, kafka)
        with pytest.raises(ConfigurationError, match="1 records of the log have not landed"):
            await follow(database, kafka, closing_url=sqlite.log_url)
        await land(database, first.source, 0, 1)
        closed, second = await follow(database, kafka, closing_url=sqlite.log_url)
        assert (closed.lost, second.engine) == (0, "kafka")

    run(test())


def test_a_log_that_is_gone_can_only_be_abandoned(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        settings = LogSettings(log_url=f"sqlite:///{tmp_path / 'log'}")
        await ensure(database, settings)
        for file in (tmp_path / "log").iterdir():
            file.unlink()
        with pytest.raises(ConfigurationError, match=r"cannot be read.*--abandon"):
            await follow(database, settings)
        closed, _ = await follow(database, settings, abandon=True)
        assert closed.lost is None

    run(test())


def test_a_new_log_that_cannot_be_made_leaves_the_old_one_open(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        settings = LogSettings(log_url=f"sqlite:///{tmp_path / 'log'}")
        first = await ensure(database, settings)
        (tmp_path / "file").touch()
        nowhere = replace(settings, log_url=f"sqlite:///{tmp_path / 'file' / 'log'}")
        with pytest.raises(ConfigurationError):
            await follow(database, nowhere, closing_url=settings.log_url)
        async with reader(database) as connection:
            assert await active_generation(connection, settings.log_url) == first

    run(test())


# ---------------------------------------------------------------- while it is used


def test_nothing_is_closed_under_a_process_that_uses_it(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        settings = LogSettings(log_url=f"sqlite:///{tmp_path / 'log'}")
        first = await ensure(database, settings)
        guards = [Guard(database.settings, first.source, "test") for _ in range(2)]
        for guard in guards:
            await guard.take()
        with pytest.raises(ConfigurationError, match="the log is in use"):
            await follow(database, settings)
        for guard in guards:
            await guard.release()
        while True:  # a session that ended gives its locks back a moment later
            try:
                await follow(database, settings)
                break
            except ConfigurationError:
                await asyncio.sleep(0.01)
        with pytest.raises(ConfigurationError, match=f"generation {first.source} of the log was closed"):
            await guards[0].take()

    run(test())


def test_a_guard_whose_session_was_cut_takes_hold_again_and_notices_a_closed_generation(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.generation.GUARD_EVERY_S", 0.01)

    async def test() -> None:
        settings = LogSettings(log_url=f"sqlite:///{tmp_path / 'log'}")
        first = await ensure(database, settings)
        guard = Guard(database.settings, first.source, "test")
        await guard.take()
        keeping = asyncio.create_task(guard.keep())
        async with owner(database) as connection:
            first_pid = await connection.fetchval(HOLDER)
            async with superuser(database) as admin:
                await admin.fetchval("SELECT pg_terminate_backend($1)", first_pid)
            while await connection.fetchval(HOLDER) in (None, first_pid):  # noqa: ASYNC110 -- only the database knows
                await asyncio.sleep(0.01)
            await connection.execute("UPDATE log_generations SET closed_at = now()")
        with pytest.raises(ConfigurationError, match="was closed"):
            await keeping
        await guard.release()

    run(test())


@asynccontextmanager
async def superuser(database: Database) -> AsyncIterator[Any]:
    connection = await connect(database.settings, role=None, application="test", url=database.superuser_url)
    try:
        yield connection
    finally:
        await connection.close()


def test_a_generation_that_is_being_closed_is_not_taken(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        settings = LogSettings(log_url=f"sqlite:///{tmp_path / 'log'}")
        generation = await ensure(database, settings)
        async with owner(database) as connection:
            key = int.from_bytes(generation.source.bytes[8:], "big", signed=True)
            await connection.execute("SELECT pg_advisory_lock($1)", key)
            with pytest.raises(UnavailableError, match="being closed"):
                await Guard(database.settings, generation.source, "test").take()

    run(test())
