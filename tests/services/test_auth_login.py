"""Logging in: what is answered, who is slowed down and who is not, sessions, refresh tokens and their reuse."""

import asyncio
import io
import logging
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from api.access.passwords import hash_password
from deploy.people import create_admin, make_reset
from runtime.logging import LoggingSettings, set_up_logging
from runtime.postgres import connect
from runtime.secrets import TokenHasher
from tests.databases import Database
from tests.people_rig import HOME, PASSWORD, RING, People, Person, people
from tests.support import run

STRANGER = "198.51.100.9"
WRONG = "wrong horse battery"
NEW = "another horse battery"


async def refresh(here: People, token: str, **more: Any) -> Any:
    return await here.ask("POST", "/api/v1/auth/refresh", body={"refresh_token": token}, **more)


async def me(here: People, token: str) -> Any:
    return await here.ask("GET", "/api/v1/auth/me", token)


def test_who_logs_in_is_known_and_acts_for_his_organisation(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            person = await here.person("admin")
            answer = await here.login(Person(person.user, person.email.upper()))
            assert answer.status == 200
            assert answer.headers["Cache-Control"] == "no-store"
            assert (answer.body["expires_in"], answer.body["token_type"]) == (900, "Bearer")
            assert answer.body["organisation_id"] == str(here.organisation)
            found = (await me(here, answer.body["access_token"])).body
            assert (found["user_id"], found["email"]) == (str(person.user), person.email)
            assert [(one["organisation_id"], one["role"]) for one in found["memberships"]] == [
                (str(here.organisation), "admin")
            ]
            assert (await here.ask("GET", "/api/v1/ledger", answer.body["access_token"])).status == 200
            assert await here.audited(None) == [("session.started", person.user)]

    run(test())


def test_a_wrong_password_and_an_unknown_e_mail_are_told_alike(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            person = await here.person()
            wrong = await here.login(person, WRONG)
            unknown = await here.login(Person(uuid4(), "nobody@example.org"), WRONG)
            for answer in (wrong, unknown):
                assert answer.code == (401, "login_failed")
                answer.body.pop("request_id")
            assert wrong.body == unknown.body

    run(test())


def test_a_password_costs_the_same_for_an_unknown_e_mail(database: Database) -> None:
    """As many hashes are computed, whoever is named."""

    async def test() -> None:
        from api.access import passwords  # noqa: PLC0415

        asked: list[str] = []
        verify = passwords._verify

        def counting(stored: str, password: str) -> bool:
            asked.append(stored)
            return verify(stored, password)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passwords, "_verify", counting)
            async with people(database) as here:
                await here.login(await here.person(), WRONG)
                await here.login(Person(uuid4(), "nobody@example.org"), WRONG)
        assert len(asked) == 2
        assert all(stored.startswith("$argon2id$") for stored in asked)

    run(test())


def test_who_fails_too_often_waits_and_nobody_else_does(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database, auth_login_failures_max=3) as here:
            owner, other = await here.person(), await here.person()
            for _ in range(3):
                assert (await here.login(owner, WRONG, address=STRANGER)).status == 401
            locked = await here.login(owner, PASSWORD, address=STRANGER)
            assert locked.code == (429, "rate_limited")
            assert 0 < int(locked.headers["Retry-After"]) <= 900
            assert (await here.login(owner)).status == 200
            assert (await here.login(other, address=STRANGER)).status == 200
            # An IPv6 address stands for the network that its owner has.
            for last in range(3):
                assert (await here.login(owner, WRONG, address=f"2001:db8::{last}")).status == 401
            assert (await here.login(owner, PASSWORD, address="2001:db8::ffff")).status == 429
            await here.superuser("UPDATE login_attempts SET last_at = last_at - interval '16 minutes'")
            assert (await here.login(owner, PASSWORD, address=STRANGER)).status == 200

    run(test())


def test_guesses_at_the_same_time_are_counted_before_they_are_judged(database: Database) -> None:
    async def test() -> None:
        async with people(database, auth_login_failures_max=3) as here:
            owner = await here.person()
            answers = await asyncio.gather(*(here.login(owner, WRONG) for _ in range(10)))
            assert sorted(answer.status for answer in answers) == [401] * 3 + [429] * 7

    run(test())


def test_right_passwords_at_the_same_time_are_no_failed_ones(database: Database) -> None:
    """Those that wait for others are told so, and come back at once; nobody is locked out by them."""

    async def test() -> None:
        async with people(database, auth_login_failures_max=2) as here:
            owner = await here.person()
            answers = await asyncio.gather(*(here.login(owner) for _ in range(12)))
            waiting = [answer for answer in answers if answer.status != 200]
            assert waiting
            assert len(waiting) < 12
            for answer in waiting:
                assert answer.code == (429, "rate_limited")
                assert answer.headers["Retry-After"] == "1"
                assert "still being checked" in answer.body["detail"]
            assert (await here.login(owner)).status == 200
            assert await here.superuser("SELECT FROM login_attempts") == []

    run(test())


def test_what_is_in_flight_counts_until_it_is_judged_or_its_process_has_ended(any_database: Database) -> None:
    """Without it, guesses made at once, or cut off before they are judged, would cost nothing."""

    async def test() -> None:
        async with people(any_database, auth_login_failures_max=3) as here:
            owner = await here.person()
            assert (await here.login(owner, WRONG)).status == 401
            await here.superuser("UPDATE login_attempts SET in_flight = 2")
            assert (await here.login(owner)).headers["Retry-After"] == "1"
            await here.superuser("UPDATE login_attempts SET in_flight = 1")
            assert (await here.login(owner, WRONG)).status == 401
            (row,) = await here.superuser("SELECT failures, in_flight FROM login_attempts")
            assert tuple(row) == (2, 1)
            await here.superuser("UPDATE login_attempts SET last_at = last_at - interval '2 minutes'")
            locked = await here.login(owner)
            assert (locked.status, int(locked.headers["Retry-After"]) > 600) == (429, True)

    run(test())


def test_an_attempt_that_is_not_looked_at_did_not_fail(database: Database) -> None:
    async def test() -> None:
        async with people(
            database, auth_login_failures_max=1, auth_hashes_at_once=1, auth_hashes_waiting_max=1
        ) as here:
            persons = [await here.person() for _ in range(6)]
            await here.superuser("UPDATE users SET password_hash = $1", hash_password(PASSWORD))
            answers = await asyncio.gather(*(here.login(person) for person in persons))
            turned_away = [person for person, answer in zip(persons, answers, strict=True) if answer.status == 503]
            assert turned_away
            for person in turned_away:
                assert (await here.login(person)).status == 200

    run(test())


def test_under_guesses_from_everywhere_an_owner_still_gets_in(database: Database) -> None:
    """Each address has but one failure then; the right password goes through from any."""

    async def test() -> None:
        async with people(database, auth_login_pressure_addresses=3) as here:
            owner = await here.person()
            for last in range(3):
                assert (await here.login(owner, WRONG, address=f"198.51.100.{last}")).status == 401
            assert (await here.login(owner, WRONG, address="198.51.100.77")).status == 401
            assert (await here.login(owner, WRONG, address="198.51.100.77")).status == 429
            assert (await here.login(owner, address="192.0.2.1")).status == 200

    run(test())


def test_an_address_has_so_many_logins_a_minute_whatever_the_account(database: Database) -> None:
    async def test() -> None:
        async with people(database, auth_logins_per_minute=2) as here:
            for number in range(2):
                answer = await here.login(Person(uuid4(), f"guess-{number}@example.org"), WRONG)
                assert answer.status == 401
            answer = await here.login(await here.person())
            assert answer.code == (429, "rate_limited")
            assert 0 < int(answer.headers["Retry-After"]) <= 60
            assert (await here.login(await here.person(), address=STRANGER)).status == 200

    run(test())


# ---------------------------------------------------------------- refresh tokens


def test_a_refresh_token_is_used_once_and_a_second_use_ends_the_session(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            person = await here.person()
            first = (await here.login(person)).body
            second = (await refresh(here, first["refresh_token"])).body
            assert (await me(here, second["access_token"])).status == 200
            elsewhere = await here.token(person)
            thief = await refresh(here, first["refresh_token"], address=STRANGER)
            assert thief.code == (401, "token_invalid")
            for token in (first["access_token"], second["access_token"]):
                assert (await me(here, token)).code == (401, "token_invalid")
            assert (await refresh(here, second["refresh_token"])).code == (401, "token_invalid")
            assert (await me(here, elsewhere)).status == 200
            assert ("session.reuse_detected", person.user) in await here.audited(None)

    run(test())


def test_of_two_that_refresh_at_once_one_does_and_the_session_ends(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            token = (await here.login(await here.person())).body["refresh_token"]
            answers = await asyncio.gather(*(refresh(here, token) for _ in range(4)))
            good = [answer for answer in answers if answer.status == 200]
            assert len(good) == 1
            assert (await refresh(here, good[0].body["refresh_token"])).status == 401

    run(test())


def test_a_refresh_token_that_is_old_or_unknown_is_none(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            tokens = (await here.login(await here.person())).body
            await here.superuser("UPDATE refresh_tokens SET expires_at = now()")
            assert (await refresh(here, tokens["refresh_token"])).status == 401
            # It was not used before: nothing speaks for a thief.
            assert (await me(here, tokens["access_token"])).status == 200
            for made_up in ("", "x", "rt_live_" + "0" * 36, tokens["access_token"][:128], here.key):
                assert (await refresh(here, made_up)).code == (401, "token_invalid")

    run(test())


# ---------------------------------------------------------------- sessions


def test_an_ended_session_is_refused_at_once(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            person = await here.person()
            first, second = (await here.login(person)).body, (await here.login(person)).body
            listed = (await here.ask("GET", "/api/v1/auth/sessions", second["access_token"])).body["data"]
            assert [one["current"] for one in listed] == [True, False]
            assert "aiohttp" in listed[0]["user_agent"]
            other = listed[1]["session_id"]
            ended = await here.ask("DELETE", f"/api/v1/auth/sessions/{other}", second["access_token"])
            assert ended.status == 204
            assert (await me(here, first["access_token"])).code == (401, "token_invalid")
            assert (await refresh(here, first["refresh_token"])).status == 401
            again = await here.ask("DELETE", f"/api/v1/auth/sessions/{other}", second["access_token"])
            assert again.code == (404, "session_not_found")
            assert (await here.ask("POST", "/api/v1/auth/logout", second["access_token"])).status == 204
            assert (await me(here, second["access_token"])).status == 401

    run(test())


def test_nobody_ends_the_session_of_another(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            one, other = await here.token(await here.person()), await here.token(await here.person())
            theirs = (await here.ask("GET", "/api/v1/auth/sessions", other)).body["data"][0]["session_id"]
            for session in (theirs, uuid4()):
                answer = await here.ask("DELETE", f"/api/v1/auth/sessions/{session}", one)
                assert answer.code == (404, "session_not_found")
            assert (await me(here, other)).status == 200

    run(test())


def test_sessions_of_a_person_are_bounded(database: Database) -> None:
    async def test() -> None:
        async with people(database, auth_logins_per_minute=1_000) as here:
            person = await here.person()
            first = await here.token(person)
            for _ in range(50):
                last = await here.token(person)
            assert (await me(here, first)).status == 401
            assert len((await here.ask("GET", "/api/v1/auth/sessions", last)).body["data"]) == 50

    run(test())


# ---------------------------------------------------------------- passwords


def test_a_changed_password_ends_the_other_sessions(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            person = await here.person()
            here_now, elsewhere = await here.token(person), await here.token(person)
            path = "/api/v1/auth/password/change"
            wrong = await here.ask("POST", path, here_now, {"current_password": WRONG, "new_password": "x" * 10})
            assert wrong.code == (401, "login_failed")
            short = await here.ask("POST", path, here_now, {"current_password": PASSWORD, "new_password": "x" * 9})
            assert short.code == (422, "invalid")
            new = "another horse battery"
            done = await here.ask("POST", path, here_now, {"current_password": PASSWORD, "new_password": new})
            assert done.status == 204
            assert (await me(here, here_now)).status == 200
            assert (await me(here, elsewhere)).status == 401
            assert (await here.login(person)).status == 401
            assert (await here.login(person, new)).status == 200
            assert ("password.changed", person.user) in await here.audited(None)

    run(test())


def test_a_forgotten_password_is_told_nobody(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            person = await here.person()
            for email in (person.email, "nobody@example.org"):
                answer = await here.ask("POST", "/api/v1/auth/password/forgot", body={"email": email})
                assert (answer.status, answer.body) == (204, None)

    run(test())


async def by_operator(here: People, person: Person, link: bool = False) -> str:
    """Made a super-admin with a new password; or a link's secret."""
    connection = await connect(here.database.settings, role=None, application="test")
    try:
        if link:
            return await make_reset(connection, TokenHasher(RING), person.email, timedelta(hours=1))
        return await create_admin(connection, person.email, "Somebody", NEW)
    finally:
        await connection.close()


async def reset(here: People, token: str, **more: Any) -> Any:
    body = {"token": token, "new_password": NEW}
    return await here.ask("POST", "/api/v1/auth/password/reset", body=body, **more)


def test_who_is_made_a_super_admin_begins_anew(any_database: Database) -> None:
    """A session or a link from before was let in as somebody who may do less."""

    async def test() -> None:
        async with people(any_database) as here:
            person, other = await here.person(), await here.person()
            tokens, theirs = (await here.login(person)).body, await here.token(other)
            link = await by_operator(here, person, link=True)
            assert await by_operator(here, person) == str(person.user)
            assert (await me(here, tokens["access_token"])).code == (401, "token_invalid")
            assert (await refresh(here, tokens["refresh_token"])).code == (401, "token_invalid")
            assert (await reset(here, link)).code == (422, "invalid")
            assert (await here.login(person)).status == 401
            access = await here.token(person, password=NEW)
            assert (await me(here, access)).body["super_admin"] is True
            assert (await me(here, theirs)).status == 200
            audited = await here.audited(None)
            assert ("password.changed", None) in audited
            assert ("admin.created", None) in audited
            assert await by_operator(here, Person(uuid4(), "new@example.org")) != str(person.user)
            assert (await here.audited(None)).count(("password.changed", None)) == 1

    run(test())


def test_a_new_password_ends_links_that_are_open(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            person = await here.person()
            first, second = [await by_operator(here, person, link=True) for _ in range(2)]
            body = {"current_password": PASSWORD, "new_password": WRONG}
            path = "/api/v1/auth/password/change"
            assert (await here.ask("POST", path, await here.token(person), body)).status == 204
            for link in (first, second):
                assert (await reset(here, link)).code == (422, "invalid")

    run(test())


def test_a_new_password_by_a_link_is_good_where_the_old_one_was_locked_out(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database, auth_login_failures_max=2) as here:
            person = await here.person()
            for address in (HOME, STRANGER):
                for _ in range(2):
                    assert (await here.login(person, WRONG, address=address)).status == 401
                assert (await here.login(person, address=address)).status == 429
            assert (await reset(here, await by_operator(here, person, link=True))).status == 204
            assert (await here.login(person, NEW)).status == 200
            # Whoever guessed elsewhere goes on waiting.
            assert (await here.login(person, NEW, address=STRANGER)).status == 429

    run(test())


def test_who_accepts_an_invitation_may_log_in_where_he_tried_before(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database, auth_login_failures_max=1) as here:
            email = "new@example.org"
            where = f"/api/v1/organisations/{here.organisation}/invitations"
            link = (await here.ask("POST", where, here.key, {"email": email, "role": "viewer"})).body["link"]
            invited = Person(uuid4(), email)
            assert (await here.login(invited, NEW)).status == 401
            assert (await here.login(invited, NEW)).status == 429
            body = {"token": link.partition("=")[2], "password": NEW, "name": "New"}
            assert (await here.ask("POST", "/api/v1/invitations/accept", body=body)).status == 200
            assert (await here.login(invited, NEW)).status == 200

    run(test())


def test_of_links_that_are_used_at_once_one_counts(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            person = await here.person()
            links = [await by_operator(here, person, link=True) for _ in range(3)]
            answers = await asyncio.gather(*(reset(here, link) for link in links))
            assert sorted(answer.status for answer in answers) == [204, 422, 422]

    run(test())


# ---------------------------------------------------------------- what is kept and written


@pytest.mark.usefixtures("logging_as_it_was")
def test_no_secret_stands_in_a_row_or_a_log(any_database: Database) -> None:
    async def test() -> None:
        stream = io.StringIO()
        set_up_logging(LoggingSettings(log_level="debug"), stream)
        async with people(any_database) as here:
            person = await here.person("owner")
            tokens = (await here.login(person)).body
            again = (await refresh(here, tokens["refresh_token"])).body
            await refresh(here, tokens["refresh_token"])
            await here.login(person, WRONG)
            access = await here.token(person)
            made = await here.ask("POST", "/api/v1/api-keys", access, {"name": "k", "scopes": ["owner"]})
            invited = await here.ask(
                "POST", f"/api/v1/organisations/{here.organisation}/invitations", access,
                {"email": "new@example.org", "role": "owner"},
            )  # fmt: skip
            secrets = [
                PASSWORD, WRONG, access, made.body["api_key"], invited.body["link"].split("=")[1],
                *(body[name] for body in (tokens, again) for name in ("access_token", "refresh_token")),
            ]  # fmt: skip
            tables = await here.superuser(
                "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
            )
            rows = [
                row[0] for table in tables
                for row in await here.superuser(f"SELECT t::text FROM {table['relname']} t")
            ]  # fmt: skip
            assert any(person.email in row for row in rows)
            kept = "\n".join(rows) + stream.getvalue()
            for secret in secrets:
                assert secret not in kept
                assert secret.encode().hex() not in kept
            assert "PRIVATE KEY" not in kept

    try:
        run(test())
    finally:
        for handler in logging.getLogger().handlers[:]:
            logging.getLogger().removeHandler(handler)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"email": "a@b", "password": 1},
        {"email": "a@b", "password": "x", "more": 1},
        {"email": "no address", "password": "x"},
        {"email": "a@b\n", "password": "x"},
        {"email": "a" * 300 + "@b", "password": "x"},
        {"email": "a@b", "password": "x" * 129},
        {"email": "a@b\u0000", "password": "x"},
        {"email": "a@b", "password": "x", "organisation_id": "x"},
    ],
)
def test_bad_bodies_are_told_so(database: Database, body: Any) -> None:
    async def test() -> None:
        async with people(database) as here:
            answer = await here.ask("POST", "/api/v1/auth/login", body=body, address=HOME)
            assert answer.code == (422, "invalid")

    run(test())
