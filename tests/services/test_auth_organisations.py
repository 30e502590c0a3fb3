"""Organisations, members, invitations, keys and the log of changes over HTTP: who may do what, what nobody may."""

import asyncio
import itertools
from typing import Any
from uuid import UUID, uuid4

import pytest

from api.access.scopes import SCOPES
from runtime.ids import uuid7
from tests.databases import Database
from tests.people_rig import PASSWORD, People, people
from tests.support import run

ORGANISATIONS = "/api/v1/organisations"
KEYS = "/api/v1/api-keys"
ROLES = ("viewer", "member", "admin", "owner")


def path(organisation: UUID, rest: str = "") -> str:
    return f"{ORGANISATIONS}/{organisation}{rest}"


async def invite(here: People, token: str, email: str = "new@example.org", role: str = "member") -> Any:
    body = {"email": email, "role": role}
    return await here.ask("POST", path(here.organisation, "/invitations"), token, body)


async def accept(here: People, link: str, password: str = PASSWORD, name: str | None = "New") -> Any:
    body = {"token": link.split("=")[1], "password": password} | ({} if name is None else {"name": name})
    return await here.ask("POST", "/api/v1/invitations/accept", body=body)


# ---------------------------------------------------------------- organisations


def test_who_makes_an_organisation_owns_it(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            person = await here.person(None)
            token = await here.token(person)
            nowhere = await here.ask("GET", "/api/v1/ledger", token)
            assert nowhere.code == (403, "forbidden")
            made = await here.ask("POST", ORGANISATIONS, token, {"name": "Mühle 🌾"})
            assert (made.status, made.body["name"], made.headers["ETag"]) == (201, "Mühle 🌾", '"1"')
            own = UUID(made.body["organisation_id"])
            listed = (await here.ask("GET", ORGANISATIONS, token)).body
            assert [(one["organisation_id"], one["role"]) for one in listed["data"]] == [(str(own), "owner")]
            assert (await here.ask("GET", path(own), token)).body == made.body
            chosen = await here.ask("POST", "/api/v1/auth/organisation", token, {"organisation_id": str(own)})
            assert (await here.ask("GET", "/api/v1/ledger", chosen.body["access_token"])).status == 200
            assert await here.audited(own) == [("organisation.created", person.user)]

    run(test())


def test_an_organisation_under_one_key_is_made_once_and_the_key_is_the_person_s_own(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            mine, theirs = [await here.token(await here.person(None)) for _ in range(2)]
            key, body = {"Idempotency-Key": "mine"}, {"name": "Mühle"}
            answers = await asyncio.gather(
                *(here.ask("POST", ORGANISATIONS, mine, body, headers=key) for _ in range(3))
            )
            assert {answer.status for answer in answers} == {201}
            (made,) = {answer.body["organisation_id"] for answer in answers}
            other = await here.ask("POST", ORGANISATIONS, theirs, body, headers=key)
            assert (other.status, other.body["organisation_id"] == made) == (201, False)
            conflict = await here.ask("POST", ORGANISATIONS, mine, {"name": "Other"}, headers=key)
            assert conflict.code == (409, "idempotency_conflict")
            for token in (mine, theirs):
                assert len((await here.ask("GET", ORGANISATIONS, token)).body["data"]) == 1

    run(test())


def test_an_organisation_is_changed_by_who_saw_its_version(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            token = await here.token_as("admin")
            where = path(here.organisation)
            changed = await here.ask("PATCH", where, token, {"name": "Two"}, headers={"If-Match": '"1"'})
            assert (changed.status, changed.headers["ETag"], changed.body["name"]) == (200, '"2"', "Two")
            stale = await here.ask("PATCH", where, token, {"name": "Three"}, headers={"If-Match": '"1"'})
            assert stale.code == (412, "precondition_failed")
            assert (await here.ask("PATCH", where, token, {})).body["name"] == "Two"
            for body in ({"name": ""}, {"name": None}, {"name": "x" * 300}, {"names": "x"}, {"name": "a\u0000b"}):
                assert (await here.ask("PATCH", where, token, body)).code == (422, "invalid")
            assert (await here.ask("GET", where, token)).body["version"] == 2

    run(test())


def test_one_owns_so_many_organisations(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            token = await here.token(await here.person(None))
            answers = await asyncio.gather(
                *(here.ask("POST", ORGANISATIONS, token, {"name": f"Number {number}"}) for number in range(25))
            )
            assert sorted(answer.status for answer in answers) == [201] * 20 + [409] * 5
            page = (await here.ask("GET", ORGANISATIONS, token, limit=15)).body
            rest = (await here.ask("GET", ORGANISATIONS, token, limit=15, cursor=page["next_cursor"])).body
            assert (len(page["data"]), len(rest["data"]), rest["next_cursor"]) == (15, 5, None)
            other = await here.token(await here.person(None))
            assert (await here.ask("GET", ORGANISATIONS, other, cursor=page["next_cursor"])).status == 400

    run(test())


def test_how_long_readings_are_kept_is_an_owner_s_matter(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            where = path(here.organisation)
            owner, admin = [await here.token_as(role) for role in ("owner", "admin")]
            wanted = {"raw_retention_days": 30, "rollups_5m_days": 90, "rollups_1h_days": 0, "rollups_1d_days": None}
            given: list[dict[str, Any]] = [
                {"raw_retention_days": 30},
                {"rollups_1d_days": 0, "name": "Two"},
                {"rollups_5m_days": None},
            ]
            for body in given:
                assert (await here.ask("PATCH", where, admin, body)).code == (403, "forbidden")
            changed = await here.ask("PATCH", where, owner, wanted, headers={"If-Match": '"1"'})
            assert (changed.status, changed.body["version"]) == (200, 2)
            assert {name: changed.body[name] for name in wanted} == wanted
            key = await here.api_key("owner")
            assert (await here.ask("PATCH", where, key, {"rollups_5m_days": None})).body["rollups_5m_days"] is None
            key = await here.api_key("organisation:write")
            assert (await here.ask("PATCH", where, key, {"rollups_5m_days": 7})).code == (403, "forbidden")
            given = [
                {"raw_retention_days": 0}, {"raw_retention_days": None}, {"raw_retention_days": 36_601},
                {"rollups_5m_days": -1}, {"rollups_1h_days": "7"}, {"rollups_1d_days": 2.5},
            ]  # fmt: skip
            for body in given:
                assert (await here.ask("PATCH", where, owner, body)).code == (422, "invalid")
            entries = (await here.ask("GET", "/api/v1/audit", owner)).body["data"]
            told = [one["details"] for one in entries if one["action"] == "organisation.updated"]
            assert wanted in told

    run(test())


OPERATIONS = [
    # method, path under the organisation (or absolute), body, least role, scope
    ("GET", "", None, "viewer", "organisation:read"),
    ("PATCH", "", {}, "admin", "organisation:write"),
    ("GET", "/members", None, "viewer", "organisation:read"),
    ("GET", "/invitations", None, "admin", "organisation:write"),
    ("POST", "/invitations", {"email": "x@example.org", "role": "viewer"}, "admin", "organisation:write"),
    ("PATCH", f"/members/{uuid4()}", {"role": "viewer"}, "admin", "organisation:write"),
    ("DELETE", f"/invitations/{uuid4()}", None, "admin", "organisation:write"),
    ("GET", KEYS, None, "admin", "keys:read"),
    ("POST", KEYS, {"name": "k", "scopes": ["keys:write"]}, "admin", "keys:write"),
    ("DELETE", f"{KEYS}/{uuid4()}", None, "admin", "keys:write"),
    ("GET", "/api/v1/audit", None, "admin", "audit:read"),
]


def test_each_role_and_each_scope_may_what_it_may_and_no_more(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            tokens = {role: await here.token_as(role) for role in ROLES}
            keys = {scope: await here.api_key(scope) for scope in SCOPES}
            for method, rest, body, least, needed in OPERATIONS:
                where = rest if rest.startswith("/api") else path(here.organisation, rest)
                for role, token in tokens.items():
                    answer = await here.ask(method, where, token, body)
                    may = ROLES.index(role) >= ROLES.index(least)
                    assert (answer.status == 403) is not may, (method, where, role, answer.body)
                for scope, key in keys.items():
                    answer = await here.ask(method, where, key, body)
                    assert (answer.status == 403) is (scope not in (needed, "owner")), (method, where, scope)
                assert (await here.ask(method, where, None, body)).code == (401, "auth_required")

    run(test())


def test_another_organisation_is_one_that_is_not_there(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            theirs, their_key = await here.tenant()
            member = await here.person("viewer", theirs)
            callers = [await here.token_as("owner"), here.key, await here.api_key(*SCOPES)]
            made = await here.ask("POST", KEYS, their_key, {"name": "theirs", "scopes": ["owner"]})
            invitation = await here.ask(
                "POST", path(theirs, "/invitations"), their_key, {"email": "i@example.org", "role": "viewer"}
            )
            for caller in callers:
                for method, rest, body, *_ in OPERATIONS:
                    if rest.startswith("/api"):
                        continue
                    seen = [await here.ask(method, path(one, rest), caller, body) for one in (theirs, uuid7())]
                    for answer in seen:
                        answer.body.pop("request_id")
                    assert seen[0].code == (404, "not_found")
                    assert seen[0].body == seen[1].body
                for one in (made.body["credential_id"], str(uuid7())):
                    answer = await here.ask("DELETE", f"{KEYS}/{one}", caller)
                    assert answer.code == (404, "key_not_found")
                for one in (invitation.body["invitation_id"], str(uuid7())):
                    answer = await here.ask("DELETE", path(here.organisation, f"/invitations/{one}"), caller)
                    assert answer.code == (404, "invitation_not_found")
                for one in (str(member.user), str(uuid7()), "x"):
                    answer = await here.ask("DELETE", path(here.organisation, f"/members/{one}"), caller)
                    assert answer.code == (404, "member_not_found")
            for one in (str(theirs), str(uuid7())):
                answer = await here.ask("POST", "/api/v1/auth/organisation", callers[0], {"organisation_id": one})
                assert answer.code == (404, "not_found")
            assert (await here.ask("GET", KEYS, made.body["api_key"])).status == 200

    run(test())


def test_a_role_ends_with_the_membership(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            owner, person = await here.token_as("owner"), await here.person("admin")
            tokens = (await here.login(person)).body
            token = tokens["access_token"]
            where = path(here.organisation, f"/members/{person.user}")
            assert (await here.ask("PATCH", where, owner, {"role": "viewer"})).body["role"] == "viewer"
            assert (await here.ask("GET", "/api/v1/audit", token)).code == (403, "forbidden")
            assert (await here.ask("DELETE", where, owner)).status == 204
            assert (await here.ask("GET", path(here.organisation), token)).code == (404, "not_found")
            assert (await here.ask("GET", "/api/v1/ledger", token)).code == (403, "forbidden")
            body = {"refresh_token": tokens["refresh_token"]}
            again = await here.ask("POST", "/api/v1/auth/refresh", body=body)
            assert (again.status, again.body["organisation_id"]) == (200, None)

    run(test())


def test_a_super_admin_may_everything_everywhere(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            theirs, _ = await here.tenant()
            token = await here.token(await here.person(None, super_admin=True))
            listed = (await here.ask("GET", ORGANISATIONS, token)).body["data"]
            assert {one["organisation_id"] for one in listed} == {str(here.organisation), str(theirs)}
            for organisation in (here.organisation, theirs):
                body = {"organisation_id": str(organisation)}
                chosen = (await here.ask("POST", "/api/v1/auth/organisation", token, body)).body["access_token"]
                for method, rest, sent, *_ in OPERATIONS:
                    where = rest if rest.startswith("/api") else path(organisation, rest)
                    assert (await here.ask(method, where, chosen, sent)).status not in (401, 403)
            assert (await here.ask("GET", path(uuid7()), token)).code == (404, "not_found")

    run(test())


# ---------------------------------------------------------------- members


def test_the_last_owner_stays_whoever_asks_and_however_many_at_once(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            owners = [await here.person("owner") for _ in range(2)]
            tokens = [await here.token(owner) for owner in owners]
            for round_number in range(10):
                leaving = [
                    here.ask("DELETE", path(here.organisation, f"/members/{owner.user}"), token)
                    if (round_number + number) % 2
                    else here.ask(
                        "PATCH", path(here.organisation, f"/members/{owner.user}"), token, {"role": "viewer"}
                    )
                    for number, (owner, token) in enumerate(zip(owners, tokens, strict=True))
                ]
                answers = await asyncio.gather(*leaving)
                assert sorted(answer.status in (200, 204) for answer in answers) == [False, True]
                (refused,) = [answer for answer in answers if answer.status not in (200, 204)]
                assert refused.code == (409, "last_owner")
                await here.superuser(
                    "INSERT INTO memberships (organisation_id, user_id, role) SELECT $1, unnest($2::uuid[]), 'owner'"
                    " ON CONFLICT (organisation_id, user_id) DO UPDATE SET role = 'owner'",
                    here.organisation, [owner.user for owner in owners],
                )  # fmt: skip

    run(test())


def test_only_owners_give_and_take_the_role_owner(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            owner, other = await here.person("owner"), await here.person("member")
            await here.person("owner")
            admin, key = await here.token_as("admin"), await here.api_key("organisation:write", "keys:write")
            for token in (admin, key):
                for method, user, body in (
                    ("PATCH", owner, {"role": "member"}),
                    ("PATCH", other, {"role": "owner"}),
                    ("DELETE", owner, None),
                ):
                    answer = await here.ask(method, path(here.organisation, f"/members/{user.user}"), token, body)
                    assert answer.code == (403, "forbidden")
                assert (await invite(here, token, role="owner")).code == (403, "forbidden")
                wanted = {"name": "k", "scopes": ["owner"]}
                assert (await here.ask("POST", KEYS, token, wanted)).code == (403, "forbidden")
            where = path(here.organisation, f"/members/{other.user}")
            assert (await here.ask("PATCH", where, here.key, {"role": "owner"})).status == 200

    run(test())


def test_everybody_may_leave_and_only_admins_remove_others(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            viewer, other = await here.person("viewer"), await here.person("viewer")
            token = await here.token(viewer)
            assert (await here.ask("DELETE", path(here.organisation, f"/members/{other.user}"), token)).status == 403
            assert (await here.ask("DELETE", path(here.organisation, f"/members/{viewer.user}"), token)).status == 204
            members = (await here.ask("GET", path(here.organisation, "/members"), here.key)).body["data"]
            assert [one["user_id"] for one in members] == [str(other.user)]

    run(test())


# ---------------------------------------------------------------- invitations


def test_an_invitation_is_accepted_once_with_a_new_account_or_the_password_of_an_old_one(
    any_database: Database,
) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            admin = await here.token_as("admin")
            made = (await invite(here, admin)).body
            assert made["link"].startswith("https://api.sluice.example/account#invitation=iv_live_")
            assert (await accept(here, made["link"], name=None)).code == (422, "invalid")
            assert (await accept(here, made["link"], "short")).code == (422, "invalid")
            joined = await accept(here, made["link"])
            assert (joined.status, joined.body["organisation_id"]) == (200, str(here.organisation))
            assert (await here.ask("GET", path(here.organisation), joined.body["access_token"])).status == 200
            assert (await accept(here, made["link"])).code == (404, "invitation_not_found")
            assert (await invite(here, admin)).code == (409, "already_member")

            elsewhere = await here.person(None)
            link = (await invite(here, admin, elsewhere.email, "viewer")).body["link"]
            assert (await accept(here, link, "a wrong password")).code == (401, "login_failed")
            joined = await accept(here, link, name=None)
            assert joined.body["user_id"] == str(elsewhere.user)

    run(test())


def test_an_invitation_that_is_taken_back_replaced_or_old_lets_nobody_in(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            first, second = [(await invite(here, here.key)).body for _ in range(2)]
            assert (await accept(here, first["link"])).code == (404, "invitation_not_found")
            listed = (await here.ask("GET", path(here.organisation, "/invitations"), here.key)).body["data"]
            assert [one["invitation_id"] for one in listed] == [second["invitation_id"]]
            where = path(here.organisation, f"/invitations/{second['invitation_id']}")
            assert (await here.ask("DELETE", where, here.key)).status == 204
            assert (await here.ask("DELETE", where, here.key)).code == (404, "invitation_not_found")
            assert (await accept(here, second["link"])).status == 404
            third = (await invite(here, here.key)).body
            await here.superuser("UPDATE invitations SET expires_at = now()")
            assert (await accept(here, third["link"])).status == 404
            assert (await here.superuser("SELECT count(*) FROM users"))[0][0] == 0

    run(test())


def test_two_who_accept_one_invitation_at_once_are_one(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            link = (await invite(here, here.key)).body["link"]
            answers = await asyncio.gather(*(accept(here, link) for _ in range(4)))
            assert [answer.status for answer in answers].count(200) == 1
            assert (await here.superuser("SELECT count(*) FROM users"))[0][0] == 1
            assert (await here.superuser("SELECT count(*) FROM memberships"))[0][0] == 1

    run(test())


# ---------------------------------------------------------------- API keys


def test_a_key_is_shown_once_listed_without_its_secret_and_revoked_at_once(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            person = await here.person("owner")
            token = await here.token(person)
            body = {"name": "Grafana", "scopes": ["readings:read"], "expires_at": "2099-01-01T00:00:00Z"}
            made = await here.ask("POST", KEYS, token, body)
            assert (made.status, made.body["created_by"]) == (201, str(person.user))
            key = made.body.pop("api_key")
            assert (await here.ask("GET", "/api/v1/ledger", key)).status == 200
            listed = (await here.ask("GET", KEYS, token)).body["data"]
            assert listed[-1] | {"last_used_at": None} == made.body
            assert "api_key" not in listed[-1]
            where = f"{KEYS}/{made.body['credential_id']}"
            assert (await here.ask("DELETE", where, token)).status == 204
            assert (await here.ask("GET", "/api/v1/ledger", key)).code == (401, "token_invalid")
            assert (await here.ask("DELETE", where, token)).code == (404, "key_not_found")
            actions = [action for action, _ in await here.audited(here.organisation)]
            assert actions == ["organisation.created", "key.created", "key.revoked"]

    run(test())


def test_when_a_key_was_used_is_written_once_an_hour(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            used = "SELECT last_used_at, xmin::text FROM credentials WHERE last_used_at IS NOT NULL"
            epoch = (await here.superuser("SELECT epoch FROM credential_epoch"))[0][0]

            async def settled(count: int) -> list[Any]:
                for _ in range(500):
                    if len(rows := await here.superuser(used)) == count:
                        return rows
                    await asyncio.sleep(0.01)
                raise AssertionError(f"not {count} rows")

            assert await here.superuser(used) == []
            await here.ask("GET", "/api/v1/ledger", here.key)
            before = await settled(1)
            await asyncio.gather(*(here.ask("GET", "/api/v1/ledger", here.key) for _ in range(20)))
            assert await settled(1) == before
            await here.superuser("UPDATE credentials SET last_used_at = now() - interval '61 minutes'")
            old = (await settled(1))[0][0]
            await here.ask("GET", "/api/v1/ledger", here.key)
            for _ in range(500):
                if (await settled(1))[0][0] > old:
                    break
                await asyncio.sleep(0.01)
            else:
                raise AssertionError("not written")
            # Nobody who keeps credentials has to look them up again for it.
            assert (await here.superuser("SELECT epoch FROM credential_epoch"))[0][0] == epoch

    run(test())


def test_a_key_makes_no_key_that_may_more_or_lives_longer(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            key = await here.api_key("keys:write", "sites:read")
            for scopes, status in ((["sites:read"], 201), (["sites:write"], 403), (["owner"], 403)):
                assert (await here.ask("POST", KEYS, key, {"name": "k", "scopes": scopes})).status == status
            body = {"name": "Short", "scopes": ["keys:write"], "expires_at": "2030-01-01T00:00:00Z"}
            short = (await here.ask("POST", KEYS, here.key, body)).body["api_key"]
            for end, status in (("2029-01-01T00:00:00Z", 201), ("2031-01-01T00:00:00Z", 403), (None, 403)):
                sent = {"name": "k", "scopes": ["keys:write"], "expires_at": end}
                assert (await here.ask("POST", KEYS, short, sent)).status == status

    run(test())


@pytest.mark.parametrize(
    "body",
    [
        {"name": "k", "scopes": []},
        {"name": "k", "scopes": ["everything"]},
        {"name": "", "scopes": ["owner"]},
        {"name": "k" * 300, "scopes": ["owner"]},
        {"name": "k", "scopes": ["owner"], "expires_at": "2001-01-01T00:00:00Z"},
        {"name": "k", "scopes": ["owner"], "expires_at": "soon"},
        {"name": "k", "scopes": ["owner"], "token": "mine"},
    ],
)
def test_keys_that_cannot_be_made(database: Database, body: Any) -> None:
    async def test() -> None:
        async with people(database) as here:
            assert (await here.ask("POST", KEYS, here.key, body)).code == (422, "invalid")
            assert len((await here.ask("GET", KEYS, here.key)).body["data"]) == 1

    run(test())


# ---------------------------------------------------------------- the log of changes


def test_what_was_changed_is_told_with_who_did_it(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            owner = await here.person("owner")
            token, other = await here.token(owner), await here.person("viewer")
            where = path(here.organisation, f"/members/{other.user}")
            await here.ask("PATCH", where, token, {"role": "member"})
            await here.ask("PATCH", path(here.organisation), here.key, {"name": "New"})
            await here.ask("DELETE", where, token)
            page = (await here.ask("GET", "/api/v1/audit", token, limit=2)).body
            rest = (await here.ask("GET", "/api/v1/audit", token, limit=2, cursor=page["next_cursor"])).body
            entries = page["data"] + rest["data"]
            assert [entry["action"] for entry in entries] == [
                "member.removed", "organisation.updated", "member.role_changed", "organisation.created",
            ]  # fmt: skip
            assert [entry["sequence"] for entry in entries] == [4, 3, 2, 1]
            assert entries[2]["details"] == {"before": "viewer", "role": "member"}
            assert (entries[2]["user_id"], entries[2]["subject"]) == (str(owner.user), str(other.user))
            assert (entries[1]["user_id"], entries[1]["credential_id"] is None) == (None, False)
            for query, count in (
                ({"action": "member.removed"}, 1), ({"subject": str(other.user)}, 2),
                ({"user_id": str(owner.user)}, 2), ({"credential_id": entries[1]["credential_id"]}, 1),
                ({"from_": entries[1]["at"]}, 2), ({"to": entries[1]["at"]}, 2), ({"action": "x"}, 0),
            ):  # fmt: skip
                found = (await here.ask("GET", "/api/v1/audit", token, **query)).body["data"]
                assert len(found) == count, query
            cursor = page["next_cursor"]
            assert (await here.ask("GET", "/api/v1/audit", token, action="x", cursor=cursor)).status == 400
            theirs, key = await here.tenant()
            (only,) = (await here.ask("GET", "/api/v1/audit", key)).body["data"]
            assert (only["action"], only["subject"]) == ("organisation.created", str(theirs))

    run(test())


AUDIT = "/api/v1/audit"
CHOICE = "/api/v1/auth/organisation"


def test_what_belongs_to_no_organisation_is_read_by_super_admins_who_act_for_none(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            admin, owner = await here.person("owner", super_admin=True), await here.person("owner")
            chosen, other = await here.token(admin), await here.token(owner)
            of_ours = (await here.ask("GET", AUDIT, chosen)).body["data"]
            assert [entry["action"] for entry in of_ours] == ["organisation.created"]
            none = await here.ask("POST", CHOICE, chosen, {"organisation_id": None})
            assert (none.status, none.body["organisation_id"]) == (200, None)
            token = none.body["access_token"]
            page = (await here.ask("GET", AUDIT, token, limit=1)).body
            rest = (await here.ask("GET", AUDIT, token, limit=1, cursor=page["next_cursor"])).body
            found = [(entry["action"], entry["user_id"]) for entry in page["data"] + rest["data"]]
            assert found == [("session.started", str(owner.user)), ("session.started", str(admin.user))]
            assert rest["next_cursor"] is None
            only = (await here.ask("GET", AUDIT, token, user_id=str(admin.user))).body["data"]
            assert [entry["sequence"] for entry in only] == [1]
            # A cursor of the one is none of the other, and who has chosen reads the organisation's as before.
            assert (await here.ask("GET", AUDIT, chosen, limit=1, cursor=page["next_cursor"])).status == 400
            body = {"organisation_id": str(here.organisation)}
            again = (await here.ask("POST", CHOICE, token, body)).body["access_token"]
            assert (await here.ask("GET", AUDIT, again)).body["data"] == of_ours
            # Nobody else has a way to it.
            lone = (await here.ask("POST", CHOICE, other, {"organisation_id": None})).body["access_token"]
            nowhere = await here.token(await here.person(None))
            for refused in (lone, nowhere):
                assert (await here.ask("GET", AUDIT, refused)).code == (403, "forbidden")
            for asked in (other, here.key):
                shown = (await here.ask("GET", AUDIT, asked)).body["data"]
                assert {entry["action"] for entry in shown} == {"organisation.created"}

    run(test())


def test_who_acts_for_none_goes_on_acting_for_none(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            tokens = (await here.login(await here.person("owner"))).body
            assert tokens["organisation_id"] == str(here.organisation)
            await here.ask("POST", CHOICE, tokens["access_token"], {"organisation_id": None})
            body = {"refresh_token": tokens["refresh_token"]}
            again = (await here.ask("POST", "/api/v1/auth/refresh", body=body)).body
            assert again["organisation_id"] is None
            assert (await here.ask("GET", "/api/v1/ledger", again["access_token"])).code == (403, "forbidden")

    run(test())


def test_what_fails_leaves_no_entry(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            owner = await here.person("owner")
            token = await here.token(owner)
            where = path(here.organisation, f"/members/{owner.user}")
            assert (await here.ask("DELETE", where, token)).status == 409
            assert (await invite(here, token, "bad")).status == 422
            assert await here.audited(here.organisation) == [("organisation.created", None)]

    run(test())


def test_entries_of_many_at_once_stand_in_one_chain(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            bodies = [{"name": f"key {number}", "scopes": ["sites:read"]} for number in range(20)]
            answers = await asyncio.gather(*(here.ask("POST", KEYS, here.key, body) for body in bodies))
            assert {answer.status for answer in answers} == {201}
            rows = await here.superuser("SELECT sequence, previous_hash, hash FROM audit_log ORDER BY sequence")
            assert [row["sequence"] for row in rows] == list(range(1, 22))
            for before, after in itertools.pairwise(rows):
                assert after["previous_hash"] == before["hash"]

    run(test())


def test_a_person_without_an_organisation_sees_none(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            token = await here.token(await here.person(None))
            assert (await here.ask("GET", ORGANISATIONS, token)).body == {"data": [], "next_cursor": None}
            assert (await here.ask("GET", "/api/v1/audit", token)).code == (403, "forbidden")

    run(test())
