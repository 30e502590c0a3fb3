"""Logins for dashboards: each sees its organisation through the views, and can neither choose another nor do more."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import pytest

from api.registry.devices import add_device
from api.registry.organisations import acting_for, add_organisation
from api.registry.sites import add_site
from deploy import dashboards
from deploy.database import connect_owner
from deploy.embedded import bootstrap
from runtime.errors import ConfigurationError
from runtime.ids import uuid7
from runtime.postgres import connect
from tests.databases import Database
from tests.support import run

VIEWS = ("sites", "devices", "stays", "readings", "text_readings", "latest")
NOW = datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class Tenant:
    """An organisation with a site, a device, and two readings of each kind."""

    organisation: UUID
    site: UUID
    device: UUID
    user: dashboards.DashboardUser


async def tenant(database: Database, name: str) -> Tenant:
    ours = await connect(database.settings, role=None, application="test")
    worker = await connect(database.settings, role="sluice_worker", application="test")
    owner = await connect_owner(database.settings)
    organisation = uuid7()
    async with acting_for(ours, organisation):
        await add_organisation(ours, organisation, name)
        site = await add_site(ours, organisation, f"{name} site")
        device = await add_device(ours, organisation, site, f"{name} device", name)
    make = "INSERT INTO series (organisation_id, device_id, metric) VALUES ($1, $2, $3) RETURNING series_id"
    number, text = [await worker.fetchval(make, organisation, device, metric) for metric in ("temperature", "state")]
    for days in (1, 0):
        ts = NOW - timedelta(days=days)
        await worker.execute("SELECT ensure_week($1)", ts)
        await worker.execute("INSERT INTO readings VALUES ($1, 0, $2, $3)", number, ts, 20.0 + days)
        await worker.execute("INSERT INTO text_readings VALUES ($1, 0, $2, $3)", text, ts, f"{name} {days}")
    user = await dashboards.create(ours, owner, organisation)
    for connection in (ours, worker, owner):
        await connection.close()
    return Tenant(organisation, site, device, user)


def url_of(database: Database, user: dashboards.DashboardUser) -> str:
    parts = urlsplit(database.url)
    return parts._replace(netloc=f"{user.user}:{user.password}@{parts.netloc.rpartition('@')[2]}").geturl()


@asynccontextmanager
async def looking(database: Database, user: dashboards.DashboardUser) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url_of(database, user))
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def two_tenants(database: Database) -> AsyncIterator[tuple[Tenant, Tenant]]:
    # What the database itself grants is not copied from a template.
    await bootstrap(database.superuser_url)
    both = await tenant(database, "ours"), await tenant(database, "theirs")
    try:
        yield both
    finally:  # logins are the server's, not the database's
        owner = await connect_owner(database.settings)
        for one in both:
            await dashboards.drop(owner, one.organisation)
        await owner.close()


def test_a_login_sees_its_organisation_and_no_other(any_database: Database) -> None:
    async def test() -> None:
        async with two_tenants(any_database) as both:
            for one, name in zip(both, ("ours", "theirs"), strict=True):
                async with looking(any_database, one.user) as session:
                    assert await session.fetchval("SELECT dashboards.organisation()") == one.organisation
                    for view in VIEWS:
                        column = "site_id" if view == "sites" else "device_id"
                        found = {row[column] for row in await session.fetch(f"SELECT * FROM {view}")}
                        assert found == {one.site if view == "sites" else one.device}, view
                    assert [
                        tuple(row) for row in await session.fetch("SELECT time, value FROM readings ORDER BY time")
                    ] == [
                        (NOW - timedelta(days=1), 21.0),
                        (NOW, 20.0),
                    ]
                    latest = await session.fetch("SELECT metric, time, value, text_value FROM latest ORDER BY metric")
                    assert [tuple(row) for row in latest] == [
                        ("state", NOW, None, f"{name} 0"),
                        ("temperature", NOW, 20.0, None),
                    ]
                    assert await session.fetchval("SELECT site FROM devices") == f"{name} site"

    run(test())


def test_it_cannot_choose_another_organisation(any_database: Database) -> None:
    async def test() -> None:
        async with two_tenants(any_database) as (ours, theirs), looking(any_database, ours.user) as session:
            for name in ("organisation", "user"):
                await session.execute(f"SELECT set_config('sluice.{name}', $1, false)", str(theirs.organisation))
            await session.execute(f"SET SESSION sluice.organisation = '{theirs.organisation}'")
            for view in VIEWS:
                column = "site_id" if view == "sites" else "device_id"
                other = theirs.site if view == "sites" else theirs.device
                assert await session.fetchval(f"SELECT count(*) FROM {view} WHERE {column} = $1", other) == 0, view
                assert await session.fetchval(f"SELECT count(*) FROM {view}") > 0, view

    run(test())


#: What it could try; each is refused, even after it has lifted what its login was given by default.
FORBIDDEN = [
    "SET ROLE sluice_dashboard",
    "SET ROLE sluice_dashboard_views",
    "SET ROLE sluice_reader",
    "SET ROLE sluice_app",
    "SET ROLE sluice_worker",
    "SET ROLE sluice_owner",
    "SET ROLE sluice",
    "SET ROLE {theirs}",
    "SET SESSION AUTHORIZATION {theirs}",
    "ALTER ROLE {ours} RENAME TO sluice_dashboard_0123456789abcdef0123456789abcdef",
    "ALTER ROLE {ours} CONNECTION LIMIT -1",
    "ALTER ROLE {theirs} PASSWORD 'x'",
    "GRANT sluice_reader TO {ours}",
    "GRANT {theirs} TO {ours}",
    "CREATE ROLE x",
    "SELECT * FROM public.readings",
    "SELECT * FROM public.series",
    "SELECT * FROM public.organisations",
    "SELECT * FROM public.credentials",
    "SELECT * FROM public.organisation_readings",
    "SELECT * FROM public.readings_page(ARRAY[1], '-infinity', 'infinity', true, 'infinity', 0, 0, 10)",
    "SELECT public.current_organisation()",
    "SELECT rolpassword FROM pg_authid",
    "INSERT INTO dashboards.sites (site) VALUES ('x')",
    "UPDATE dashboards.sites SET site = 'x'",
    "DELETE FROM dashboards.sites",
    "CREATE OR REPLACE VIEW dashboards.sites AS SELECT 1",
    "DROP VIEW dashboards.sites",
    "ALTER VIEW dashboards.sites RESET (security_barrier)",
    "CREATE TABLE dashboards.x (y int)",
    "CREATE TEMP TABLE x (y int)",
    "CREATE FUNCTION dashboards.x() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE SCHEMA x",
    "SELECT lo_create(0)",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_try_advisory_xact_lock_shared(1, 2)",
    "SELECT pg_logical_emit_message(false, 'x', 'y')",
    "SELECT pg_read_file('/etc/passwd')",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'sluice'",
    "ALTER SYSTEM SET work_mem = '1GB'",
]  # fmt: skip


async def refused(session: Any, statement: str) -> bool:
    try:
        await session.execute(statement)
    except (asyncpg.InsufficientPrivilegeError, asyncpg.FeatureNotSupportedError):
        return True
    return False


def test_it_can_do_nothing_else(any_database: Database) -> None:
    async def test() -> None:
        busy = await connect(any_database.settings, role=None, application="test")
        async with two_tenants(any_database) as (ours, theirs), looking(any_database, ours.user) as session:
            for statement in FORBIDDEN:
                await session.execute("SET default_transaction_read_only = off")
                refusal = await refused(session, statement.format(ours=ours.user.user, theirs=theirs.user.user))
                assert refusal, f"it may: {statement}"
        assert not busy.is_closed()
        await busy.close()

    run(test())


#: Relations that the login may read or write, but for catalogues: PostgreSQL's own and those of extensions.
READABLE = """
SELECT c.oid::regclass::text AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')
  AND has_schema_privilege($1, n.oid, 'USAGE')
  AND (CASE WHEN c.relkind = 'S' THEN has_sequence_privilege($1, c.oid, 'SELECT, USAGE, UPDATE')
       ELSE has_any_column_privilege($1, c.oid, 'SELECT, INSERT, UPDATE')
            OR has_table_privilege($1, c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE') END)
"""


def test_of_all_there_is_it_may_read_the_views_alone(any_database: Database) -> None:
    async def test() -> None:
        async with two_tenants(any_database) as (ours, _):
            superuser = await asyncpg.connect(any_database.superuser_url)
            found = {row["name"] for row in await superuser.fetch(READABLE, ours.user.user)}
            assert found == {f"dashboards.{view}" for view in VIEWS}
            (role,) = await superuser.fetch("SELECT * FROM pg_roles WHERE rolname = $1", ours.user.user)
            assert not any(role[right] for right in ("rolsuper", "rolcreaterole", "rolcreatedb", "rolreplication"))
            assert not role["rolbypassrls"]
            assert role["rolconnlimit"] == dashboards.CONNECTIONS_MAX
            barriers = await superuser.fetch(
                "SELECT relname FROM pg_class WHERE relnamespace = 'dashboards'::regnamespace AND relkind = 'v'"
                " AND 'security_barrier=true' = ANY (reloptions)"
            )
            assert {row["relname"] for row in barriers} == set(VIEWS)
            await superuser.close()

    run(test())


def test_a_name_that_is_no_organisation_s_sees_nothing(any_database: Database) -> None:
    async def test() -> None:
        async with two_tenants(any_database) as (ours, _):
            owner = await connect_owner(any_database.settings)
            name = f"sluice_dashboard_{ours.organisation.hex}x"
            password = "a password of its own"
            await owner.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{dashboards.verifier(password)}'")
            try:
                await owner.execute(f"GRANT sluice_dashboard TO {name} WITH INHERIT TRUE, SET FALSE")
                user = dashboards.DashboardUser(name, password.replace(" ", "%20"), any_database.name)
                async with looking(any_database, user) as session:
                    for view in VIEWS:
                        assert await session.fetchval(f"SELECT count(*) FROM dashboards.{view}") == 0
            finally:
                await owner.execute(f"DROP ROLE {name}")
                await owner.close()

    run(test())


def test_a_new_password_ends_the_old_one_and_a_dropped_login_sees_nothing(database: Database) -> None:
    async def test() -> None:
        async with two_tenants(database) as (ours, _):
            login = await connect(database.settings, role=None, application="test")
            owner = await connect_owner(database.settings)
            renewed = await dashboards.create(login, owner, ours.organisation)
            with pytest.raises(asyncpg.InvalidPasswordError):
                await asyncpg.connect(url_of(database, ours.user))
            async with looking(database, renewed) as session:
                assert await session.fetchval("SELECT count(*) FROM devices") == 1
                assert await dashboards.drop(owner, ours.organisation)
                with pytest.raises(asyncpg.PostgresError):
                    await session.fetch("SELECT * FROM dashboards.devices")
            assert not await dashboards.drop(owner, ours.organisation)
            with pytest.raises(ConfigurationError, match="no organisation"):
                await dashboards.create(login, owner, uuid7())
            await owner.close()
            await login.close()

    run(test())
