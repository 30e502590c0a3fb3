"""Row-level security: no table with tenant data lacks it, and nobody reaches readings past it."""

from hashlib import sha256
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from api.registry.devices import add_device
from api.registry.organisations import acting_for, add_organisation
from runtime.ids import uuid7
from runtime.postgres import connect
from tests.databases import Database
from tests.people_rig import People, people
from tests.support import run
from tests.tenants_rig import Tenant, ids_in, ids_of, inhabited, rows_of

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
#: What the API's role may read without it: nobody's in particular, or sealed.
COMMON = {
    "log_generations", "log_losses", "log_positions", "spool_losses", "spool_positions", "schema_migrations",
    "signing_keys", "gateway_signing_keys", "rollup_state", "certificate_authorities", "certificate_revocations",
    "certificate_revocation_lists", "system_templates",
}  # fmt: skip
REACHABLE = """
SELECT c.relname FROM pg_class c
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
  AND has_any_column_privilege('sluice_app', c.oid, 'SELECT, INSERT, UPDATE')
  AND NOT (c.relrowsecurity AND c.relforcerowsecurity)
"""
#: Foreign keys between tables that both say whose their rows are, and whether the key says it too, and always.
REFERENCES = """
SELECT format('%s: %s', c.conrelid::regclass, c.conname) AS name,
       EXISTS (SELECT FROM unnest(c.conkey, c.confkey) k (own, its) WHERE (k.own, k.its) = (a.attnum, b.attnum))
       AND (a.attnotnull OR cardinality(c.conkey) = 1) AS is_kept,
       c.conrelid::regclass::text AS referring, c.confrelid::regclass::text AS referred,
       a.attname AS whose, i.attname AS id
FROM pg_constraint c
JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attname IN ('organisation_id', 'user_id') AND NOT a.attisdropped
JOIN pg_attribute b ON b.attrelid = c.confrelid AND b.attname = a.attname AND NOT b.attisdropped
JOIN pg_attribute i ON i.attrelid = c.conrelid AND i.attnum = c.conkey[cardinality(c.conkey)]
WHERE c.contype = 'f' AND c.connamespace = 'public'::regnamespace ORDER BY 1
"""


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
        reached = {row["relname"] for row in await fetch(any_database.superuser_url, REACHABLE)}
        assert reached == COMMON

    run(test())


def test_every_reference_keeps_to_whose_it_is(any_database: Database) -> None:
    async def test() -> None:
        found = await fetch(any_database.superuser_url, REFERENCES)
        assert len(found) > 20
        assert [row["name"] for row in found if not row["is_kept"]] == []

    run(test())


