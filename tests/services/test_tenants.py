"""Row-level security: no table with tenant data lacks it, and nobody reaches readings past it."""

from typing import Any
from uuid import UUID

import asyncpg
import pytest

from api.registry.devices import add_device
from api.registry.organisations import acting_for, add_organisation
from runtime.ids import uuid7
from runtime.postgres import connect
from tests.databases import Database
from tests.people_rig import people
from tests.support import run
from tests.tenants_rig import ids_in, ids_of, inhabited, rows_of

#: Tables whose rows belong to an organisation through their series; roles reach them by views and functions only.
BY_SERIES = ("readings", "text_readings", "rollups_5m", "rollups_1h", "rollups_1d", "rollup_marks")
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


# ---------------------------------------------------------------- people

SECRETS = ("refresh_tokens", "password_resets", "sessions")
PEOPLE = ("users", "memberships", "invitations", "audit_log", *SECRETS)


async def _inhabited(database: Database) -> dict[str, tuple[UUID, UUID]]:
    """Two organisations with one person each, and one row of every kind: organisation and user of each."""
    found = {}
    connection = await asyncpg.connect(database.superuser_url)
    for name in ("ours", "theirs"):
        organisation, user, session = uuid7(), uuid7(), uuid7()
        for sql, values in (
            ("INSERT INTO organisations (organisation_id, name) VALUES ($1, $2)", (organisation, name)),
            ("INSERT INTO users (user_id, email, name) VALUES ($1, $2, 'x')", (user, f"{name}@example.org")),
            ("INSERT INTO memberships VALUES ($1, $2, 'owner')", (organisation, user)),
            ("INSERT INTO sessions (session_id, user_id) VALUES ($1, $2)", (session, user)),
            (
                "INSERT INTO refresh_tokens VALUES (sha256($1::text::bytea), $2, $3, now(), now())",
                (name, session, user),
            ),
            ("INSERT INTO password_resets VALUES (sha256($1::text::bytea), $2, now(), now())", (name, user)),
            (
                "INSERT INTO invitations (invitation_id, organisation_id, email, role, token_hash, expires_at)"
                " VALUES ($1, $2, 'x@y', 'viewer', sha256($3::text::bytea), now())",
                (uuid7(), organisation, name),
            ),
        ):
            await connection.execute(sql, *values)
        await connection.execute("SELECT set_config('sluice.organisation', $1, false)", str(organisation))
        await connection.execute("SELECT append_audit('x', 'x', '{}')")
        found[name] = (organisation, user)
    await connection.close()
    return found


async def _seen(connection: Any, organisation: UUID | None, user: UUID | None) -> dict[str, int]:
    """How many rows of each table a session of the API sees that acts for these."""
    async with connection.transaction():
        for name, value in (("organisation", organisation), ("user", user)):
            await connection.execute(f"SELECT set_config('sluice.{name}', $1, true)", str(value or ""))
        return {
            table: await connection.fetchval(f"SELECT count(*) FROM {table}") for table in ("organisations", *PEOPLE)
        }


def test_who_acts_for_nobody_sees_nobody_and_who_acts_for_one_sees_his_own(any_database: Database) -> None:
    async def test() -> None:
        organisation, user = (await _inhabited(any_database))["ours"]
        app = await connect(any_database.settings, role="sluice_app", application="test")
        nothing = dict.fromkeys(("organisations", *PEOPLE), 0)
        own = dict.fromkeys(SECRETS, 1) | {"users": 1}
        of_organisation = dict.fromkeys(("organisations", "memberships", "invitations", "audit_log", "users"), 1)
        assert await _seen(app, None, None) == nothing
        assert await _seen(app, uuid7(), uuid7()) == nothing
        assert await _seen(app, None, user) == nothing | own | {"organisations": 1, "memberships": 1}
        assert await _seen(app, organisation, None) == nothing | of_organisation
        assert await _seen(app, organisation, user) == nothing | of_organisation | own
        await app.close()

    run(test())


