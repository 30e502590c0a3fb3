"""Migrations on a real database: applied once, whoever asks, and refused where files and database disagree."""

import asyncio
from importlib import resources
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from deploy.database import migrations
from runtime.errors import ConfigurationError, UnavailableError
from runtime.migrate import LOCK, SESSION, assert_migrated, migrate, read_migrations
from runtime.postgres import check_role, connect, open_pool
from tests.databases import Database
from tests.support import run


def write(directory: Path, **files: str) -> Path:
    for name, sql in files.items():
        (directory / f"{name}.sql").write_text(sql)
    return directory


async def owner(database: Database, **overrides: str) -> Any:
    return await connect(
        database.settings, role=None, application="test", url=database.owner_url, **(SESSION | overrides)
    )


async def applied(database: Database, directory: Path) -> list[str]:
    connection = await owner(database)
    try:
        return [str(migration) for migration in await migrate(connection, read_migrations(directory))]
    finally:
        await connection.close()


def test_each_is_applied_once_and_in_order(bare_database: Database, tmp_path: Path) -> None:
    write(tmp_path, **{"0002_two": "ALTER TABLE a ADD y int", "0001_one": "CREATE TABLE a (x int)"})
    assert run(applied(bare_database, tmp_path)) == ["0001_one", "0002_two"]
    assert run(applied(bare_database, tmp_path)) == []
    write(tmp_path, **{"0003_three": "ALTER TABLE a ADD z int"})
    assert run(applied(bare_database, tmp_path)) == ["0003_three"]


def test_a_role_that_is_missing_is_bootstrap_s_to_make(bare_database: Database, tmp_path: Path) -> None:
    write(tmp_path, **{"0001_one": "GRANT USAGE ON SCHEMA public TO nobody_made_this_role"})
    with pytest.raises(ConfigurationError, match=r"nobody_made_this_role.*bootstrap\.sql"):
        run(applied(bare_database, tmp_path))


def test_many_at_once_apply_each_once(bare_database: Database, tmp_path: Path) -> None:
    write(tmp_path, **{"0001_one": "CREATE TABLE a (x int)", "0002_two": "CREATE TABLE b (x int)"})

    async def race() -> list[list[str]]:
        return await asyncio.gather(*(applied(bare_database, tmp_path) for _ in range(6)))

    assert sorted(run(race())) == [[]] * 5 + [["0001_one", "0002_two"]]


def test_the_real_ones_reach_what_the_roles_expect(database: Database) -> None:
    async def test() -> None:
        pool = await open_pool(database.settings, role="sluice_reader", application="test")
        async with pool.acquire() as connection:
            await assert_migrated(connection, migrations())
        await pool.close()

    run(test())


#: A plant that was suspended while online, and one whose certificate was renewed; before either was noted.
PLANTS_OF_OLD = """
SET session_replication_role = replica;
INSERT INTO organisations (organisation_id, name) VALUES (md5('o')::uuid, 'Test');
INSERT INTO devices (device_id, organisation_id, name, local_id, status, online, online_until, last_seen_at)
SELECT md5(name)::uuid, md5('o')::uuid, name, name, status, true, now() + interval '1 minute', now()
FROM (VALUES ('cut off', 'suspended'), ('renewed', 'active')) v(name, status);
INSERT INTO plants (device_id, organisation_id, serial_number, type, auth_method, lifecycle, certificate_fingerprint)
SELECT device_id, organisation_id, name, 'SENSOR', 'MTLS', 'ACTIVE', repeat('0', 64) FROM devices;
INSERT INTO certificate_authorities (authority_id, kind, certificate, fingerprint, not_before, not_after)
VALUES (md5('a')::uuid, 'issuing', '', repeat('a', 64), now(), now());
INSERT INTO certificates
    (fingerprint, authority_id, serial, organisation_id, device_id, not_before, not_after, issued_at)
SELECT repeat(n::text, 64), md5('a')::uuid, n::text, md5('o')::uuid, md5('renewed')::uuid, now(), 'infinity',
       now() + n * interval '1 day' FROM generate_series(0, 2) n;
"""


