"""Row-level security: no table with tenant data lacks it, and nobody reaches readings past it."""

from typing import Any

import asyncpg
import pytest

from api.registry.devices import add_device
from api.registry.organisations import acting_for, add_organisation
from runtime.ids import uuid7
from runtime.postgres import connect
from tests.databases import Database
from tests.support import run

#: Tables whose rows belong to an organisation through their series; roles reach them by views and functions only.
BY_SERIES = ("readings", "text_readings")
UNPROTECTED = """
SELECT DISTINCT c.relname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
  AND a.attname IN ('organisation_id', 'device_id', 'site_id', 'token_hash') AND NOT a.attisdropped
  AND NOT (c.relrowsecurity AND c.relforcerowsecurity)
"""
#: Tells a change, not whose it was: hashes and device ids for the processes that keep credentials.
EXEMPT = {"credential_changes"}


async def fetch(url: str, sql: str, *values: Any) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(sql, *values)
    finally:
        await connection.close()


def test_every_table_with_tenant_data_has_it_forced(any_database: Database) -> None:
    async def test() -> None:
        found = {row["relname"] for row in await fetch(any_database.superuser_url, UNPROTECTED)}
        assert found - EXEMPT == set()
        for table in EXEMPT:
            for role in ("sluice_app", "sluice_reader"):
                sql = "SELECT has_table_privilege($1, $2, 'SELECT')"
                assert (await fetch(any_database.superuser_url, sql, role, table))[0][0] is False

    run(test())


@pytest.mark.parametrize("role", ["sluice_app", "sluice_reader"])
def test_readings_are_reached_by_views_and_functions_only(any_database: Database, role: str) -> None:
    async def test() -> None:
        for table in BY_SERIES:
            for right in ("SELECT", "INSERT", "UPDATE", "DELETE"):
                sql = "SELECT has_table_privilege($1, $2, $3)"
                assert (await fetch(any_database.superuser_url, sql, role, table, right))[0][0] is False
        barriers = await fetch(
            any_database.superuser_url,
            "SELECT relname FROM pg_class WHERE relkind = 'v' AND relname LIKE 'organisation%'"
            " AND NOT coalesce('security_barrier=true' = ANY (reloptions), false)",
        )
        assert not barriers

    run(test())


def test_an_organisation_can_neither_see_nor_touch_what_is_another_s(any_database: Database) -> None:
    async def test() -> None:
        connection = await connect(any_database.settings, role=None, application="test")
        ours, theirs = uuid7(), uuid7()
        for organisation in (ours, theirs):
            async with acting_for(connection, organisation):
                await add_organisation(connection, organisation, "Test")
                device = await add_device(connection, organisation, None, "Device", "device")
        async with acting_for(connection, ours):
            assert await connection.fetchval("SELECT count(*) FROM organisations") == 1
            assert await connection.fetchval("SELECT count(*) FROM devices WHERE device_id = $1", device) == 0
            assert await connection.execute("DELETE FROM devices WHERE device_id = $1", device) == "DELETE 0"
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            async with acting_for(connection, ours):
                await add_device(connection, theirs, None, "Intruder", "intruder")
        await connection.close()

    run(test())


def test_series_of_another_organisation_give_no_readings(any_database: Database) -> None:
    async def test() -> None:
        connection = await connect(any_database.settings, role=None, application="test")
        ours, theirs = uuid7(), uuid7()
        async with acting_for(connection, theirs):
            await add_organisation(connection, theirs, "Test")
            device = await add_device(connection, theirs, None, "Device", "device")
        worker = await connect(any_database.settings, role="sluice_worker", application="test")
        series = await worker.fetchval(
            "INSERT INTO series (organisation_id, device_id, metric) VALUES ($1, $2, 'm') RETURNING series_id",
            theirs,
            device,
        )
        await worker.execute("SELECT ensure_week(now())")
        await worker.execute("INSERT INTO readings VALUES ($1, 0, now(), 1)", series)
        await worker.close()
        page = "SELECT count(*) FROM readings_page($1, '-infinity', 'infinity', true, 'infinity', 0, 0, 10)"
        view = "SELECT count(*) FROM organisation_readings WHERE series_id = ANY ($1)"
        for organisation, seen in ((ours, 0), (theirs, 1)):
            async with acting_for(connection, organisation):
                for sql in (page, view):
                    assert await connection.fetchval(sql, [series]) == seen
        await connection.close()

    run(test())