def test_a_reference_to_what_is_another_s_is_refused_as_one_to_nothing(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            ours, theirs = await inhabited(here), await inhabited(here)
            for tenant in (ours, theirs):
                await here.superuser(
                    "INSERT INTO limit_overrides (organisation_id, site_id) VALUES ($1, $2)",
                    tenant.organisation, UUID(tenant.things["site"]),
                )  # fmt: skip
            app = await connect(any_database.settings, role="sluice_app", application="test")
            await app.execute("SELECT set_config('sluice.organisation', $1, false)", str(ours.organisation))
            tried = set()
            for key in await fetch(any_database.superuser_url, REFERENCES):
                referring, column = key["referring"], key["id"]
                own = f"SELECT ctid FROM {referring} WHERE {column} IS NOT NULL LIMIT 1"
                if key["whose"] == column or not await may_update(any_database, referring, column):
                    continue
                ((other,),) = await here.superuser(
                    f"SELECT {column} FROM {key['referred']} WHERE organisation_id = $1 LIMIT 1", theirs.organisation
                )
                if not await app.fetch(own):
                    continue
                refused = [await refusal(app, f"UPDATE {referring} SET {column} = $1 WHERE ctid = ({own})", value)
                           for value in (other, uuid7())]  # fmt: skip
                assert refused[0] == refused[1], key["name"]
                tried.add((referring, column))
            await app.close()
            assert {("devices", "site_id"), ("site_servers", "credential_id"), ("credentials", "device_id")} < tried
            assert len(tried) > 10

    run(test())


async def may_update(database: Database, table: str, column: str) -> bool:
    sql = "SELECT has_column_privilege('sluice_app', $1, $2, 'UPDATE')"
    return bool((await fetch(database.superuser_url, sql, table, column))[0][0])


async def refusal(app: Any, sql: str, *values: Any) -> type[Exception]:
    """How it is refused; that it is not fails the test."""
    with pytest.raises((asyncpg.ForeignKeyViolationError, asyncpg.InsufficientPrivilegeError)) as refused:
        await app.execute(sql, *values)
    return refused.type


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
            ("INSERT INTO memberships VALUES ($1, $2, 'viewer')", (organisation, their_user)),
            ("UPDATE memberships SET user_id = $1", (their_user,)),
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
        for name in (*LETTING_IN, "end_attempt", "forget_attempts", "has_password"):
            assert found[name] == {"sluice_app"}
        for name in ("credential_changed", "organisation_changed"):
            assert name not in found

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
#: $4 row in quarantine, $5 e-mail, $6 the hash of a token. None may give or change anything.
ASKING = {
    "readings_page": "readings_page(ARRAY[$2::int], '-infinity', 'infinity', true, 'infinity', 0, 0, 10)",
    "readings_of_stays": "readings_of_stays(ARRAY[$2::int], ARRAY['-infinity'::timestamptz],"
    " ARRAY['infinity'::timestamptz], false, '-infinity', 0, 0, 10)",
    "readings_latest": "readings_latest(ARRAY[$2::int], '-infinity', 'infinity')",
    "readings_latest_of_stays": "readings_latest_of_stays(ARRAY[$2::int], ARRAY['-infinity'::timestamptz],"
    " ARRAY['infinity'::timestamptz])",
    "readings_blocks": "readings_blocks(ARRAY[$2::int], ARRAY['-infinity'::timestamptz],"
    " ARRAY['infinity'::timestamptz], false, 10)",
    "readings_estimated": "readings_estimated(ARRAY[$2::int], ARRAY['-infinity'::timestamptz],"
    " ARRAY['infinity'::timestamptz], 10) e WHERE e.readings > 0 OR e.fits_until IS NOT NULL",
    "readings_aggregated": "readings_aggregated(ARRAY[$2::int], ARRAY['1990-01-01'::timestamptz],"
    " ARRAY['2100-01-01'::timestamptz], ARRAY['1990-01-01'::timestamptz, '2100-01-01'], NULL, 'whole')",
    # Which times another keeps nothing of, would stand there.
    "readings_told": "readings_told('1990-01-01', '2100-01-01', '5m') t"
    " WHERE t.told_from <> '1990-01-01' OR t.told_to <> '2100-01-01' OR t.coarser IS NOT NULL",
    "readings_percentiles": "readings_percentiles(ARRAY[$2::int], ARRAY['1990-01-01'::timestamptz],"
    " ARRAY['2100-01-01'::timestamptz], ARRAY['1990-01-01'::timestamptz, '2100-01-01'], ARRAY[0.5])",
    "readings_version": "(SELECT readings_version(ARRAY[$2::int], 'infinity') AS v) o"
    " WHERE v <> readings_version('{}', 'infinity')",
    # Which reading and which record is another's, test_live knows.
    "stored_readings": "stored_readings(ARRAY[$2::int], ARRAY[now()], ARRAY[false])",
    "readings_moved": "readings_moved(ARRAY[$1::uuid])",
    "hand_over_device": "hand_over_device($4::uuid, $1::uuid) h WHERE h = 'moved'",
    "begin_site_erasure": "begin_site_erasure($3::uuid) b WHERE b",
    "claim_unassigned": "claim_unassigned($7::uuid, $4::uuid) n WHERE n IS NOT NULL",
    "discard_quarantined": "discard_quarantined(ARRAY[$4::uuid], 'x') n WHERE n > 0",
}
#: What readings_told would tell of.
LET_GO = """
INSERT INTO retention_horizons (organisation_id, tier, refused_through, dropped_through, epoch)
SELECT $1, tier, '2026-01-01', '2026-01-01', 1 FROM unnest('{raw,5m}'::text[]) tier"""
#: Whoever lets people in acts for nobody, and finds by a secret or an e-mail whose it is; nobody else does.
LETTING_IN = {
    "begin_login": "begin_login($5, sha256('a'), uuid_send($1), 5, '1 hour', 5) WHERE password_hash IS NOT NULL",
    "user_of_email": "user_of_email($5) u WHERE u IS NOT NULL",
    "refresh_token_presented": "refresh_token_presented(ARRAY[$6::bytea])",
    "password_reset_presented": "password_reset_presented(ARRAY[$6::bytea])",
    "invitation_presented": "invitation_presented(ARRAY[$6::bytea])",
    "registration_presented": "registration_presented(ARRAY[$6::bytea])",
}
#: They show nothing; what they write is the caller's own, or goes while it acts for nobody only (tested below).
HARMLESS = {"append_audit", "end_attempt", "forget_attempts", "forget_revocations", "has_password"}


@pytest.mark.parametrize("acting", ["nobody", "ours"])
def test_nothing_that_the_api_may_read_or_call_shows_another_s(any_database: Database, acting: str) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            theirs, ours = await inhabited(here), await inhabited(here)
            secret = await secret_of(here, theirs)
            await fetch(any_database.superuser_url, LET_GO, theirs.organisation)
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
            assert (seen > 60) == (acting == "ours")
            things, person = theirs.things, theirs.people["member"]
            subjects = (
                theirs.organisation, theirs.series, things["site"], things["held"], person.email, secret,
                things["unassigned"],
            )  # fmt: skip
            for function in await fetch(any_database.superuser_url, CALLABLE):
                name = function["proname"]
                calls = ASKING | LETTING_IN
                assert name in HARMLESS or name in calls, f"{name}: say what it shows"
                if name in calls:
                    given = (
                        "WITH given AS (SELECT $1::uuid, $2::int, $3::uuid, $4::uuid, $5::text, $6::bytea, $7::uuid)"
                    )
                    rows = await app.fetch(f"{given} SELECT * FROM {calls[name]}", *subjects)
                    assert bool(rows) == (name in LETTING_IN and acting == "nobody"), name
            await app.close()
            assert await rows_of(any_database, theirs) == before

    run(test())


async def secret_of(here: People, tenant: Tenant) -> bytes:
    """The hash of one secret that finds a session, a reset, an invitation and a registration of the tenant's."""
    user = tenant.people["member"].user
    one = "token_hash = (SELECT token_hash FROM {0} WHERE {1} = $1 LIMIT 1)"
    for table, column, value in (
        ("refresh_tokens", "user_id", user), ("invitations", "organisation_id", tenant.organisation),
        ("device_registrations", "organisation_id", tenant.organisation),
    ):  # fmt: skip
        await here.superuser(
            f"UPDATE {table} SET token_hash = sha256('theirs') WHERE {one.format(table, column)}", value
        )
    await here.superuser("INSERT INTO password_resets VALUES (sha256('theirs'), $1, now(), now())", user)
    return sha256(b"theirs").digest()


# ---------------------------------------------------------------- logging in

BEGIN = "SELECT wait_s, user_id, password_hash FROM begin_login($1, $2, $3, 2, '1 hour', 5)"
ACCOUNT, ADDRESS = sha256(b"account").digest(), bytes(16)


def test_a_password_s_hash_is_given_to_an_attempt_that_counts_and_to_nobody_who_acts(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            person = await here.person("owner")
            ((kept,),) = await here.superuser("SELECT password_hash FROM users WHERE user_id = $1", person.user)
            app: Any = await connect(any_database.settings, role="sluice_app", application="test")
            attempt = (person.email, ACCOUNT, ADDRESS)
            for name, value in (("organisation", here.organisation), ("user", person.user)):
                async with app.transaction():
                    await app.execute(f"SELECT set_config('sluice.{name}', $1, true)", str(value))
                    assert await app.fetch(BEGIN, *attempt) == []
                    assert await app.fetchval("SELECT user_of_email($1)", person.email) is None
            assert await here.superuser("SELECT FROM login_attempts") == []

            for _ in range(2):
                assert tuple(await app.fetchrow(BEGIN, *attempt)) == (0, person.user, kept)
            async with app.transaction():
                await app.execute("SELECT set_config('sluice.user', $1, true)", str(person.user))
                await app.execute("SELECT forget_attempts($1, $2)", ACCOUNT, ADDRESS)
                await app.execute("SELECT end_attempt($1, $2, false)", ACCOUNT, ADDRESS)
            wait_s, *nothing = await app.fetchrow(BEGIN, *attempt)
            assert (wait_s > 0, nothing) == (True, [None, None])
            await app.execute("SELECT forget_attempts($1, $2)", ACCOUNT, ADDRESS)
            assert tuple(await app.fetchrow(BEGIN, "nobody@example.org", ACCOUNT, ADDRESS)) == (0, None, None)
            assert await app.fetchval("SELECT user_of_email($1)", person.email) == person.user
            await app.close()

    run(test())


def test_nobody_is_told_of_another_s_password_or_attempts(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            person, other = await here.person("owner"), await here.person("owner")
            hashes = dict(await here.superuser("SELECT user_id, password_hash FROM users"))
            app = await connect(any_database.settings, role="sluice_app", application="test")
            for user, own in ((None, False), (other.user, False), (person.user, True)):
                await app.execute("SELECT set_config('sluice.user', $1, false)", str(user or ""))
                assert await app.fetchval("SELECT has_password($1)", hashes[person.user]) is own
                for sql in (
                    "SELECT FROM login_attempts", "DELETE FROM login_attempts",
                    "UPDATE login_attempts SET failures = 0",
                    "SELECT credential_changed(NULL, NULL)", "SELECT organisation_changed(NULL)",
                ):  # fmt: skip
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        await app.execute(sql)
            await app.close()

    run(test())