def test_plants_of_old_are_set_right(any_bare_database: Database, tmp_path: Path) -> None:
    ours = Path(str(resources.files("schemas") / "sql"))
    for path in sorted(ours.glob("*.sql"))[:31]:
        write(tmp_path, **{path.stem: path.read_text()})

    async def test() -> None:
        await applied(any_bare_database, tmp_path)
        superuser = await asyncpg.connect(any_bare_database.superuser_url)
        await superuser.execute(PLANTS_OF_OLD)
        assert (await applied(any_bare_database, ours))[0] == "0032_plants_again"
        told = "SELECT name, online, offline_at IS NULL, online_changed_at IS NULL FROM devices ORDER BY name"
        rows = [tuple(row) for row in await superuser.fetch(told)]
        assert rows == [("cut off", False, False, False), ("renewed", True, True, True)]
        told = (
            "SELECT serial_number, left(certificate_fingerprint, 1), certificate_serial_number FROM plants ORDER BY 1"
        )
        rows = [tuple(row) for row in await superuser.fetch(told)]
        assert rows == [("cut off", "0", None), ("renewed", "2", "2")]
        await superuser.close()

    run(test())


def test_one_that_fails_leaves_nothing_and_is_tried_again(bare_database: Database, tmp_path: Path) -> None:
    write(tmp_path, **{"0001_one": "CREATE TABLE a (x int); SELECT 1 / 0"})
    with pytest.raises(Exception, match="division by zero"):
        run(applied(bare_database, tmp_path))
    write(tmp_path, **{"0001_one": "CREATE TABLE a (x int)"})
    assert run(applied(bare_database, tmp_path)) == ["0001_one"]


def test_a_file_edited_afterwards_is_refused(bare_database: Database, tmp_path: Path) -> None:
    write(tmp_path, **{"0001_one": "CREATE TABLE a (x int)"})
    run(applied(bare_database, tmp_path))
    write(tmp_path, **{"0001_one": "CREATE TABLE a (x bigint)"})
    with pytest.raises(ConfigurationError, match="0001_one was changed"):
        run(applied(bare_database, tmp_path))


def test_the_database_of_a_newer_version_is_refused(bare_database: Database, tmp_path: Path) -> None:
    write(tmp_path, **{"0001_one": "CREATE TABLE a (x int)", "0002_two": "CREATE TABLE b (x int)"})
    run(applied(bare_database, tmp_path))
    (tmp_path / "0002_two.sql").unlink()
    with pytest.raises(ConfigurationError, match="a newer one has been at work here"):
        run(applied(bare_database, tmp_path))


def test_a_start_without_the_owner_names_the_command(bare_database: Database, tmp_path: Path) -> None:
    async def check() -> None:
        connection = await connect(bare_database.settings, role="sluice_reader", application="test")
        try:
            await assert_migrated(connection, read_migrations(tmp_path))
        finally:
            await connection.close()

    write(tmp_path, **{"0001_one": "CREATE TABLE a (x int)"})
    with pytest.raises(ConfigurationError, match="no tables of Sluice: run `sluice migrate`"):
        run(check())
    run(applied(bare_database, tmp_path))
    run(check())
    write(tmp_path, **{"0002_two": "CREATE TABLE b (x int)"})
    with pytest.raises(ConfigurationError, match="lacks 0002_two: run `sluice migrate`"):
        run(check())


def test_who_waits_too_long_for_another_run_is_told(bare_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        holder = await owner(bare_database)
        waiter = await owner(bare_database, lock_timeout="50")
        await holder.execute("SELECT pg_advisory_lock($1)", LOCK)
        with pytest.raises(UnavailableError, match="another `sluice migrate`"):
            await migrate(waiter, read_migrations(write(tmp_path)))
        await holder.close()
        assert await migrate(waiter, read_migrations(tmp_path)) == []
        await waiter.close()

    run(test())


@pytest.mark.parametrize("names", [("0001_a", "0003_b"), ("0002_a",), ("0001_A",), ("1_a",)])
def test_numbers_with_gaps_and_odd_names_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    write(tmp_path, **dict.fromkeys(names, "SELECT 1"))
    with pytest.raises(ConfigurationError):
        read_migrations(tmp_path)


def test_a_role_that_looks_past_row_level_security_is_refused(database: Database) -> None:
    async def test() -> None:
        connection = await connect(database.settings, role=None, application="test", url=database.superuser_url)
        with pytest.raises(ConfigurationError, match="superuser"):
            await check_role(connection)
        await connection.execute("SET ROLE sluice_app")
        with pytest.raises(ConfigurationError, match="superuser"):
            await check_role(connection)
        await connection.close()

    run(test())


@pytest.mark.parametrize("role", ["sluice_owner", "nobody_at_all"])
def test_a_role_that_the_login_may_not_take_is_a_wrong_setting(database: Database, role: str) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_DATABASE_URL is refused"):
        run(connect(database.settings, role=role, application="test"))
