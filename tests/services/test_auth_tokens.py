"""Access tokens: which are believed, the key set, keys that follow each other, guesses that are slowed down."""

import asyncio
import base64
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from api.access.tokens import AccessTokens, Claims
from api.http.problems import Problem
from runtime.clock import ManualClock
from runtime.ids import uuid7
from runtime.postgres import open_pool
from runtime.secrets import API_KEY_PREFIX, KeyRing, make_token, new_ring
from tests.databases import Database
from tests.people_rig import HOME, RING, People, people
from tests.support import run

STRANGER = "198.51.100.9"
PEM = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
ISSUER = "https://sluice.example"


def segment(content: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def read(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    content: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return jwt.get_unverified_header(token), content


async def me(here: People, token: str, **more: Any) -> Any:
    return await here.ask("GET", "/api/v1/auth/me", token, **more)


async def signing_key(here: People) -> Any:
    """The key that signs, taken out of the database as only the service's secret keys can."""
    from runtime.secrets import Seal  # noqa: PLC0415

    (row,) = await here.superuser("SELECT sealed_private FROM signing_keys ORDER BY signs_from LIMIT 1")
    return serialization.load_pem_private_key(Seal(RING, "signing key").open(row["sealed_private"]), None)


def unsigned(header: dict[str, Any], content: dict[str, Any], _: Any) -> str:
    return f"{segment(header | {'alg': 'none'})}.{segment(content)}."


def by_public_key(header: dict[str, Any], content: dict[str, Any], key: Any) -> str:
    """HS256 with the public key as its secret: what a library that trusts `alg` would believe."""
    import hashlib  # noqa: PLC0415
    import hmac  # noqa: PLC0415

    body = f"{segment(header | {'alg': 'HS256'})}.{segment(content)}"
    digest = hmac.new(key.public_key().public_bytes(*PEM), body.encode(), hashlib.sha256).digest()
    return f"{body}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def by_another_key(header: dict[str, Any], content: dict[str, Any], _: Any) -> str:
    return jwt.encode(content, ec.generate_private_key(ec.SECP256R1()), "ES256", headers=header)


def changed(**claims: Any) -> Callable[..., str]:
    def make(header: dict[str, Any], content: dict[str, Any], key: Any) -> str:
        merged = {name: value for name, value in (content | claims).items() if value is not None}
        return jwt.encode(merged, key, "ES256", headers=header)

    return make


def with_header(**fields: Any) -> Callable[..., str]:
    def make(header: dict[str, Any], content: dict[str, Any], key: Any) -> str:
        return jwt.encode(content, key, "ES256", headers=header | fields)

    return make


FORGED: dict[str, Callable[..., str]] = {
    "alg none": unsigned,
    "HS256 with the public key": by_public_key,
    "another key": by_another_key,
    "expired": changed(exp=1_700_000_000),
    "not yet": changed(iat=4_000_000_000),
    "no end": changed(exp=None),
    "another issuer": changed(iss="https://elsewhere.example"),
    "another audience": changed(aud="https://elsewhere.example"),
    "no session": changed(sid=None),
    "a session that is none": changed(sid="x"),
    "another session": changed(sid=str(uuid4())),
    "another user": changed(sub=str(uuid4())),
    "a user that is none": changed(sub="x"),
    "an organisation that is none": changed(org=7),
    "an unknown key": with_header(kid="made-up"),
    "a key that is none": lambda head, content, _: (
        f"{segment(head | {'alg': 'ES256', 'kid': {}})}.{segment(content)}.AAAA"
    ),
    "another kind": with_header(typ="gateway+jwt"),
    "rubbish": lambda *_: "eyJh.eyJh.x",
    "a list": lambda *_: f"{segment([])}.{segment([])}.x",
    "too long": changed(more="x" * 2_000),
}


def test_what_is_not_ours_is_not_believed(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            token = await here.token(await here.person())
            header, content = read(token)
            assert (header["alg"], header["typ"]) == ("ES256", "at+jwt")
            assert (content["iss"], content["aud"], content["exp"] - content["iat"]) == (ISSUER, ISSUER, 900)
            key = await signing_key(here)
            head = {"kid": header["kid"], "typ": header["typ"]}
            assert (await me(here, changed()(head, content, key))).status == 200
            for name, forge in FORGED.items():
                answer = await me(here, forge(head, content, key))
                assert answer.code == (401, "token_invalid"), name
            cut = token[: token.rindex(".")]
            for damaged in (cut, cut + ".", token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "BBBB"), token + ".x"):
                assert (await me(here, damaged)).code == (401, "token_invalid")

    run(test())


def test_a_clock_may_be_half_a_minute_off(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            header, content = read(await here.token(await here.person()))
            key, head = await signing_key(here), {"kid": header["kid"], "typ": header["typ"]}
            now = content["iat"]
            assert (await me(here, changed(exp=now - 20)(head, content, key))).status == 200
            assert (await me(here, changed(exp=now - 40)(head, content, key))).status == 401

    run(test())


def test_tokens_of_another_installation_are_strangers_even_under_the_same_name(
    database: Database, embedded_database: Database
) -> None:
    async def test() -> None:
        async with people(database) as here, people(embedded_database) as there:
            theirs = await there.token(await there.person())
            assert (await me(there, theirs)).status == 200
            assert (await me(here, theirs)).code == (401, "token_invalid")
        async with people(database, public_url="https://other.example") as moved:
            token = await moved.token(await moved.person())
            assert (await me(moved, token)).status == 200
            async with people(database) as here:
                assert (await me(here, token)).status == 401

    run(test())


def test_the_key_set_verifies_what_is_signed(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            token = await here.token(await here.person())
            answer = await here.ask("GET", "/.well-known/jwks.json")
            assert answer.status == 200
            assert "max-age" in answer.headers["Cache-Control"]
            (key,) = [key for key in answer.body["keys"] if key["kid"] == read(token)[0]["kid"]]
            assert {"kty", "crv", "x", "y", "alg", "use", "kid"} == set(key)
            found = jwt.decode(token, jwt.PyJWK(key).key, ["ES256"], audience=ISSUER, issuer=ISSUER)
            assert found["org"] == str(here.organisation)

    run(test())


# ---------------------------------------------------------------- keys that follow each other


def tokens_on(pool: Any, clock: ManualClock, ring: KeyRing = RING) -> AccessTokens:
    return AccessTokens(pool, ring, clock, issuer=ISSUER, lifetime_s=900)


async def refused(tokens: AccessTokens, token: str) -> bool:
    try:
        await tokens.read(token)
    except Problem:
        return True
    return False


def test_a_key_signs_for_a_month_the_next_is_known_before_and_the_old_one_goes(any_database: Database) -> None:
    async def test() -> None:
        pool = await open_pool(any_database.settings, role="sluice_app", application="test", size_max=2)
        clock = ManualClock()
        tokens = tokens_on(pool, clock)
        claims = Claims(uuid7(), uuid7(), None)
        first = read(await tokens.issue(claims))[0]["kid"]
        assert [key.kid for key in await tokens.key_set()] == [first]
        day = timedelta(days=1).total_seconds()
        clock.advance(30.5 * day)
        assert read(await tokens.issue(claims))[0]["kid"] == first
        (_, following) = [key.kid for key in await tokens.key_set()]
        clock.advance(0.6 * day)
        assert read(await tokens.issue(claims))[0]["kid"] == following
        assert [key.kid for key in await tokens.key_set()] == [following]
        await pool.close()

    run(test())


def test_processes_that_start_together_sign_with_one_key(database: Database) -> None:
    async def test() -> None:
        pool = await open_pool(database.settings, role="sluice_app", application="test", size_max=8)
        clock = ManualClock()
        claims = Claims(uuid7(), uuid7(), None)
        issued = await asyncio.gather(*(tokens_on(pool, clock).issue(claims) for _ in range(8)))
        assert len({read(token)[0]["kid"] for token in issued}) == 1
        await pool.close()

    run(test())


def test_a_key_whose_seal_is_gone_is_followed_by_another_and_still_believed(database: Database) -> None:
    async def test() -> None:
        pool = await open_pool(database.settings, role="sluice_app", application="test", size_max=2)
        # The library reads the clock itself: the tokens are of now.
        clock = ManualClock(__import__("time").time_ns() // 1_000)
        claims = Claims(uuid7(), uuid7(), uuid7())
        before, ring = tokens_on(pool, clock), new_ring()
        old = await before.issue(claims)
        after = tokens_on(pool, clock, ring)
        new = await after.issue(claims)
        assert read(old)[0]["kid"] != read(new)[0]["kid"]
        assert await after.read(old) == claims
        clock.advance(2)
        assert await before.read(new) == claims
        await pool.close()

    run(test())


def test_made_up_key_ids_do_not_make_a_query_each(database: Database) -> None:
    async def test() -> None:
        pool = await open_pool(database.settings, role="sluice_app", application="test", size_max=2)
        clock = ManualClock(__import__("time").time_ns() // 1_000)
        tokens = tokens_on(pool, clock)
        token = await tokens.issue(Claims(uuid7(), uuid7(), None))
        await pool.close()
        _, content = read(token)
        key = ec.generate_private_key(ec.SECP256R1())
        for number in range(20):
            made_up = jwt.encode(content, key, "ES256", headers={"kid": f"made-up-{number}", "typ": "at+jwt"})
            assert await refused(tokens, made_up)

    run(test())


# ---------------------------------------------------------------- guesses


async def registered(here: People) -> tuple[str, list[str]]:
    """Where a site's machines tell that they run, and tokens of its server: the last one is good."""
    where = f"/api/organisations/{here.organisation}/sites"
    site = f"{where}/{(await here.ask('POST', where, here.key, {'name': 'Site'})).body['id']}"
    body = {"hardwareId": "x", "version": "1", "hostname": "server.local"}
    tokens = [(await here.ask("POST", f"{site}/register-server", here.key, body)).body["siteToken"] for _ in range(2)]
    return f"{site}/heartbeat", tokens


def test_a_gateway_s_token_is_no_guess(any_database: Database) -> None:
    """Nobody makes up a signature: it is good while its address guesses, and one that was revoked counts as none."""

    async def test() -> None:
        async with people(any_database, auth_guesses_per_minute=3) as here:
            path, (revoked, good) = await registered(here)
            beat = {"version": "1"}
            for _ in range(5):
                assert (await here.ask("POST", path, revoked, beat)).status == 401
            forged = f"{good[: good.rindex('.')]}.{revoked.rpartition('.')[2]}"
            for guess in ("x", forged, forged):
                assert (await here.ask("POST", path, guess, beat)).status == 401
            assert (await here.ask("POST", path, forged, beat)).status == 429
            assert (await here.ask("POST", path, make_token(API_KEY_PREFIX), beat)).status == 429
            assert (await here.ask("POST", path, good, beat)).status == 204
            assert (await here.ask("POST", path, revoked, beat)).status == 401

    run(test())


def test_who_is_no_machine_is_told_what_a_heartbeat_takes(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database, auth_guesses_per_minute=3) as here:
            path, _ = await registered(here)
            person = await here.person("owner")
            beat = {"version": "1"}
            for token in (here.key, await here.token(person)):
                answer = await here.ask("POST", path, token, beat)
                assert (answer.status, answer.body["error"]["code"]) == (403, "forbidden")
                assert "token of the site's server" in answer.body["error"]["message"]
            ended = await here.token(person)
            assert (await here.ask("POST", "/api/v1/auth/logout", ended)).status == 204
            for token in (make_token(API_KEY_PREFIX), ended, make_token("rt_live_")):
                answer = await here.ask("POST", path, token, beat)
                assert (answer.status, answer.body["error"]["code"]) == (401, "token_invalid")

    run(test())


def test_guesses_of_an_address_are_slowed_down_and_what_is_known_goes_on(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database, auth_guesses_per_minute=5) as here:
            access = await here.token(await here.person())
            assert (await here.ask("GET", "/api/v1/ledger", here.key, address=STRANGER)).status == 200
            guesses = [make_token(API_KEY_PREFIX), "sk_live_x", "eyJhbGciOiJub25lIn0.e30.x", "x", "rt_live_x"]
            for guess in guesses:
                answer = await here.ask("GET", "/api/v1/ledger", guess, address=STRANGER)
                assert answer.code == (401, "token_invalid")
            for guess in guesses:
                answer = await here.ask("GET", "/api/v1/ledger", guess, address=STRANGER)
                assert answer.code == (429, "rate_limited")
                assert 0 < int(answer.headers["Retry-After"]) <= 60
            # Not looked up any more: good or not, nobody is told.
            unused = await here.api_key("owner")
            assert (await here.ask("GET", "/api/v1/ledger", unused, address=STRANGER)).status == 429
            for known in (here.key, access):
                assert (await here.ask("GET", "/api/v1/ledger", known, address=STRANGER)).status == 200
            assert (await here.ask("GET", "/api/v1/ledger", unused, address=HOME)).status == 200

    run(test())


def test_what_a_stranger_says_of_himself_does_not_change_his_address(database: Database) -> None:
    async def test() -> None:
        async with people(database, auth_guesses_per_minute=3) as here:
            for number in range(3):
                address = f"192.0.2.{number}, {STRANGER}"
                assert (await here.ask("GET", "/api/v1/ledger", "x", address=address)).status == 401
            assert (await here.ask("GET", "/api/v1/ledger", "x", address=f"192.0.2.9, {STRANGER}")).status == 429

    run(test())


@pytest.mark.parametrize("header", ["", "Basic abc", "Bearer", "Bearer  "])
def test_without_a_credential_one_is_asked_for(database: Database, header: str) -> None:
    async def test() -> None:
        async with people(database) as here:
            answer = await here.ask("GET", "/api/v1/auth/me", headers={"Authorization": header})
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")

    run(test())
