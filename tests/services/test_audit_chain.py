"""The log of changes: nobody may alter it, and whoever does is found, at the first entry that is not as it was."""

from contextlib import suppress
from typing import Any, Final
from uuid import UUID

import asyncpg
import pytest

from api.registry import audit
from api.registry.organisations import acting_for, add_organisation
from deploy.auditing import NOBODYS, ROLE, Chain, check_chains
from deploy.operator import seed
from deploy.people import create_admin
from runtime.ids import uuid7
from runtime.postgres import connect
from runtime.secrets import TokenHasher, new_ring
from tests.databases import Database
from tests.support import run

ENTRIES: Final = 5
PASSWORD: Final = "correct horse battery"
NAME: Final = 'Mühle "x" \\ 🌾'


async def written(database: Database) -> UUID:
    """An organisation with some entries, each of a transaction of its own; the first tells that it was made."""
    organisation = uuid7()
    connection = await connect(database.settings, role=None, application="test")
    async with acting_for(connection, organisation):
        await add_organisation(connection, organisation, "Test")
    for number in range(1, ENTRIES):
        async with acting_for(connection, organisation):
            await audit.record(connection, "thing.changed", uuid7(), number=number, name=NAME, none=None)
    await connection.close()
    return organisation


async def checked(database: Database, organisation: UUID | None = None) -> list[Chain]:
    connection = await connect(database.settings, role=ROLE, application="test")
    try:
        return await check_chains(connection, organisation)
    finally:
        await connection.close()


async def by_hand(url: str, sql: str, *values: Any) -> str:
    connection = await asyncpg.connect(url)
    try:
        done: str = await connection.execute(sql, *values)
    finally:
        await connection.close()
    return done


TAMPERINGS = {
    "details": ("UPDATE audit_log SET details = '{\"number\": 7}' WHERE chain = $1 AND sequence = 3", 3),
    "who": ("UPDATE audit_log SET user_id = chain WHERE chain = $1 AND sequence = 1", 1),
    "when": ("UPDATE audit_log SET at = at + interval '1 microsecond' WHERE chain = $1 AND sequence = 5", 5),
    "whose": ("UPDATE audit_log SET organisation_id = NULL WHERE chain = $1 AND sequence = 2", 2),
    "a hash": ("UPDATE audit_log SET hash = sha256('x') WHERE chain = $1 AND sequence = 2", 2),
    "a previous hash": ("UPDATE audit_log SET previous_hash = sha256('x') WHERE chain = $1 AND sequence = 4", 4),
    "content and hash": (
        "UPDATE audit_log l SET action = 'x', hash = sha256(previous_hash || convert_to(audit_canonical("
        "(l.chain, l.sequence, l.organisation_id, l.at, l.user_id, l.credential_id, 'x', l.subject, l.details,"
        " l.previous_hash, l.hash)::audit_log), 'UTF8')) WHERE chain = $1 AND sequence = 3",
        4,
    ),
    "the first is gone": ("DELETE FROM audit_log WHERE chain = $1 AND sequence = 1", 1),
    "one is gone": ("DELETE FROM audit_log WHERE chain = $1 AND sequence = 3", 3),
    "the last is gone": ("DELETE FROM audit_log WHERE chain = $1 AND sequence = 5", 5),
    "all are gone": ("DELETE FROM audit_log WHERE chain = $1", 1),
    "the head is gone": ("DELETE FROM audit_heads WHERE chain = $1", 5),
    "the head is another's": ("UPDATE audit_heads SET hash = sha256('x') WHERE chain = $1", 6),
    "one more": (
        "INSERT INTO audit_log SELECT chain, 6, organisation_id, at, NULL, NULL, action, subject, details, hash,"
        " sha256('x') FROM audit_log WHERE chain = $1 AND sequence = 5",
        6,
    ),
}


def test_what_was_written_is_whole(any_database: Database) -> None:
    async def test() -> None:
        organisations = [await written(any_database) for _ in range(2)]
        chains = await checked(any_database)
        assert [chain.organisation_id for chain in chains] == sorted(map(str, organisations))
        assert all((chain.entries, chain.broken_at) == (ENTRIES, None) for chain in chains)
        (one,) = await checked(any_database, organisations[1])
        assert one in chains

    run(test())


def test_each_tampering_is_found_at_its_entry_and_in_its_chain_only(any_database: Database) -> None:
    async def test() -> None:
        for name, (sql, entry) in TAMPERINGS.items():
            ours, theirs = await written(any_database), await written(any_database)
            assert (await by_hand(any_database.superuser_url, sql, ours)).rpartition(" ")[2] != "0", name
            (broken,) = await checked(any_database, ours)
            (whole,) = await checked(any_database, theirs)
            assert (broken.broken_at, bool(broken.message)) == (entry, True), name
            assert whole.broken_at is None

    run(test())


