"""The Sites face over HTTP, on both databases: the document replayed, its rules, bad input, and who sees what."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import jwt
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.access.signing import public_keys
from api.registry.credentials import Credentials
from api.registry.organisations import acting_for
from api.sites import examples
from runtime.postgres import connect
from runtime.secrets import API_KEY_PREFIX, GATEWAY_PREFIX, Seal, TokenHasher, make_token
from tests.databases import Database
from tests.people_rig import people
from tests.services.test_api_readings import RING, World, tenant, world
from tests.support import run

DOMAIN = "consystence.site"
SERVER = examples.SERVER_TO_REGISTER
EDGE = examples.EDGE_TO_REGISTER


@dataclass
class Answered:
    """What came back."""

    status: int
    body: Any
    headers: Any

    @property
    def problem(self) -> tuple[int, str]:
        """Status and code of an error, which has the shape of all errors of this face."""
        assert set(self.body) == {"error"}, self.body
        assert set(self.body["error"]) == {"code", "message", "details"}
        return self.status, self.body["error"]["code"]

    @property
    def field(self) -> str:
        (detail,) = self.body["error"]["details"]
        assert detail["message"]
        return str(detail["field"])


@dataclass
class Sites:
    """An organisation's sites, over HTTP."""

    here: World
    key: str
    organisation: UUID

    async def ask(
        self,
        method: str,
        path: str = "",
        body: Any = None,
        *,
        key: str = "",
        organisation: Any = None,
        raw: bytes | None = None,
        headers: Any = None,
        **query: Any,
    ) -> Answered:
        url = f"{self.here.url}/api/organisations/{organisation or self.organisation}/sites{path}"
        sent = {"Authorization": f"Bearer {key or self.key}"} | (headers or {})
        if body is not None:
            raw, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        async with self.here.session.request(method, url, data=raw, headers=sent, params=query) as answer:
            text = await answer.read()
            assert answer.status < 500, text
            return Answered(answer.status, json.loads(text) if text else None, answer.headers)

    async def create(self, **site: Any) -> Any:
        answered = await self.ask("POST", body={"name": "A site"} | site)
        assert answered.status == 201, answered.body
        return answered.body

    async def superuser(self, query: str, *arguments: Any) -> Any:
        connection = await asyncpg.connect(self.here.database.superuser_url)
        try:
            return await connection.fetch(query, *arguments)
        finally:
            await connection.close()

    async def key_with(self, *scopes: str) -> str:
        return await credential(self.here.database, self.organisation, scopes=scopes)


async def credential(database: Database, organisation: UUID, *, scopes: Any = (), site: UUID | None = None) -> str:
    """A key with these scopes, or a plain gateway's token of a site."""
    connection = await connect(database.settings, role=None, application="test")
    try:
        async with acting_for(connection, organisation):
            credentials = Credentials(connection, TokenHasher(RING))
            if site is not None:
                return await credentials.add_gateway_token(organisation, site)
            return await credentials.add_api_key(organisation, list(scopes))
    finally:
        await connection.close()


@asynccontextmanager
async def face(database: Database, **limits: Any) -> AsyncIterator[Sites]:
    async with world(database, site_domain=DOMAIN, **limits) as here:
        # What `world` makes for other tests, this face would show.
        sites = Sites(here, here.key, here.organisation)
        await sites.superuser("DELETE FROM device_sites WHERE organisation_id = $1", here.organisation)
        await sites.superuser("DELETE FROM sites WHERE organisation_id = $1", here.organisation)
        yield sites


async def another(here: Sites) -> Sites:
    """Another organisation, with an owner's key."""
    organisation, _, _, key = await tenant(here.here.database)
    return Sites(here.here, key, organisation)


# ---------------------------------------------------------------- the document


def test_the_document_replayed(any_database: Database) -> None:
    """Every request that it prints, in its order; what an answer prints but ids, times and tokens is given so."""

    async def test() -> None:
        async with face(any_database) as here:
            created = await here.ask("POST", body=examples.SITE_TO_CREATE)
            assert created.status == 201
            site = created.body["id"]
            made_at = datetime.fromisoformat(created.body["createdAt"])
            assert abs(made_at - datetime.now(UTC)) < timedelta(minutes=1)
            own = {"id": site, "orgId": str(here.organisation), "createdAt": created.body["createdAt"]}
            assert created.body == examples.CREATED_SITE | own

            # Four devices stand there and its server reported two processes when the list was printed.
            await here.superuser(
                "UPDATE devices SET status = 'deleted' WHERE organisation_id = $1", here.organisation
            )
            for number in range(4):
                await add_device(here, UUID(site), f"device-{number}")
            registered = await here.ask("POST", f"/{site}/register-server", SERVER)
            heartbeat = {"version": "10.1.0", "processCount": 2}
            beat = await here.ask("POST", f"/{site}/heartbeat", heartbeat, key=registered.body["siteToken"])
            assert (beat.status, beat.body) == (204, None)
            listed = await here.ask("GET")
            (printed,) = examples.LISTED_SITES["data"]
            assert (listed.status, listed.body) == (200, {"data": [printed | {"id": site}]})

            got = await here.ask("GET", f"/{site}")
            assert got.status == 200
            assert own.items() <= got.body.items()
            assert (got.body["status"], got.body["provisioning"]["status"]) == ("online", "complete")

            updated = await here.ask("PUT", f"/{site}", examples.SITE_TO_UPDATE)
            assert updated.status == 200
            kept = examples.CREATED_SITE | own | examples.SITE_TO_UPDATE | {"status": "online"}
            assert kept.items() <= updated.body.items()

            registered = await here.ask("POST", f"/{site}/register-server", SERVER)
            assert registered.status == 200
            token = registered.body.pop("siteToken")
            config = {"orgId": str(here.organisation), "siteId": site, "clusteringMode": "AdoNet"}
            assert registered.body == {"config": config}
            assert token.startswith("eyJ")
            assert jwt.get_unverified_header(token)["alg"] == "RS256"

            edge = await here.ask("POST", f"/{site}/register-edge", EDGE)
            assert (edge.status, edge.body["siteServerUrl"]) == (201, "https://consystence-server.local:5000")
            # The document's two answers are of different servers: the edge device's has this name.
            await here.ask("POST", f"/{site}/register-server", SERVER | {"hostname": "site-server.local"})
            edge = await here.ask("POST", f"/{site}/register-edge", EDGE)
            token = edge.body["edgeToken"]
            assert (edge.status, edge.body) == (201, examples.REGISTERED_EDGE | {"edgeToken": token})
            assert jwt.get_unverified_header(token)["alg"] == "RS256"

            deleted = await here.ask("DELETE", f"/{site}")
            assert (deleted.status, deleted.body) == (202, {"id": site, "status": "deleting"})
            assert (await here.ask("GET", f"/{site}")).problem == (404, "site_not_found")
            assert (await here.ask("GET")).body == {"data": []}

    run(test())


