"""Whether who was let in a while ago would be still: what a stream asks every few seconds."""

from api.access.authority import act_for
from api.access.standing import still_let_in
from api.http.operations import Caller, Role
from api.platform.live import LISTENS
from runtime.postgres import connect
from tests.databases import Database
from tests.people_rig import People, Person, people
from tests.support import run


async def logged_in(here: People, person: Person) -> Caller:
    await here.token(person)
    rows = await here.superuser("SELECT session_id FROM sessions WHERE user_id = $1", person.user)
    return Caller(here.organisation, Role.VIEWER, None, person.user, session=rows[0]["session_id"])


async def keyed(here: People, *scopes: str) -> Caller:
    before = {row[0] for row in await here.superuser("SELECT credential_id FROM credentials")}
    await here.api_key(*scopes)
    (made,) = {row[0] for row in await here.superuser("SELECT credential_id FROM credentials")} - before
    return Caller(here.organisation, None, made, None, scopes=frozenset(scopes))


def test_who_was_removed_logged_out_or_revoked_is_let_in_no_more(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            kept, removed, left = [await logged_in(here, await here.person()) for _ in range(3)]
            key, owner, revoked, expired, other = [
                await keyed(here, scope)
                for scope in ("readings:read", "owner", "readings:read", "readings:read", "devices:read")
            ]
            await here.superuser("DELETE FROM memberships WHERE user_id = $1", removed.user)
            await here.superuser("UPDATE sessions SET ended_at = now() WHERE session_id = $1", left.session)
            changed = "UPDATE credentials SET {} = now() WHERE credential_id = $1"
            await here.superuser(changed.format("revoked_at"), revoked.credential)
            await here.superuser(changed.format("expires_at"), expired.credential)
            app = await connect(database.settings, role="sluice_app", application="test")
            async with app.transaction():
                await act_for(app, organisation=here.organisation)
                callers = {kept, removed, left, key, owner, revoked, expired, other}
                assert await still_let_in(app, callers, LISTENS) == {kept, key, owner}
            stranger, _ = await here.tenant()
            async with app.transaction():
                await act_for(app, organisation=stranger)
                assert await still_let_in(app, {key}, LISTENS) == set()
            await app.close()

    run(test())
