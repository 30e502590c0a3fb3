"""The upgrade after which references keep to their organisation: of a database with data, right and wrong.

Left out: what holds afterwards (`test_tenants`).
"""

from hashlib import sha256
from typing import Any, Final
from uuid import UUID

import asyncpg
import pytest

from deploy.auditing import ROLE, check_chains
from deploy.database import migrations
from runtime.errors import ConfigurationError
from runtime.ids import uuid7
from runtime.migrate import SESSION, migrate
from runtime.postgres import connect
from tests.databases import Database
from tests.support import run

VERSION: Final = 18
FORCED: Final = """
SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relrowsecurity AND relforcerowsecurity
"""


async def upgrade(database: Database, version: int = VERSION) -> list[str]:
    connection = await connect(database.settings, role=None, application="test", url=database.owner_url, **SESSION)
    try:
        return [str(one) for one in await migrate(connection, migrations()[:version])]
    finally:
        await connection.close()


class Old:
    """Two organisations in a database of the version before, with something of every kind that refers to another."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.ours: dict[str, UUID] = {}
        self.theirs: dict[str, UUID] = {}

    async def fill(self) -> None:
        self.ours, self.theirs = await self._tenant(), await self._tenant()

    async def _tenant(self) -> dict[str, UUID]:
        names = ("organisation", "site", "device", "gateway", "group", "edge", "user", "session")
        made = {name: uuid7() for name in names}
        statements = """
        INSERT INTO organisations (organisation_id, name) VALUES (:organisation, 'x');
        INSERT INTO sites (site_id, organisation_id, name) VALUES (:site, :organisation, 'x');
        INSERT INTO devices (device_id, organisation_id, name, local_id) VALUES (:device, :organisation, 'x', 'x');
        INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from)
            VALUES (:device, :organisation, :site, '2020-01-01Z'), (:device, :organisation, NULL, '2021-01-01Z');
        INSERT INTO credentials (credential_id, organisation_id, kind, site_id, token_hash)
            VALUES (:gateway, :organisation, 'gateway', :site, sha256(:gateway::text::bytea));
        INSERT INTO series (organisation_id, device_id, metric) VALUES (:organisation, :device, 'x');
        INSERT INTO limit_overrides (organisation_id, device_id) VALUES (:organisation, :device);
        INSERT INTO edge_devices
            (edge_device_id, site_id, organisation_id, edge_id, hardware_id, version, credential_id)
            VALUES (:edge, :site, :organisation, 'x', 'x', 'x', :gateway);
        INSERT INTO device_groups (group_id, organisation_id, name) VALUES (:group, :organisation, 'x');
        INSERT INTO device_group_members VALUES (:group, :device, :organisation);
        INSERT INTO erasures (site_id, organisation_id) VALUES (:site, :organisation);
        INSERT INTO tombstones VALUES (:site, :device, '2020-01-01Z', '2021-01-01Z', :organisation, 1);
        INSERT INTO users (user_id, email, name) VALUES (:user, :user::text, 'x');
        INSERT INTO sessions (session_id, user_id) VALUES (:session, :user);
        INSERT INTO refresh_tokens VALUES (sha256(:session::text::bytea), :session, :user, now(), now());
        """
        for name, value in made.items():
            statements = statements.replace(f":{name}", f"'{value}'::uuid")
        await self.connection.execute(statements)
        return made

    async def value(self, sql: str, *values: Any) -> Any:
        return await self.connection.fetchval(sql, *values)


async def old(database: Database) -> Old:
    await upgrade(database, VERSION - 1)
    found = Old(await asyncpg.connect(database.superuser_url))
    await found.fill()
    return found


def test_what_is_right_is_kept_and_from_then_on_has_to_be(any_bare_database: Database) -> None:
    async def test() -> None:
        here = await old(any_bare_database)
        counts = "SELECT count(*) FROM device_sites, series, tombstones, edge_devices, device_group_members"
        before = await here.value(counts), await here.value(FORCED)
        assert await upgrade(any_bare_database) == ["0018_tenant_keys"]
        assert await upgrade(any_bare_database) == []
        # One table more has row-level security than before.
        assert (await here.value(counts), await here.value(FORCED) - 1) == before
        for sql in WRONGS.values():
            with pytest.raises(asyncpg.ForeignKeyViolationError):
                await here.connection.execute(sql, *subjects(here, sql))
        stays = await here.connection.fetch(
            "SELECT valid_from::text FROM device_sites ORDER BY device_id, valid_from"
        )
        assert [row[0][:10] for row in stays] == ["-infinity", "2021-01-01"] * 2
        await here.connection.close()

    run(test())


#: What row-level security alone let through, by what is told of it: $1 is theirs, $2 ours.
WRONGS: Final = {
    "devices": "UPDATE devices SET site_id = $1::uuid -- site\nWHERE device_id = $2 -- device",
    "device_sites": "UPDATE device_sites SET site_id = $1::uuid -- site\nWHERE device_id = $2 -- device",
    "credentials": "UPDATE credentials SET site_id = $1::uuid -- site\nWHERE credential_id = $2 -- gateway",
    "series": "UPDATE series SET device_id = $1::uuid, metric = 'y' -- device\nWHERE device_id = $2 -- device",
    "limit_overrides": "UPDATE limit_overrides SET device_id = NULL, site_id = $1::uuid -- site\n"
    "WHERE device_id = $2 -- device",
    "edge_devices": "UPDATE edge_devices SET credential_id = $1::uuid -- gateway\nWHERE edge_device_id = $2 -- edge",
    "device_group_members": "UPDATE device_group_members SET device_id = $1::uuid -- device\n"
    "WHERE group_id = $2 -- group",
    "tombstones": "UPDATE tombstones SET site_id = $1::uuid, from_ts = '2020-02-01Z' -- site\n"
    "WHERE device_id = $2 -- device",
    "refresh_tokens": "UPDATE refresh_tokens SET session_id = $1::uuid -- session\nWHERE user_id = $2 -- user",
}


def subjects(here: Old, sql: str) -> tuple[UUID, UUID]:
    """Of theirs and of ours, what the comments in the statement name."""
    theirs, ours = (line.rpartition("-- ")[2] for line in sql.splitlines())
    return here.theirs[theirs], here.ours[ours]


@pytest.mark.parametrize("table", WRONGS)
def test_rows_that_refer_to_what_is_another_s_are_named_and_nothing_is_changed(
    bare_database: Database, table: str
) -> None:
    async def test() -> None:
        here = await old(bare_database)
        forced = await here.value(FORCED)
        other, own = subjects(here, WRONGS[table])
        await here.connection.execute("SET session_replication_role = replica")
        await here.connection.execute(WRONGS[table], other, own)
        with pytest.raises(ConfigurationError, match="0018_tenant_keys does not fit") as refused:
            await upgrade(bare_database)
        told = str(refused.value)
        whose = "user" if table == "refresh_tokens" else "organisation"
        for part in (f"\n{table} ", str(other), str(here.ours[whose]), str(here.theirs[whose]), "sluice migrate"):
            assert part in told
        # A token's hash is not told.
        assert sha256(str(here.ours["session"]).encode()).hexdigest() not in told
        assert await here.value("SELECT max(version) FROM schema_migrations") == VERSION - 1
        assert await here.value(FORCED) == forced

        await here.connection.execute(f"TRUNCATE {table} CASCADE")
        assert await upgrade(bare_database) == ["0018_tenant_keys"]
        await here.connection.close()

    run(test())


def test_chains_from_before_tell_of_their_organisation_and_broken_ones_stay_so(any_bare_database: Database) -> None:
    async def test() -> None:
        here = await old(any_bare_database)
        broken, empty, begun = here.ours["organisation"], here.theirs["organisation"], uuid7()
        await here.connection.execute("INSERT INTO organisations (organisation_id, name) VALUES ($1, 'x')", begun)
        for organisation, action in ((begun, "organisation.created"), (broken, "x"), (broken, "y")):
            await here.connection.execute("SELECT set_config('sluice.organisation', $1, false)", str(organisation))
            await here.connection.execute("SELECT append_audit($1, '', '{}')", action)
        await here.connection.execute("DELETE FROM audit_heads WHERE chain = $1", broken)
        for name in ("ours", "theirs"):
            user = getattr(here, name)["user"]
            await here.connection.execute("SELECT set_config('sluice.organisation', '', false)")
            await here.connection.execute("SELECT set_config('sluice.user', $1, false)", str(user))
            await here.connection.execute("SELECT append_audit('session.started', '', '{}')")
        await upgrade(any_bare_database)
        connection = await connect(any_bare_database.settings, role=ROLE, application="test")
        found = {chain.organisation_id: (chain.entries, chain.broken_at) for chain in await check_chains(connection)}
        await connection.close()
        assert found == {None: (2, None), str(broken): (2, 2), str(empty): (1, None), str(begun): (1, None)}
        told = await here.value("SELECT action FROM audit_log WHERE chain = $1", empty)
        assert told == "organisation.found"
        await here.connection.close()

    run(test())