def test_nobody_writes_what_is_another_s(any_database: Database) -> None:
    async def test() -> None:
        both = await _inhabited(any_database)
        organisation, user = both["ours"]
        theirs, their_user = both["theirs"]
        app = await connect(any_database.settings, role="sluice_app", application="test")
        await app.execute("SELECT set_config('sluice.organisation', $1, false)", str(organisation))
        await app.execute("SELECT set_config('sluice.user', $1, false)", str(user))
        for sql, values in (
            ("INSERT INTO memberships VALUES ($1, $2, 'owner')", (theirs, user)),
            ("INSERT INTO sessions (session_id, user_id) VALUES ($1, $2)", (uuid7(), their_user)),
            ("INSERT INTO users (user_id, email, name) VALUES ($1, 'n@x', 'x')", (uuid7(),)),
            ("UPDATE users SET super_admin = true WHERE user_id = $1", (user,)),
            ("INSERT INTO users (user_id, email, name, super_admin) VALUES ($1, 'n@x', 'x', true)", (user,)),
            ("SELECT password_hash FROM users WHERE user_id = $1", (user,)),
            ("SELECT make_super_admin($1, 'n@x', 'x', '$argon2id$')", (user,)),
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await app.execute(sql, *values)
        for sql in ("UPDATE users SET name = 'x'", "UPDATE sessions SET ended_at = now()", "DELETE FROM memberships"):
            key = "organisation_id" if "memberships" in sql else "user_id"
            other = theirs if "memberships" in sql else their_user
            assert (await app.execute(f"{sql} WHERE {key} = $1", other)).endswith(" 0")
        await app.close()

    run(test())


def test_functions_with_the_owner_s_rights_are_for_their_role_alone(any_database: Database) -> None:
    async def test() -> None:
        rows = await fetch(
            any_database.superuser_url,
            "SELECT p.oid::regprocedure::text AS name, r.rolname FROM pg_proc p CROSS JOIN pg_roles r"
            " WHERE p.pronamespace = 'public'::regnamespace AND p.prosecdef AND r.rolname LIKE 'sluice\\_%'"
            " AND r.rolname <> 'sluice_owner' AND has_function_privilege(r.rolname, p.oid, 'EXECUTE')"
            " AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')",
        )
        found: dict[str, set[str]] = {}
        for row in rows:
            found.setdefault(row["name"].partition("(")[0], set()).add(row["rolname"])
        assert found["make_super_admin"] == {"sluice_worker"}
        assert found["append_audit"] == {"sluice_app", "sluice_worker"}
        for name in ("user_of_email", "refresh_token_presented", "password_reset_presented", "invitation_presented"):
            assert found[name] == {"sluice_app"}

    run(test())


# ---------------------------------------------------------------- everything that the API's role may read or call

READABLE = """
SELECT c.relname AS name, array_agg(a.attname::text ORDER BY a.attnum) AS columns
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
  AND has_column_privilege('sluice_app', c.oid, a.attnum, 'SELECT')
GROUP BY c.relname ORDER BY 1
"""
#: With the rights of the caller a function shows nothing that tables do not.
CALLABLE = """
SELECT p.proname::text FROM pg_proc p
WHERE p.pronamespace = 'public'::regnamespace AND p.prosecdef AND p.prorettype <> 'trigger'::regtype
  AND has_function_privilege('sluice_app', p.oid, 'EXECUTE')
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
ORDER BY 1
"""
#: Functions that look at rows, called for what is the other's: $1 organisation, $2 series, $3 site,
#: $4 row in quarantine. None may give or change anything.
ASKING = {
    "readings_page": "readings_page(ARRAY[$2::int], '-infinity', 'infinity', true, 'infinity', 0, 0, 10)",
    "readings_of_stays": "readings_of_stays(ARRAY[$2::int], ARRAY['-infinity'::timestamptz],"
    " ARRAY['infinity'::timestamptz], false, '-infinity', 0, 0, 10)",
    "readings_aggregated": "readings_aggregated(ARRAY[$2::int], '1990-01-01', '2100-01-01', '30 days')",
    # Which reading and which record is another's, test_live knows.
    "stored_readings": "stored_readings(ARRAY[$2::int], ARRAY[now()], ARRAY[false])",
    "readings_moved": "readings_moved(ARRAY[$1::uuid])",
    "begin_site_erasure": "begin_site_erasure($3::uuid) b WHERE b",
    "discard_quarantined": "discard_quarantined(ARRAY[$4::uuid], 'x') n WHERE n > 0",
}
#: They show nothing, or what a secret or an e-mail finds, to whoever has it.
HARMLESS = {
    "append_audit", "credential_changed", "organisation_changed", "user_of_email", "refresh_token_presented",
    "password_reset_presented", "invitation_presented",
}  # fmt: skip


@pytest.mark.parametrize("acting", ["nobody", "ours"])
def test_nothing_that_the_api_may_read_or_call_shows_another_s(any_database: Database, acting: str) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            theirs, ours = await inhabited(here), await inhabited(here)
            before = await rows_of(any_database, theirs)
            hidden = ids_of(before) - ids_of(await rows_of(any_database, ours))
            known = {person.email for person in theirs.people.values()}
            app = await connect(any_database.settings, role="sluice_app", application="test")
            if acting == "ours":
                await app.execute("SELECT set_config('sluice.organisation', $1, false)", str(ours.organisation))
                await app.execute("SELECT set_config('sluice.user', $1, false)", str(ours.people["owner"].user))
            seen = 0
            for table in await fetch(any_database.superuser_url, READABLE):
                columns = ", ".join(f'"{column}"' for column in table["columns"])
                rows = await app.fetch(f"SELECT to_jsonb(t)::text FROM (SELECT {columns} FROM {table['name']}) t")
                text = "\n".join(row[0] for row in rows)
                assert not ids_in(text) & hidden, table["name"]
                assert not [email for email in known if email in text], table["name"]
                seen += len(rows)
            assert (seen > 40) == (acting == "ours")  # migrations are nobody's
            things = theirs.things
            subjects = (theirs.organisation, theirs.series, things["site"], things["held"])
            for function in await fetch(any_database.superuser_url, CALLABLE):
                name = function["proname"]
                assert name in HARMLESS or name in ASKING, f"{name}: say what it shows"
                if name in ASKING:
                    given = "WITH given AS (SELECT $1::uuid, $2::int, $3::uuid, $4::uuid)"
                    sql = f"{given} SELECT * FROM {ASKING[name]}"
                    assert not await app.fetch(sql, *subjects), name
            await app.close()
            assert await rows_of(any_database, theirs) == before

    run(test())
