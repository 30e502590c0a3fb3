"""Transactions whose callers are cancelled at any moment, on connections that are used again."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from runtime.clock import SystemClock
from runtime.postgres import UNAVAILABLE, connect, copying, transaction
from tests.databases import Database
from tests.landing_rig import SETTINGS, open_rig, sqlite_url
from tests.support import run
from workers.landing.registry import Registry
from workers.landing.series import Found, SeriesName

#: Turns of the event loop after which a caller is cancelled; more than it takes to the end.
TURNS = 60


async def cancelled_after(turns: int, work: "asyncio.Task[Any]") -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
        if turns > TURNS // 2:
            await asyncio.sleep(0.0002)  # what the database answers takes time, not turns
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


def test_a_copy_on_a_session_that_was_ended_says_so_like_all_else(database: Database) -> None:
    async def test() -> None:
        connection = await connect(database.settings, role="sluice_worker", application="test")
        await connection.execute("CREATE TEMPORARY TABLE numbers (number int)")
        for number in range(2):
            with copying(connection):
                await connection.copy_records_to_table("numbers", records=[(number,)], columns=["number"])
        with pytest.raises(AttributeError), copying(connection):
            raise AttributeError
        connection.terminate()
        with pytest.raises(UNAVAILABLE, match="closed"), copying(connection):
            await connection.copy_records_to_table("numbers", records=[(2,)], columns=["number"])
        with pytest.raises(UNAVAILABLE, match="closed"), copying(connection):
            await connection.copy_to_table("numbers", source=source(), columns=["number"], format="binary")

    async def source() -> AsyncIterator[bytes]:
        yield b""

    run(test())


def test_what_ends_without_an_error_is_committed_whoever_was_cancelled_before(database: Database) -> None:
    async def test() -> None:
        other = await asyncpg.connect(database.superuser_url)
        await other.execute("CREATE TABLE numbers (number int); GRANT ALL ON numbers TO sluice_worker")
        cut = 0
        for turns in range(TURNS):
            connection = await connect(database.settings, role="sluice_worker", application="test")

            async def add(number: int, connection: asyncpg.Connection = connection) -> None:
                async with transaction(connection):
                    await connection.execute("INSERT INTO numbers VALUES ($1)", number)

            await cancelled_after(turns, asyncio.create_task(add(-1)))
            if connection.is_closed():
                cut += 1
            else:
                await add(turns)
                assert await other.fetchval("SELECT count(*) FROM numbers WHERE number = $1", turns) == 1
                assert not connection.is_in_transaction()
            connection.terminate()
        assert 0 < cut < TURNS
        await other.close()

    run(test())


def test_a_refusal_in_a_transaction_leaves_the_connection_usable(database: Database) -> None:
    async def test() -> None:
        connection = await connect(database.settings, role="sluice_worker", application="test")

        async def fail(statement: str) -> None:
            async with transaction(connection):
                await connection.execute(statement)
                raise LookupError

        for statement, error in (("SELECT 1 / 0", asyncpg.DivisionByZeroError), ("SELECT 1", LookupError)):
            with pytest.raises(error):
                await fail(statement)
            assert await connection.fetchval("SELECT 1") == 1
        await connection.close()

    run(test())


def test_series_that_are_found_stand_whoever_was_cancelled_before(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            registry = Registry(rig.postgres, SETTINGS, SystemClock(), rig.metrics)
            await registry.learn([device.organisation.bytes])
            for turns in range(TURNS):
                names = [
                    SeriesName(device.organisation.bytes, device.device.bytes, f"{which}{turns}", "", "")
                    for which in ("given_up", "wanted")
                ]
                given_up = asyncio.create_task(registry.resolve(names[:1]))
                await cancelled_after(turns, given_up)
                found = await registry.resolve(names)
                for one in found:
                    assert isinstance(one, Found)
                    assert await rig.value("SELECT count(*) FROM series WHERE series_id = $1", one.series_id) == 1
            await registry.close()

    run(test())