async def add_device(here: Sites, site: UUID, local_id: str, at: timedelta = timedelta(0)) -> UUID:
    device = uuid4()
    await here.superuser(
        "INSERT INTO devices (device_id, organisation_id, name, local_id) VALUES ($1, $2, $3, $3)",
        device, here.organisation, local_id,
    )  # fmt: skip
    await here.superuser(
        "INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from) VALUES ($1, $2, $3, now() + $4)",
        device, here.organisation, site, at,
    )  # fmt: skip
    return device


# ---------------------------------------------------------------- creating


def test_a_slug_is_one_of_its_organisation_and_an_address_one_of_all(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            first = await here.create(slug="depot")
            assert first["url"] == f"depot.{DOMAIN}"
            again = await here.ask("POST", body={"name": "b", "slug": "depot"})
            assert again.problem == (409, "slug_taken")
            other = await another(here)
            theirs = await other.create(slug="depot")
            label = theirs["url"].removesuffix(f".{DOMAIN}")
            assert theirs["slug"] == "depot"
            assert label.startswith("depot-")
            assert len(label) == len("depot-") + 6
            assert str(here.organisation) not in json.dumps(theirs)
            reserved = await other.create(slug="www")
            assert reserved["slug"] == "www"
            assert reserved["url"].startswith("www-")
            # What is refused leaves nothing, and what is being erased keeps its name until it is gone.
            assert len((await here.ask("GET")).body["data"]) == 1
            await here.ask("DELETE", f"/{first['id']}")
            assert (await here.ask("POST", body={"name": "b", "slug": "depot"})).problem == (409, "slug_taken")

    run(test())


def test_of_two_who_want_one_slug_at_once_one_gets_it(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            other = await another(here)
            for number in range(5):
                slug = {"name": "a", "slug": f"one-{number}"}
                askers = [here, here, other, here, other]
                answers = await asyncio.gather(*(asker.ask("POST", body=slug) for asker in askers))
                for asker in (here, other):
                    own = [answer for answer, asked in zip(answers, askers, strict=True) if asked is asker]
                    statuses = sorted(answer.status for answer in own)
                    assert statuses == [201] + [409] * (len(own) - 1)
                    assert {answer.problem[1] for answer in own if answer.status == 409} == {"slug_taken"}
                urls = {answer.body["url"] for answer in answers if answer.status == 201}
                assert len(urls) == 2
                assert f"one-{number}.{DOMAIN}" in urls

    run(test())


def test_a_slug_that_is_left_out_is_made_from_the_name(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            assert (await here.create(name="Müller's Søndre  Mine №5!"))["slug"] == "muller-s-sndre-mine-no5"
            assert (await here.create(name="Depot"))["slug"] == "depot"
            second = await here.create(name="Depot")
            assert second["slug"].startswith("depot-")
            assert second["url"] == f"{second['slug']}.{DOMAIN}"
            assert (await here.create(name="منجم الفحم 🏔"))["slug"].startswith("site-")
            assert len((await here.create(name="x" * 200))["slug"]) == 63
            assert len((await here.create(name="x" * 200))["slug"]) == 63
            bare = await here.create(name="bare")
            assert (bare["timezone"], bare["location"]) == ("UTC", None)

    run(test())


def test_a_create_that_is_repeated_is_done_once(database: Database) -> None:
    async def test() -> None:
        async with face(database) as here:
            name = {"Idempotency-Key": "a-site"}
            site = {"name": "a", "slug": "a"}
            first, second = [await here.ask("POST", body=site, headers=name) for _ in range(2)]
            assert (first.status, first.body) == (second.status, second.body)
            assert first.status == 201
            changed = await here.ask("POST", body=site | {"name": "b"}, headers=name)
            assert changed.problem == (409, "idempotency_conflict")

    run(test())


LOCATION = {"latitude": 1, "longitude": 2}
BAD_SITES: list[tuple[Any, str]] = [
    ({}, "name"),
    ({"name": 7}, "name"),
    ({"name": None}, "name"),
    ({"name": ""}, "name"),
    ({"name": "   "}, "name"),
    ({"name": "x" * 201}, "name"),
    ({"name": "a\nb"}, "name"),
    ({"name": "a\x7f"}, "name"),
    ({"name": "a\u2028b"}, "name"),
    ({"name": "a", "slug": ""}, "slug"),
    ({"name": "a", "slug": 5}, "slug"),
    ({"name": "a", "slug": "Depot"}, "slug"),
    ({"name": "a", "slug": "dеpot"}, "slug"),  # Cyrillic
    ({"name": "a", "slug": "xn--dpot-qdd"}, "slug"),
    ({"name": "a", "slug": "-a"}, "slug"),
    ({"name": "a", "slug": "a-"}, "slug"),
    ({"name": "a", "slug": "a.b"}, "slug"),
    ({"name": "a", "slug": "a b"}, "slug"),
    ({"name": "a", "slug": "a\n"}, "slug"),
    ({"name": "a", "slug": "x" * 64}, "slug"),
    ({"name": "a", "timezone": "Mars/Olympus"}, "timezone"),
    ({"name": "a", "timezone": "australia/sydney"}, "timezone"),
    ({"name": "a", "timezone": "../../etc/passwd"}, "timezone"),
    ({"name": "a", "timezone": ""}, "timezone"),
    ({"name": "a", "timezone": None}, "timezone"),
    ({"name": "a", "location": 5}, "location"),
    ({"name": "a", "location": {"latitude": 90.1, "longitude": 0}}, "location.latitude"),
    ({"name": "a", "location": {"latitude": 0, "longitude": -180.5}}, "location.longitude"),
    ({"name": "a", "location": {"latitude": True, "longitude": 0}}, "location.latitude"),
    ({"name": "a", "location": {"latitude": "1", "longitude": 0}}, "location.latitude"),
    ({"name": "a", "location": {"latitude": 1}}, "location.longitude"),
    ({"name": "a", "location": {"longitude": 1, "latitude": None}}, "location.latitude"),
    ({"name": "a", "location": LOCATION | {"address": ""}}, "location.address"),
    ({"name": "a", "location": LOCATION | {"address": "x" * 501}}, "location.address"),
    ({"name": "a", "location": LOCATION | {"altitude": 5}}, "location.altitude"),
    ({"name": "a", "url": "a.example"}, "url"),
    ({"name": "a", "tmiezone": "UTC"}, "tmiezone"),
]


def test_all_that_is_wrong_with_a_site_is_named_at_once(any_database: Database) -> None:
    """Rules across fields too, as far as what is right tells."""

    async def test() -> None:
        async with face(any_database) as here:
            path = f"/{(await here.create())['id']}"
            place = {"latitude": 1}
            wrong: list[tuple[Any, Any, list[str]]] = [
                ("POST", {"name": "ok", "location": place, "slug": "BAD"}, ["location.longitude", "slug"]),
                ("POST", {"name": 5, "location": place | {"x": 1}}, ["location.longitude", "location.x", "name"]),
                ("POST", {"name": 5, "location": place | {"longitude": "x"}}, ["location.longitude", "name"]),
                ("PUT", {"name": 5, "location": place | {"longitude": None}}, ["location.longitude", "name"]),
                ("PUT", {"name": 5, "location": place}, ["name"]),
            ]
            for method, body, fields in wrong:
                answered = await here.ask(method, path if method == "PUT" else "", body)
                named = [one["field"] for one in answered.body["error"]["details"]]
                assert (answered.problem, sorted(named)) == ((400, "invalid"), fields), body

    run(test())


def test_a_404_names_what_is_not_there(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            created = await here.ask("POST", body={"name": "Pit"})
            site = created.body["id"]
            where = f"/api/organisations/{here.organisation}/sites/{site}"
            got = await here.ask("GET", f"/{site}")
            assert (created.headers["Location"], created.headers["ETag"]) == (where, got.headers["ETag"])
            for edge in ("%00", "nobody", "x" * 100):
                answered = await here.ask("DELETE", f"/{site}/edge-devices/{edge}")
                assert answered.problem == (404, "edge_not_found"), edge
            for nobody in ("x", uuid4(), "%00"):
                answered = await here.ask("DELETE", f"/{nobody}/edge-devices/a")
                assert answered.problem == (404, "site_not_found"), nobody

    run(test())


def test_a_site_that_cannot_be_is_refused_with_what_is_wrong(database: Database) -> None:
    async def test() -> None:
        async with face(database) as here:
            for body, field in BAD_SITES:
                answered = await here.ask("POST", body=body)
                assert (answered.problem, answered.field) == ((400, "invalid"), field), body
            for raw, problem in (
                (b"", (400, "invalid_body")),
                (b"{", (400, "invalid_body")),
                (b"[]", (400, "invalid")),
                (b'{"name": "\\u0000"}', (400, "invalid")),
                (b'{"name": "\xff"}', (400, "invalid_body")),
                (b'{"name": "\\ud800"}', (400, "invalid_body")),
                (b'{"name": "a", "location": {"latitude": NaN, "longitude": 0}}', (400, "invalid_body")),
                (b'{"name": "a", "location": {"latitude": 1e999, "longitude": 0}}', (400, "invalid")),
                (b'{"name":' + b"[" * 100_000, (400, "invalid_body")),
                (b" " * 300_000, (413, "body_too_large")),
            ):
                answered = await here.ask("POST", raw=raw, headers={"Content-Type": "application/json"})
                assert answered.problem == problem, raw[:80]
            answered = await here.ask("POST", raw=b"<a/>", headers={"Content-Type": "text/xml"})
            assert answered.problem == (415, "unsupported_type")
            assert (await here.ask("GET")).body == {"data": []}

    run(test())


NAMES = st.text(min_size=1, max_size=220)
SLUGS = st.one_of(st.text(max_size=70), st.from_regex(r"[a-zA-Z0-9.-]{1,66}", fullmatch=True))
FLOATS = st.one_of(st.none(), st.integers(-400, 400), st.floats(allow_nan=False, allow_infinity=False))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_what_is_made_is_what_was_sent_or_nothing(database: Database, data: st.DataObject) -> None:
    """Whatever names, slugs and places: 201 and the very same back, or an error of this face and no row."""
    bodies = data.draw(
        st.lists(
            st.fixed_dictionaries(
                {"name": NAMES},
                optional={
                    "slug": SLUGS,
                    "location": st.fixed_dictionaries(
                        {}, optional={"latitude": FLOATS, "longitude": FLOATS, "address": NAMES}
                    ),
                },
            ),
            min_size=1,
            max_size=20,
        )
    )

    async def test() -> None:
        async with face(database) as here:
            made = {}
            for body in bodies:
                answered = await here.ask("POST", body=body)
                if answered.status == 201:
                    made[answered.body["id"]] = answered.body
                    assert answered.body["name"] == body["name"]
                    assert answered.body["slug"] == body.get("slug", answered.body["slug"])
                    place: Any = body.get("location", {})
                    location = {"latitude": None, "longitude": None, "address": None} | place
                    assert answered.body["location"] in (location, None)
                else:
                    assert answered.problem[0] in (400, 409), body
            listed = (await here.ask("GET")).body["data"]
            assert {one["id"]: one["url"] for one in listed} == {one["id"]: one["url"] for one in made.values()}
            assert len({one["url"] for one in listed}) == len(listed)

    run(test())


# ---------------------------------------------------------------- reading


def test_a_site_in_full(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database, site_silence_s=60) as here:
            site = await here.create(name="Pit", location={"address": "behind the hill\nthen left"})
            path = f"/{site['id']}"
            got = await here.ask("GET", path)
            assert got.body == site | {
                "updatedAt": site["createdAt"],
                "deviceCount": 0,
                "processCount": 0,
                "provisioning": {"status": "awaiting_server", "serverRegisteredAt": None, "lastHeardAt": None},
                "server": None,
                "edgeDevices": [],
            }
            assert site["location"] == {"latitude": None, "longitude": None, "address": "behind the hill\nthen left"}
            token = (await here.ask("POST", f"{path}/register-server", SERVER)).body["siteToken"]
            edge_token = (await here.ask("POST", f"{path}/register-edge", EDGE)).body["edgeToken"]
            await here.ask("POST", f"{path}/register-edge", EDGE | {"edgeId": "a-second"})
            got = (await here.ask("GET", path)).body
            assert (got["status"], got["provisioning"]["status"]) == ("provisioning", "awaiting_heartbeat")
            assert got["server"]["hostname"] == "consystence-server.local"
            beat = {"version": "10.2.0", "processCount": 3}
            assert (await here.ask("POST", f"{path}/heartbeat", beat, key=token)).status == 204
            beat = {"version": "10.1.1"}
            assert (await here.ask("POST", f"{path}/heartbeat", beat, key=edge_token)).status == 204
            got = (await here.ask("GET", path)).body
            assert (got["status"], got["processCount"]) == ("online", 3)
            assert (got["server"]["version"], got["server"]["processCount"]) == ("10.2.0", 3)
            edges = [(edge["edgeId"], edge["status"], edge["version"]) for edge in got["edgeDevices"]]
            assert edges == [("a-second", "provisioning", "10.1.0"), ("orin-north-01", "online", "10.1.1")]
            assert got["provisioning"]["lastHeardAt"] == got["server"]["lastHeardAt"]
            for table in ("site_servers", "edge_devices"):
                await here.superuser(f"UPDATE {table} SET heard_at = heard_at - interval '61 s'")
            got = (await here.ask("GET", path)).body
            assert (got["status"], got["edgeDevices"][1]["status"]) == ("offline", "offline")
            assert (await here.ask("GET")).body["data"][0]["status"] == "offline"
            assert (await here.ask("POST", f"{path}/heartbeat", beat, key=token)).status == 204
            got = (await here.ask("GET", path)).body
            assert (got["status"], got["processCount"], got["server"]["version"]) == ("online", 3, "10.1.1")

    run(test())


def test_devices_count_where_they_stand_now(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            sites = [UUID((await here.create())["id"]) for _ in range(2)]
            stays = await add_device(here, sites[0], "stays", timedelta(hours=-2))
            await add_device(here, sites[0], "comes", timedelta(hours=1))
            gone = await add_device(here, sites[0], "gone", timedelta(hours=-2))
            moved = await add_device(here, sites[0], "moved", timedelta(hours=-2))
            await here.superuser("UPDATE devices SET status = 'deleted' WHERE device_id = $1", gone)

            async def counts() -> list[int]:
                listed = [one["deviceCount"] for one in (await here.ask("GET")).body["data"]]
                assert listed == [(await here.ask("GET", f"/{site}")).body["deviceCount"] for site in sites]
                return listed

            assert await counts() == [2, 0]
            await here.superuser(
                "INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from)"
                " VALUES ($1, $2, $3, now() + interval '1 h')",
                moved, here.organisation, sites[1],
            )  # fmt: skip
            assert await counts() == [2, 0]
            # An hour passes, and nobody has settled the move yet.
            for statement in (
                "ALTER TABLE device_sites DISABLE TRIGGER USER",
                "UPDATE device_sites SET valid_from = valid_from - interval '2 h'",
                "UPDATE devices SET site_until = site_until - interval '2 h'",
            ):
                await here.superuser(statement)
            assert await counts() == [2, 1]
            assert stays

    run(test())


def test_pages_of_sites(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            made = [(await here.create(name=f"site {number}"))["id"] for number in range(7)]
            other = await another(here)
            for limit in (1, 3, 7, 8, 500):
                found: list[str] = []
                query: dict[str, Any] = {"limit": limit}
                while True:
                    page = (await here.ask("GET", **query)).body
                    assert len(page["data"]) <= limit
                    found += [one["id"] for one in page["data"]]
                    if "nextCursor" not in page:
                        break
                    query["cursor"] = page["nextCursor"]
                assert found == made
            cursor = (await here.ask("GET", limit=1)).body["nextCursor"]
            for query in (
                {"limit": 0},
                {"limit": 501},
                {"limit": "x"},
                {"cursor": "x"},
                {"page": 2},
                {"cursor": cursor[:-1]},
            ):
                answered = await here.ask("GET", **query)
                assert (answered.problem, answered.field) == ((400, "invalid_parameter"), next(iter(query)))
            assert (await other.ask("GET", cursor=cursor)).problem == (400, "invalid_parameter")

    run(test())


# ---------------------------------------------------------------- changing


def test_what_an_update_leaves_out_stays(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            site = await here.create(**examples.SITE_TO_CREATE)
            path = f"/{site['id']}"
            place = site["location"]

            async def put(**body: Any) -> Any:
                answered = await here.ask("PUT", path, body)
                assert answered.status == 200, answered.body
                assert answered.body == (await here.ask("GET", path)).body
                return answered.body

            assert (await put())["updatedAt"] == site["createdAt"]
            assert (await put(name="Pit 🏔"))["name"] == "Pit 🏔"
            found = await put(location={"latitude": 5, "longitude": -6.5})
            assert found["location"] == {"latitude": 5, "longitude": -6.5, "address": place["address"]}
            assert (await put(location={"latitude": 7}))["location"]["latitude"] == 7
            assert (await put(location={"address": "x"}))["location"]["longitude"] == -6.5
            found = await put(location={"latitude": None, "longitude": None})
            assert found["location"] == {"latitude": None, "longitude": None, "address": "x"}
            assert (await put(location=None))["location"] is None
            assert (await put(timezone="Europe/Paris"))["timezone"] == "Europe/Paris"
            whole = await put(name="b", timezone="UTC", location=place)
            assert (whole["slug"], whole["url"], whole["createdAt"]) == (site["slug"], site["url"], site["createdAt"])
            assert (whole["name"], whole["timezone"], whole["location"]) == ("b", "UTC", place)
            bad: list[tuple[Any, str]] = [
                ({"slug": "other"}, "slug"),
                ({"name": None}, "name"),
                ({"timezone": "Mars"}, "timezone"),
                ({"location": {"latitude": None}}, "location.latitude"),
                ({"location": {"latitude": 91}}, "location.latitude"),
                ({"status": "online"}, "status"),
            ]
            for body, field in bad:
                answered = await here.ask("PUT", path, body)
                assert (answered.problem, answered.field) == ((400, "invalid"), field), body
            assert (await here.ask("GET", path)).body == whole

    run(test())


def test_a_stale_change_is_refused(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            created = await here.ask("POST", body={"name": "a"})
            path, tag = f"/{created.body['id']}", created.headers["ETag"]
            assert (await here.ask("GET", path)).headers["ETag"] == tag
            changed = await here.ask("PUT", path, {"name": "b"}, headers={"If-Match": tag})
            assert changed.status == 200
            assert changed.headers["ETag"] != tag
            for stale in (tag, '"nonsense"', f"W/{changed.headers['ETag']}", '""'):
                for method, body in (("PUT", {"name": "c"}), ("DELETE", None)):
                    answered = await here.ask(method, path, body, headers={"If-Match": stale})
                    assert answered.problem == (412, "precondition_failed"), stale
            both = f"{tag}, {changed.headers['ETag']}"
            assert (await here.ask("PUT", path, {"name": "c"}, headers={"If-Match": both})).status == 200
            assert (await here.ask("PUT", path, {"name": "d"}, headers={"If-Match": "*"})).status == 200
            tag = (await here.ask("GET", path)).headers["ETag"]
            mine = [here.ask("PUT", path, {"name": f"e{n}"}, headers={"If-Match": tag}) for n in range(4)]
            assert sorted(one.status for one in await asyncio.gather(*mine)) == [200, 412, 412, 412]

    run(test())


# ---------------------------------------------------------------- servers and edge devices


def claims_of(token: str) -> Any:
    return jwt.decode(token, options={"verify_signature": False})


def test_a_server_is_its_hardware(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            site = (await here.create())["id"]
            path = f"/{site}/register-server"
            first, second = [(await here.ask("POST", path, SERVER)).body["siteToken"] for _ in range(2)]
            assert first != second
            beat = {"version": "1", "processCount": 0}
            assert (await here.ask("POST", f"/{site}/heartbeat", beat, key=first)).problem == (401, "token_invalid")
            assert (await here.ask("POST", f"/{site}/heartbeat", beat, key=second)).status == 204
            other = await here.ask("POST", path, SERVER | {"hardwareId": "another"})
            assert other.problem == (409, "server_registered")
            assert (await here.ask("POST", f"/{site}/heartbeat", beat, key=second)).status == 204
            assert (await here.ask("DELETE", f"/{site}/server")).status == 204
            assert (await here.ask("DELETE", f"/{site}/server")).problem == (404, "server_not_found")
            assert (await here.ask("GET", f"/{site}")).body["status"] == "provisioning"
            assert (await here.ask("POST", f"/{site}/heartbeat", beat, key=second)).problem == (401, "token_invalid")
            other = await here.ask("POST", path, SERVER | {"hardwareId": "another"})
            assert other.status == 200
            assert (await here.ask("POST", f"/{site}/heartbeat", beat, key=other.body["siteToken"])).status == 204
            claims = claims_of(other.body["siteToken"])
            assert (claims["sub"], claims["org"], claims["kind"]) == (site, str(here.organisation), "server")
            assert "exp" not in claims

    run(test())


def test_an_edge_device_is_its_hardware(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database, site_edges_max=2) as here:
            site = (await here.create())["id"]
            path = f"/{site}/register-edge"
            assert (await here.ask("POST", path, EDGE)).problem == (409, "server_missing")
            await here.ask("POST", f"/{site}/register-server", SERVER)
            first, second = [(await here.ask("POST", path, EDGE)).body["edgeToken"] for _ in range(2)]
            beat = {"version": "1"}
            assert (await here.ask("POST", f"/{site}/heartbeat", beat, key=first)).problem == (401, "token_invalid")
            assert (await here.ask("POST", f"/{site}/heartbeat", beat, key=second)).status == 204
            other = await here.ask("POST", path, EDGE | {"hardwareId": "another"})
            assert other.problem == (409, "edge_id_taken")
            assert (await here.ask("POST", path, EDGE | {"edgeId": "b"})).status == 201
            assert (await here.ask("POST", path, EDGE | {"edgeId": "c"})).problem == (409, "edge_limit")
            assert (await here.ask("POST", path, EDGE)).status == 201
            gone = f"/{site}/edge-devices/{EDGE['edgeId']}"
            assert (await here.ask("DELETE", gone)).status == 204
            assert (await here.ask("DELETE", gone)).problem == (404, "edge_not_found")
            assert (await here.ask("DELETE", f"/{site}/edge-devices/%20")).problem == (404, "edge_not_found")
            assert (await here.ask("POST", path, EDGE | {"hardwareId": "another"})).status == 201
            elsewhere = (await here.create())["id"]
            await here.ask("POST", f"/{elsewhere}/register-server", SERVER)
            assert (await here.ask("POST", f"/{elsewhere}/register-edge", EDGE)).status == 201

    run(test())


def test_of_two_that_register_at_once_one_is_the_server(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            site = (await here.create())["id"]
            bodies = [SERVER | {"hardwareId": f"hardware-{number}"} for number in range(5)]
            answers = await asyncio.gather(*(here.ask("POST", f"/{site}/register-server", body) for body in bodies))
            assert sorted(answer.status for answer in answers) == [200, 409, 409, 409, 409]
            bodies = [EDGE | {"hardwareId": f"hardware-{number}"} for number in range(5)]
            answers = await asyncio.gather(*(here.ask("POST", f"/{site}/register-edge", body) for body in bodies))
            assert sorted(answer.status for answer in answers) == [201, 409, 409, 409, 409]
            # The same one several times at once: one of its tokens is good.
            answers = await asyncio.gather(*(here.ask("POST", f"/{site}/register-edge", bodies[0]) for _ in range(4)))
            if answers[0].status == 201:
                tokens = [answer.body["edgeToken"] for answer in answers]
                beats = [
                    await here.ask("POST", f"/{site}/heartbeat", {"version": "1"}, key=token) for token in tokens
                ]
                assert sorted(beat.status for beat in beats) == [204, 401, 401, 401]
            live = "SELECT count(*) FROM credentials WHERE site_id = $1 AND revoked_at IS NULL"
            assert (await here.superuser(live, UUID(site)))[0][0] == 2

    run(test())


BAD_MACHINES: list[tuple[str, Any, str]] = [
    ("register-server", {"version": "1", "hostname": "a"}, "hardwareId"),
    ("register-server", SERVER | {"hardwareId": ""}, "hardwareId"),
    ("register-server", SERVER | {"hardwareId": "x" * 201}, "hardwareId"),
    ("register-server", SERVER | {"hardwareId": "a b"}, "hardwareId"),
    ("register-server", SERVER | {"version": ""}, "version"),
    ("register-server", SERVER | {"version": 10.1}, "version"),
    ("register-server", SERVER | {"version": "x" * 65}, "version"),
    ("register-server", SERVER | {"hostname": ""}, "hostname"),
    ("register-server", SERVER | {"hostname": "a/b"}, "hostname"),
    ("register-server", SERVER | {"hostname": "a@b:80"}, "hostname"),
    ("register-server", SERVER | {"hostname": "a..b"}, "hostname"),
    ("register-server", SERVER | {"hostname": "é.example"}, "hostname"),
    ("register-server", SERVER | {"hostname": ".".join(["x" * 63] * 4)}, "hostname"),
    ("register-server", SERVER | {"hostName": "a"}, "hostName"),
    ("register-edge", EDGE | {"edgeId": ""}, "edgeId"),
    ("register-edge", EDGE | {"edgeId": "a/b"}, "edgeId"),
    ("register-edge", EDGE | {"edgeId": "x" * 65}, "edgeId"),
    ("register-edge", EDGE | {"hostname": "a"}, "hostname"),
    ("heartbeat", {"version": "1", "processCount": -1}, "processCount"),
    ("heartbeat", {"version": "1", "processCount": 100_001}, "processCount"),
    ("heartbeat", {"version": "1", "processCount": 1.5}, "processCount"),
    ("heartbeat", {"version": "1", "processCount": True}, "processCount"),
    ("heartbeat", {"processCount": 1}, "version"),
    ("heartbeat", {"version": "1", "uptime": 1}, "uptime"),
]


def test_a_machine_that_cannot_be_is_refused_with_what_is_wrong(database: Database) -> None:
    async def test() -> None:
        async with face(database) as here:
            site = (await here.create())["id"]
            token = (await here.ask("POST", f"/{site}/register-server", SERVER)).body["siteToken"]
            for path, body, field in BAD_MACHINES:
                answered = await here.ask("POST", f"/{site}/{path}", body, key=token if path == "heartbeat" else "")
                assert (answered.problem, answered.field) == ((400, "invalid"), field), body
            got = (await here.ask("GET", f"/{site}")).body
            assert (got["server"]["lastHeardAt"], got["edgeDevices"]) == (None, [])

    run(test())


def test_a_token_says_who_signed_it(database: Database) -> None:
    """Its signature is good by the key whose private half stands in the database sealed."""

    async def test() -> None:
        async with face(database) as here:
            site = (await here.create())["id"]
            token = (await here.ask("POST", f"/{site}/register-server", SERVER)).body["siteToken"]
            edge = (await here.ask("POST", f"/{site}/register-edge", EDGE)).body["edgeToken"]
            connection = await connect(database.settings, role="sluice_app", application="test")
            (published,) = msgspec.to_builtins(await public_keys(connection))
            await connection.close()
            key = jwt.PyJWK.from_dict(published)
            for one in (token, edge):
                header = {"alg": "RS256", "kid": published["kid"], "typ": "gateway+jwt"}
                assert jwt.get_unverified_header(one) == header
                assert jwt.decode(one, key, audience="sluice", issuer="sluice")["sub"] == site
            (row,) = await here.superuser("SELECT sealed_private FROM gateway_signing_keys")
            assert Seal(RING, "gateway signing key").open(row["sealed_private"])[:1] == b"\x30"

    run(test())


# ---------------------------------------------------------------- who may, and what nobody sees


def test_a_site_that_is_deleted_is_nobody_s_and_its_tokens_end(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            site = (await here.create())["id"]
            stays = await here.create()
            token = (await here.ask("POST", f"/{site}/register-server", SERVER)).body["siteToken"]
            edge = (await here.ask("POST", f"/{site}/register-edge", EDGE)).body["edgeToken"]
            await credential(here.here.database, here.organisation, site=UUID(site))
            device = await add_device(here, UUID(site), "stood-there")
            assert (await here.ask("DELETE", f"/{site}")).status == 202
            beat = {"version": "1"}
            for key in (token, edge):
                assert (await here.ask("POST", f"/{site}/heartbeat", beat, key=key)).problem == (401, "token_invalid")
            unknown = str(uuid4())
            for method, path, body in OPERATIONS:
                answers = [await here.ask(method, path.format(site=one), body) for one in (site, unknown)]
                assert answers[0].problem[0] == 404, path
                assert answers[0].body == answers[1].body
            assert [one["id"] for one in (await here.ask("GET")).body["data"]] == [stays["id"]]
            live = "SELECT count(*) FROM credentials WHERE site_id = $1 AND revoked_at IS NULL"
            assert (await here.superuser(live, UUID(site)))[0][0] == 0
            marked = "SELECT erasing_since IS NOT NULL FROM sites WHERE site_id = $1"
            assert (await here.superuser(marked, UUID(site)))[0][0]
            # Not by SQL either: the API's role neither sees it nor lets anything stand there.
            connection = await connect(any_database.settings, role=None, application="test")
            async with acting_for(connection, here.organisation):
                assert await connection.fetchval("SELECT count(*) FROM sites WHERE site_id = $1", UUID(site)) == 0
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with acting_for(connection, here.organisation):
                    await connection.execute(
                        "INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from)"
                        " VALUES ($1, $2, $3, now())",
                        device, here.organisation, UUID(site),
                    )  # fmt: skip
            await connection.close()

    run(test())


#: Every operation about one site, with a body that it would take.
OPERATIONS: list[tuple[str, str, Any]] = [
    ("GET", "/{site}", None),
    ("PUT", "/{site}", {"name": "theirs"}),
    ("DELETE", "/{site}", None),
    ("POST", "/{site}/register-server", SERVER),
    ("POST", "/{site}/register-edge", EDGE),
    ("DELETE", "/{site}/server", None),
    ("DELETE", "/{site}/edge-devices/orin-north-01", None),
]


def test_another_s_site_is_one_that_is_not_there(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            other = await another(here)
            site = (await other.create())["id"]
            token = (await other.ask("POST", f"/{site}/register-server", SERVER)).body["siteToken"]
            await other.ask("POST", f"/{site}/register-edge", EDGE)
            before = (await other.ask("GET", f"/{site}")).body
            for method, path, body in OPERATIONS:
                unknown = [site, str(uuid4()), "not-a-uuid", "%00", site.upper() + "0"]
                answers = [await here.ask(method, path.format(site=one), body) for one in unknown]
                assert answers[0].problem == (404, "site_not_found")
                assert all(answer.body == answers[0].body for answer in answers)
                foreign = [
                    await here.ask(method, path.format(site=site), body, organisation=one)
                    for one in (other.organisation, uuid4(), "not-a-uuid")
                ]
                assert foreign[0].problem[0] == 404
                assert all(answer.body == foreign[0].body for answer in foreign)
            for method, body in (("GET", None), ("POST", {"name": "a"})):
                answers = [
                    await here.ask(method, "", body, organisation=one) for one in (other.organisation, uuid4())
                ]
                assert answers[0].problem == (404, "not_found")
                assert answers[0].body == answers[1].body
            own = (await here.create())["id"]
            beat = {"version": "1"}
            answers = [await other.ask("POST", f"/{one}/heartbeat", beat, key=token) for one in (own, str(uuid4()))]
            assert answers[0].problem == (404, "site_not_found")
            assert answers[0].body == answers[1].body
            assert (await here.ask("POST", f"/{own}/heartbeat", beat, key=token)).problem == (404, "not_found")
            connection = await connect(any_database.settings, role=None, application="test")
            async with acting_for(connection, here.organisation):
                assert await connection.fetchval("SELECT begin_site_erasure($1)", UUID(site)) is False
                assert await connection.fetchval("SELECT count(*) FROM site_servers") == 0
            await connection.close()
            assert (await other.ask("GET", f"/{site}")).body == before

    run(test())


def test_a_key_does_what_its_scopes_say(database: Database) -> None:
    async def test() -> None:
        async with face(database) as here:
            site = (await here.create())["id"]
            reads, writes, neither = [
                await here.key_with(scope) for scope in ("sites:read", "sites:write", "readings:read")
            ]
            bodies = [("GET", "", None), ("POST", "", {"name": "a"}), *OPERATIONS]
            for method, path, body in bodies:
                at = path.format(site=site)
                for key, may in ((reads, method == "GET"), (writes, method != "GET"), (neither, False)):
                    # Only an owner's key deletes a site.
                    if may and (method, path) != ("DELETE", "/{site}"):
                        answered = await here.ask(method, at, body, key=key)
                        assert answered.status in (200, 201, 204), (method, path)
                    else:
                        assert (await here.ask(method, at, body, key=key)).problem == (403, "scope_missing")
            for key in (make_token(API_KEY_PREFIX), "x", make_token(GATEWAY_PREFIX), "eyJh.eyJh.c2ln"):
                assert (await here.ask("GET", key=key)).problem == (401, "token_invalid")
                answered = await here.ask("POST", f"/{site}/heartbeat", {"version": "1"}, key=key)
                assert answered.problem == (401, "token_invalid")
            answered = await here.ask("GET", headers={"Authorization": ""})
            assert answered.problem == (401, "auth_required")
            plain = await credential(database, here.organisation, site=UUID(site))
            beat = {"version": "1"}
            assert (await here.ask("POST", f"/{site}/heartbeat", beat, key=plain)).problem == (403, "forbidden")
            assert (await here.ask("POST", f"/{site}/heartbeat", beat)).problem == (403, "forbidden")
            token = (await here.ask("POST", f"/{site}/register-server", SERVER)).body["siteToken"]
            assert (await here.ask("GET", key=token)).problem == (401, "token_invalid")
            assert (await here.ask("PATCH", f"/{site}", {})).problem == (405, "method_not_allowed")

    run(test())


def test_a_person_does_what_his_role_says(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            base = f"/api/organisations/{here.organisation}/sites"
            made = await here.ask("POST", base, here.key, {"name": "Pit"})
            path = f"{base}/{made.body['id']}"
            changes = [operation for operation in OPERATIONS if operation[0] != "GET" and operation[1] != "/{site}"]
            changes = [("POST", "", {"name": "a"}), ("PUT", "/{site}", {"name": "b"}), *changes]
            for role in ("viewer", "member", "admin"):
                token = await here.token(await here.person(role))
                for read in (base, path):
                    assert (await here.ask("GET", read, token)).status == 200
                for method, at, body in changes:
                    answer = await here.ask(method, f"{base}{at.format(site=made.body['id'])}", token, body)
                    if role == "admin":
                        assert answer.status in (200, 201, 204), (method, at)
                    else:
                        assert (answer.status, answer.body["error"]["code"]) == (403, "forbidden"), (method, at)
                answer = await here.ask("DELETE", path, token)
                assert (answer.status, answer.body["error"]["code"]) == (403, "forbidden")
                assert (await here.ask("POST", f"{path}/heartbeat", token, {"version": "1"})).status == 403
            stranger = await here.token(await here.person(None))
            for method, at, body in (("GET", "", None), ("POST", "", {"name": "a"}), *OPERATIONS):
                answer = await here.ask(method, f"{base}{at.format(site=made.body['id'])}", stranger, body)
                assert (answer.status, answer.body["error"]["code"]) == (404, "not_found")
            owner = await here.token(await here.person("owner"))
            assert (await here.ask("DELETE", path, owner)).status == 202
            assert (await here.ask("GET", path, owner)).status == 404

    run(test())


def test_every_change_is_written_down_without_a_secret(any_database: Database) -> None:
    async def test() -> None:
        async with face(any_database) as here:
            site = (await here.create(name="Pit", slug="pit"))["id"]
            await here.ask("PUT", f"/{site}", {"name": "Pit", "timezone": "UTC"})  # changes nothing
            await here.ask("PUT", f"/{site}", {"name": "Pit 2"})
            token = (await here.ask("POST", f"/{site}/register-server", SERVER)).body["siteToken"]
            await here.ask("POST", f"/{site}/register-edge", EDGE)
            await here.ask("POST", f"/{site}/heartbeat", {"version": "1"}, key=token)
            await here.ask("DELETE", f"/{site}/edge-devices/orin-north-01")
            await here.ask("DELETE", f"/{site}/server")
            await here.ask("DELETE", f"/{site}")
            rows = await here.superuser(
                "SELECT action, subject, details::text, credential_id FROM audit_log WHERE subject = $1"
                " ORDER BY sequence",
                site,
            )
            assert [row["action"] for row in rows] == [
                "site.created",
                "site.updated",
                "site.server_registered",
                "site.edge_registered",
                "site.edge_removed",
                "site.server_removed",
                "site.deleted",
            ]
            assert json.loads(rows[1]["details"]) == {"name": "Pit 2"}
            assert all(row["credential_id"] for row in rows)
            assert "eyJ" not in str(rows)

    run(test())