@pytest.mark.parametrize("role", ["sluice_app", "sluice_ingest", "sluice_worker", "sluice_reader", "sluice_owner"])
def test_no_role_alters_it(any_database: Database, role: str) -> None:
    async def test() -> None:
        organisation = await written(any_database)
        url = any_database.owner_url if role == "sluice_owner" else any_database.url
        for sql in (
            "UPDATE audit_log SET action = 'x'",
            "DELETE FROM audit_log",
            "TRUNCATE audit_log",
            "INSERT INTO audit_log SELECT * FROM audit_log",
            "UPDATE audit_heads SET sequence = 0",
        ):
            if role == "sluice_owner" and not sql.startswith(("UPDATE audit_log", "DELETE")):
                continue  # who may change the tables may do anything: the chain tells
            connection = await asyncpg.connect(url)
            try:
                if role != "sluice_owner":
                    await connection.execute(f"SET ROLE {role}")
                await connection.execute(f"SELECT set_config('sluice.organisation', '{organisation}', false)")
                if role == "sluice_owner":
                    assert (await connection.execute(sql)).endswith(" 0")
                else:
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        await connection.execute(sql)
            finally:
                await connection.close()
        (chain,) = await checked(any_database, organisation)
        assert (chain.entries, chain.broken_at) == (ENTRIES, None)

    run(test())


#: What leaves nothing behind in the chain itself: only what it would have told of is still there.
EMPTYINGS = {
    "entries and head": ("DELETE FROM audit_log WHERE chain = $1", "DELETE FROM audit_heads WHERE chain = $1"),
    "entries, and the head set back": (
        "DELETE FROM audit_log WHERE chain = $1",
        "UPDATE audit_heads SET sequence = 0, hash = sha256('') WHERE chain = $1",
    ),
}


@pytest.mark.parametrize("emptying", EMPTYINGS)
def test_a_chain_that_was_emptied_is_noticed_also_once_it_goes_on(any_database: Database, emptying: str) -> None:
    async def test() -> None:
        ours, theirs = await written(any_database), await written(any_database)
        for sql in EMPTYINGS[emptying]:
            await by_hand(any_database.superuser_url, sql, ours)
        for entries in range(3):
            found = {chain.organisation_id: chain for chain in await checked(any_database)}
            assert set(found) == {str(ours), str(theirs)}
            assert (found[str(ours)].broken_at, found[str(ours)].entries) == (1, entries)
            assert str(ours) in found[str(ours)].message
            assert found[str(theirs)].broken_at is None
            assert await checked(any_database, ours) == [found[str(ours)]]
            connection = await connect(any_database.settings, role=None, application="test")
            async with acting_for(connection, ours):
                await audit.record(connection, "thing.changed", uuid7())
            await connection.close()

    run(test())


@pytest.mark.parametrize("emptying", EMPTYINGS)
def test_the_chain_of_no_organisation_tells_of_all_people(any_database: Database, emptying: str) -> None:
    async def test() -> None:
        connection = await connect(any_database.settings, role=None, application="test")
        assert await checked(any_database) == []
        first = await create_admin(connection, "first@example.org", "First", PASSWORD)
        second = await create_admin(connection, "second@example.org", "Second", PASSWORD)
        (whole,) = await checked(any_database)
        assert (whole.organisation_id, whole.entries, whole.broken_at) == (None, 2, None)
        for sql in EMPTYINGS[emptying]:
            await by_hand(any_database.superuser_url, sql, NOBODYS)
        (broken,) = await checked(any_database)
        assert (broken.organisation_id, broken.entries, broken.broken_at) == (None, 0, 1)
        # It goes on with one of the two, and nothing tells of the other.
        await create_admin(connection, "first@example.org", "First", PASSWORD)
        (broken,) = await checked(any_database)
        assert (broken.entries, broken.broken_at, second in broken.message) == (2, 1, True)
        assert first not in broken.message
        await connection.close()

    run(test())


def test_an_organisation_of_the_command_line_begins_with_an_entry_too(database: Database) -> None:
    async def test() -> None:
        connection = await connect(database.settings, role=None, application="test")
        demo = await seed(connection, TokenHasher(new_ring()))
        await connection.close()
        (chain,) = await checked(database)
        assert (chain.organisation_id, chain.broken_at) == (str(demo.organisation_id), None)

    run(test())


def test_an_entry_comes_and_goes_with_its_transaction(database: Database) -> None:
    async def test() -> None:
        organisation = await written(database)
        connection = await connect(database.settings, role=None, application="test")
        with suppress(ZeroDivisionError):
            async with acting_for(connection, organisation):
                await audit.record(connection, "thing.changed", uuid7())
                raise ZeroDivisionError
        async with acting_for(connection, organisation):
            await audit.record(connection, "thing.changed", uuid7())
        await connection.close()
        (chain,) = await checked(database, organisation)
        assert (chain.entries, chain.broken_at) == (ENTRIES + 1, None)

    run(test())
