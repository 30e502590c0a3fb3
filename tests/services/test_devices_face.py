"""The Devices face over HTTP, on both databases: everything its document prints, and what it leaves open."""

import asyncio
import gzip
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from api.http.repeats import KEY_CHARACTERS_MAX
from api.registry.devices import STAYS_MAX
from api.registry.groups import GROUPS_MAX
from api.registry.organisations import acting_for
from api.registry.sites import add_site
from runtime.postgres import connect
from runtime.secrets import DEVICE_PREFIX, TokenHasher, plausible_token
from schemas.models import MODELS
from tests.databases import Database
from tests.services.test_api_readings import RING, World, tenant, world
from tests.support import run

PATH = "/v1/devices"
BASE = "https://sluice.example"
HOUR = timedelta(hours=1)
LISTED = {
    "id", "site_id", "local_id", "name", "model", "fw_version", "ingest_url_kind", "last_seen_at", "online",
}  # fmt: skip


async def ask(
    here: World,
    method: str,
    path: str = PATH,
    body: Any = None,
    *,
    key: str = "",
    raw: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    **query: Any,
) -> tuple[int, Any, Mapping[str, str]]:
    sent = {"Authorization": f"Bearer {key or here.key}", **(headers or {})}
    parameters = {name: str(value) for name, value in query.items()}
    url = here.url + path
    async with here.session.request(method, url, params=parameters, headers=sent, json=body, data=raw) as answer:
        content = None if answer.status == 204 else await answer.json()
        return answer.status, content, answer.headers


async def error(here: World, method: str, path: str = PATH, body: Any = None, **more: Any) -> tuple[int, str]:
    """Status and code of an error, whose shape is checked."""
    status, found, headers = await ask(here, method, path, body, **more)
    assert set(found) == {"error"}, found
    assert set(found["error"]) - {"details"} == {"code", "message", "request_id"}
    assert found["error"]["request_id"] == headers["X-Request-Id"]
    return status, found["error"]["code"]


async def made(here: World, local_id: str = "fridge", **fields: Any) -> str:
    """The id of a new device at the world's site, unless `site_id` says where."""
    body = {"site_id": site_id(here.site), "local_id": local_id, "name": "Fridge", "model": "diy_esp32"} | fields
    status, found, _ = await ask(here, "POST", body=body)
    assert status == 201, found
    device: str = found["id"]
    return device


async def listed(here: World, **query: Any) -> list[str]:
    status, found, _ = await ask(here, "GET", **({"site_id": site_id(here.site)} | query))
    assert status == 200, found
    return [device["local_id"] for device in found["data"]]


async def site_of(here: World, device: str) -> str | None:
    _, found, _ = await ask(here, "GET", f"{PATH}/{device}")
    site: str | None = found["site_id"]
    return site


def site_id(site: UUID) -> str:
    return f"site_{UUID(str(site)).hex}"


def account_id(here: World) -> str:
    return f"acc_{here.organisation.hex}"


def uuid_of(device: str) -> UUID:
    return UUID(device.removeprefix("dev_"))


def text(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


async def another_site(here: World, name: str = "Other") -> UUID:
    connection = await connect(here.database.settings, role=None, application="test")
    async with acting_for(connection, here.organisation):
        site = await add_site(connection, here.organisation, name)
    await connection.close()
    return site


async def superuser(here: World, sql: str, *values: Any) -> list[Any]:
    """Runs past row-level security and triggers."""
    connection = await asyncpg.connect(here.database.superuser_url)
    try:
        await connection.execute("SET session_replication_role = replica")
        return await connection.fetch(sql, *values)
    finally:
        await connection.close()


async def is_valid(here: World, token: str) -> bool:
    """Whether ingest would let a device in."""
    rows = await superuser(
        here,
        "SELECT FROM credentials c JOIN devices d USING (device_id) WHERE c.token_hash = $1 AND revoked_at IS NULL"
        " AND d.status <> 'deleted'",
        TokenHasher(RING).digest(token),
    )
    return bool(rows)


async def epoch(here: World) -> int:
    found: int = (await superuser(here, "SELECT epoch FROM credential_epoch"))[0]["epoch"]
    return found


# ---------------------------------------------------------------- the document


def test_every_request_and_response_of_the_document(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database, public_url=BASE) as here:
            here.site = await another_site(here, "Kitchen")
            first = {"site_id": site_id(here.site), "local_id": "fridge01", "name": "Walk-in fridge"}
            await ask(here, "POST", body=first | {"model": "shelly-h-t-gen3"})
            status, found, _ = await ask(here, "GET", site_id=site_id(here.site))
            (device,) = found["data"]
            assert (status, set(found)) == (200, {"data", "next_cursor", "has_more"})
            assert (found["next_cursor"], found["has_more"]) == (None, False)
            assert device == first | {
                "id": device["id"],
                "model": "shelly-h-t-gen3",
                "fw_version": None,
                "ingest_url_kind": "shelly_get",
                "last_seen_at": None,
                "online": False,
            }
            assert device["id"].startswith("dev_")

            second = {"site_id": site_id(here.site), "local_id": "fridge02", "name": "Reach-in fridge"}
            status, found, headers = await ask(here, "POST", body=second | {"model": "diy_esp32"})
            assert (status, headers["Location"]) == (201, f"{PATH}/{found['id']}")
            assert headers["ETag"] == (await ask(here, "GET", headers["Location"]))[2]["ETag"]
            assert set(found) == {"id", "local_id", "ingest_token", "ingest_url", "issued_at"}
            assert (found["local_id"], found["ingest_url"]) == ("fridge02", f"{BASE}/v1/ingest")
            assert plausible_token(found["ingest_token"], DEVICE_PREFIX)
            assert datetime.fromisoformat(found["issued_at"]) <= datetime.now(UTC)
            assert await is_valid(here, found["ingest_token"])

            one = f"{PATH}/{device['id']}"
            status, found, _ = await ask(here, "GET", one)
            assert status == 200
            assert {name: found[name] for name in LISTED} == device
            status, found, _ = await ask(here, "PATCH", one, {"name": "Walk-in fridge (front)"})
            assert (status, found["name"]) == (200, "Walk-in fridge (front)")
            for field, value in (("site_id", site_id(here.site)), ("model", "diy_esp32")):
                status, found, _ = await ask(here, "PATCH", one, {field: value})
                assert (status, [detail["field"] for detail in found["error"]["details"]]) == (422, [field])

            target = await another_site(here)
            move = {"to_site_id": site_id(target), "effective_at": "2026-05-17T08:30:00Z"}
            status, found, _ = await ask(here, "POST", f"{one}/move", move)
            assert (status, found) == (200, move | {"id": device["id"], "site_id": site_id(target)})

            status, found, _ = await ask(here, "POST", f"{one}/rotate-token")
            assert status == 200
            assert set(found) == {"id", "local_id", "ingest_token", "ingest_url", "issued_at"}
            assert found["ingest_url"] == f"{BASE}/v1/ingest/shelly/{found['ingest_token']}"

            assert await error(here, "POST", f"{one}/identify") == (409, "identify_unsupported")
            assert (await ask(here, "DELETE", one))[0] == 204
            assert await error(here, "GET", one) == (404, "device_not_found")
            taken = second | {"model": "diy_esp32"}
            assert await error(here, "POST", body=taken) == (409, "local_id_taken")
            unknown = {**second, "local_id": "fridge03", "model": "toaster"}
            assert await error(here, "POST", body=unknown) == (422, "unknown_model")

    run(test())


def test_the_catalogue_lists_every_model(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            status, found, _ = await ask(here, "GET", "/v1/models")
            assert (status, found["has_more"], found["next_cursor"]) == (200, False, None)
            assert [model["model"] for model in found["data"]] == [*MODELS]
            by_name = {model["model"]: model["ingest_url_kind"] for model in found["data"]}
            assert (by_name["shelly-h-t-gen3"], by_name["diy_esp32"]) == ("shelly_get", "json_post")

    run(test())


# ---------------------------------------------------------------- lists


def test_filters_and_pages(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            other, here.site = here.site, await another_site(here, "Kitchen")
            names = ["shelly-h-t", "shelly-h-t-gen3", "diy_esp32", "shelly-h-t-gen3", "diy_esp8266"]
            devices = [await made(here, f"d{number}", model=model) for number, model in enumerate(names)]
            await made(here, "away", site_id=site_id(other))
            nowhere = await made(here, "nowhere", site_id=None)
            assert await listed(here) == ["d0", "d1", "d2", "d3", "d4"]
            assert await listed(here, model="gen3") == ["d1", "d3"]
            assert await listed(here, model="DIY_") == ["d2", "d4"]
            assert await listed(here, model="toaster") == []
            everywhere = ["device", "d0", "d1", "d2", "d3", "d4", "away", "nowhere"]
            _, found, _ = await ask(here, "GET", account_id=account_id(here))
            assert [device["local_id"] for device in found["data"]] == everywhere
            _, found, _ = await ask(here, "GET", account_id=here.organisation, model="shelly")
            assert [device["local_id"] for device in found["data"]] == ["d0", "d1", "d3"]
            assert await site_of(here, nowhere) is None

            now = datetime.now(UTC)
            for device, seen, cadence in (
                (devices[0], now, None),
                (devices[1], now - HOUR, 3600.0),
                (devices[2], now - HOUR, 60.0),
            ):
                await superuser(
                    here,
                    "UPDATE devices SET online = true, last_seen_at = $2, cadence_s = $3, online_until = $2"
                    " WHERE device_id = $1",
                    uuid_of(device),
                    seen,
                    cadence,
                )
            assert await listed(here, online="true") == ["d0", "d1"]
            assert await listed(here, online="false") == ["d2", "d3", "d4"]
            assert await listed(here, online="false", model="gen3") == ["d3"]
            assert await listed(here, online="true", model="gen3") == ["d1"]
            assert await listed(here, online="false", model="diy") == ["d2", "d4"]
            _, found, _ = await ask(here, "GET", account_id=account_id(here), online="true")
            assert [(device["local_id"], device["online"]) for device in found["data"]] == [
                ("d0", True),
                ("d1", True),
            ]
            queries: list[dict[str, Any]] = [
                {}, {"online": "false"}, {"model": "shelly"}, {"online": "true", "model": "shelly"},
            ]  # fmt: skip
            for query in queries:
                whole = await listed(here, **query)
                for limit in (1, 2, len(whole)):
                    paged: list[str] = []
                    cursor: dict[str, str] = {}
                    while True:
                        wanted: dict[str, Any] = {"site_id": site_id(here.site), "limit": limit} | query | cursor
                        _, page, _ = await ask(here, "GET", **wanted)
                        paged += [device["local_id"] for device in page["data"]]
                        assert page["has_more"] is (page["next_cursor"] is not None)
                        if not page["has_more"]:
                            break
                        cursor = {"cursor": page["next_cursor"]}
                    assert paged == whole
            _, page, _ = await ask(here, "GET", site_id=site_id(here.site), limit=1)
            given = {"cursor": page["next_cursor"]}
            assert await error(here, "GET", site_id=site_id(other), **given) == (400, "invalid_parameter")
            assert await error(here, "GET", account_id=account_id(here), **given) == (400, "invalid_parameter")

    run(test())


def test_many_that_fell_silent_at_once_are_offline_before_anybody_notes_it(any_database: Database) -> None:
    """More than are looked at one by one: the list goes through all devices then."""

    async def test() -> None:
        async with world(any_database) as here:
            await superuser(
                here,
                "INSERT INTO devices (device_id, organisation_id, name, local_id, model, online, cadence_s,"
                " last_seen_at, online_until, site_id)"
                " SELECT gen_random_uuid(), $1, 'x', 's' || n, 'diy_esp32', n % 10 < 9, 60,"
                "  now() - CASE WHEN n % 10 < 8 THEN interval '1 hour' ELSE interval '0' END,"
                "  now() + CASE WHEN n % 10 < 8 THEN interval '-1 hour' ELSE interval '1 hour' END, $2"
                " FROM generate_series(1, 1500) n",
                here.organisation,
                here.site,
            )
            rows = await superuser(
                here,
                "SELECT local_id FROM devices WHERE local_id LIKE 's%' AND substr(local_id, 2)::int % 10 <> 8"
                " ORDER BY device_id",
            )
            queries: tuple[dict[str, Any], ...] = (
                {"account_id": account_id(here)},
                {"site_id": site_id(here.site)},
                {"account_id": account_id(here), "model": "diy"},
            )
            for query in queries:
                found: list[str] = []
                cursor: str | None = None
                while True:
                    more: dict[str, Any] = {} if cursor is None else {"cursor": cursor}
                    _, page, _ = await ask(here, "GET", online="false", limit=500, **query, **more)
                    found += [device["local_id"] for device in page["data"] if device["local_id"].startswith("s")]
                    cursor = page["next_cursor"]
                    if cursor is None:
                        break
                assert found == [row["local_id"] for row in rows]

    run(test())


def test_a_list_is_of_a_site_or_an_account_of_the_caller_s(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            theirs, their_site, _, _ = await tenant(database)
            assert await error(here, "GET") == (422, "invalid")
            assert await error(here, "GET", online="true") == (422, "invalid")
            for account in (f"acc_{theirs.hex}", theirs, f"acc_{uuid4().hex}"):
                assert await error(here, "GET", account_id=account) == (404, "account_not_found")
            for site in (their_site, uuid4()):
                assert await error(here, "GET", site_id=site_id(site)) == (404, "site_not_found")
            queries: list[dict[str, Any]] = [
                {"site_id": "kitchen"},
                {"account_id": "acc_"},
                {"online": "maybe"},
                {"model": "x" * 300},
                {"limit": 0},
                {"limit": 501},
                {"cursor": "made-up"},
                {"sort": "name"},
            ]
            for query in queries:
                found = await error(here, "GET", **({"site_id": site_id(here.site)} | query))
                assert found == (400, "invalid_parameter"), query

    run(test())


# ---------------------------------------------------------------- changing


BAD_BODIES: list[dict[str, Any]] = [
    {"local_id": ""},
    {"local_id": "x" * 65},
    {"local_id": "a b"},
    {"local_id": "🥶"},
    {"local_id": None},
    {"name": ""},
    {"name": "  "},
    {"name": "x" * 300},
    {"name": "a\u0000b"},
    {"name": 5},
    {"notes": "x" * 4_001},
    {"notes": "a\u0000b"},
    {"model": ""},
    {"model": 7},
    {"site_id": "site_4f3c"},
    {"site_id": 5},
    {"colour": "white"},
]


def test_bad_fields_are_named_and_nothing_is_made(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            good = {"site_id": site_id(here.site), "local_id": "new", "name": "New", "model": "diy_esp32"}
            for bad in BAD_BODIES:
                status, found, _ = await ask(here, "POST", body=good | bad)
                assert status == 422, bad
                assert [one["field"] for one in found["error"]["details"]] == [*bad]
            for missing in ("local_id", "name", "model"):
                body = {name: value for name, value in good.items() if name != missing}
                status, found, _ = await ask(here, "POST", body=body)
                assert (status, found["error"]["details"][0]["field"]) == (422, missing)
            for raw in (b"", b"{", b"nothing", b"\xff"):
                assert await error(here, "POST", raw=raw) == (400, "bad_json"), raw
            assert await error(here, "POST", body=[good]) == (422, "invalid")
            strange = {"name": "🥶 ثلاجة", "notes": "two\nlines"}
            device = await made(here, "new", **strange)
            _, found, _ = await ask(here, "GET", f"{PATH}/{device}")
            assert {name: found[name] for name in strange} == strange
            assert await listed(here) == ["device", "new"]
            for bad in ({"name": None}, {"local_id": "a b"}, {"colour": "white"}, {"id": device}):
                status, found, _ = await ask(here, "PATCH", f"{PATH}/{device}", bad)
                assert (status, found["error"]["details"][0]["field"]) == (422, next(iter(bad))), bad
            wrong: dict[str, Any] = {"site_id": None, "model": "diy_esp32", "name": "Renamed"}
            status, found, _ = await ask(here, "PATCH", f"{PATH}/{device}", wrong)
            assert [one["field"] for one in found["error"]["details"]] == ["site_id", "model"]
            assert all("cannot be changed" in one["message"] for one in found["error"]["details"])
            wrong = {"name": 5, "model": "y", "site_id": "z", "colour": "white"}
            status, found, _ = await ask(here, "PATCH", f"{PATH}/{device}", wrong)
            named = [one["field"] for one in found["error"]["details"]]
            assert (status, sorted(named)) == (422, sorted(wrong))
            assert (await ask(here, "GET", f"{PATH}/{device}"))[1]["name"] == strange["name"]

    run(test())


def test_everything_that_is_wrong_is_named_at_once(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            body = {"local_id": "a\0b", "name": 5, "site_id": "site_4f3c", "colour": "white"}
            status, found, _ = await ask(here, "POST", body=body)
            named = [one["field"] for one in found["error"]["details"]]
            assert (status, sorted(named)) == (422, ["colour", "local_id", "model", "name", "site_id"])
            status, found, _ = await ask(here, "POST", body={f"field{number}": 1 for number in range(1_000)})
            assert (status, len(found["error"]["details"])) == (422, 20)
            status, found, _ = await ask(here, "GET", limit=0, site_id="x", colour="white", online="maybe")
            named = [one["field"] for one in found["error"]["details"]]
            assert (status, sorted(named)) == (400, ["colour", "limit", "online", "site_id"])
            # One of two is missing; nobody can tell where one of them is wrong.
            either: list[tuple[dict[str, Any], list[str]]]
            either = [({}, ["limit", "site_id"]), ({"account_id": "x"}, ["account_id", "limit"])]
            for given, wanted in either:
                status, found, _ = await ask(here, "GET", limit=0, **given)
                assert (status, sorted(one["field"] for one in found["error"]["details"])) == (400, wanted)

    run(test())


def test_a_local_id_is_not_spelt_like_the_id_of_a_device(any_database: Database) -> None:
    """Whoever sends for both would mean another one by it."""

    async def test() -> None:
        async with world(any_database) as here:
            device, other = await made(here, "one"), uuid_of(await made(here, "two"))
            for name in (str(other), other.hex, f"dev_{other.hex}", f"dev_{other}", str(uuid4()).upper()):
                body = {"site_id": site_id(here.site), "local_id": name, "name": "New", "model": "diy_esp32"}
                for answer in (
                    await ask(here, "POST", body=body),
                    await ask(here, "PATCH", f"{PATH}/{device}", {"local_id": name}),
                ):
                    status, found, _ = answer
                    assert (status, found["error"]["details"][0]["field"]) == (422, "local_id"), name
                    assert "like the id of a device" in found["error"]["message"]
            for name in (other.hex[1:], f"dev_{other.hex[1:]}", f"x{other}", f"dev-{other.hex[:20]}"):
                assert (await ask(here, "PATCH", f"{PATH}/{device}", {"local_id": name}))[0] == 200, name

    run(test())


def test_a_moment_that_is_a_number_is_told_what_is_taken(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            device = await made(here)
            for moment in (1779006120, "soon"):
                body = {"to_site_id": None, "effective_at": moment}
                status, found, _ = await ask(here, "POST", f"{PATH}/{device}/move", body)
                (detail,) = found["error"]["details"]
                assert (status, detail["field"]) == (422, "effective_at")
                assert "text" in detail["message"]
                assert "RFC 3339" in detail["message"]
            body = {"to_site_id": None, "effective_at": "1779006120"}
            assert (await ask(here, "POST", f"{PATH}/{device}/move", body))[0] == 200

    run(test())


def test_a_packed_body_is_told_that_none_is_taken(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            body = {"site_id": site_id(here.site), "local_id": "new", "name": "New", "model": "diy_esp32"}
            for coding, packed in (("gzip", gzip.compress(json.dumps(body).encode())), ("br", b"{}"), ("zstd", b"")):
                sent = {"Content-Encoding": coding, "Content-Type": "application/json"}
                status, found, headers = await ask(here, "POST", raw=packed, headers=sent)
                assert (status, found["error"]["code"]) == (415, "unsupported_encoding")
                assert headers["Accept-Encoding"] == "identity"
            plain = {"Content-Encoding": "identity"}
            assert (await ask(here, "POST", raw=json.dumps(body).encode(), headers=plain))[0] == 201

    run(test())


def test_changes_are_to_the_version_that_was_seen(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            one = f"{PATH}/{await made(here)}"
            _, _, headers = await ask(here, "GET", one)
            seen = {"If-Match": headers["ETag"]}
            status, found, headers = await ask(here, "PATCH", one, {"notes": "new door"}, headers=seen)
            assert (status, found["notes"]) == (200, "new door")
            assert headers["ETag"] != seen["If-Match"]
            for method, path, body in (
                ("PATCH", one, {"notes": "stale"}),
                ("POST", f"{one}/move", {"to_site_id": None}),
                ("DELETE", one, None),
            ):
                assert await error(here, method, path, body, headers=seen) == (412, "precondition_failed")
            assert (await ask(here, "GET", one))[1]["notes"] == "new door"
            for value in ("{}", "*", '"0", {}'):
                expected = {"If-Match": value.format(headers["ETag"])}
                status, _, headers = await ask(here, "PATCH", one, {"name": "Door"}, headers=expected)
                assert status == 200, value
            assert (await ask(here, "DELETE", one, headers={"If-Match": headers["ETag"]}))[0] == 204

    run(test())


def test_a_deleted_device_is_gone_but_for_what_it_measured(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            body = {"site_id": site_id(here.site), "local_id": "fridge", "name": "Fridge", "model": "diy_esp32"}
            _, created, _ = await ask(here, "POST", body=body)
            device, token = created["id"], created["ingest_token"]
            series = await here.series("temperature", device=uuid_of(device))
            await here.store(series, datetime(2026, 11, 2, tzinfo=UTC), 4.2)
            _, before, _ = await here.get(device_id=uuid_of(device))
            assert "removed_at" not in before
            began = await epoch(here)
            assert (await ask(here, "DELETE", f"{PATH}/{device}"))[0] == 204
            assert not await is_valid(here, token)
            assert await epoch(here) > began
            for method, path in (
                ("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/move"), ("POST", "/rotate-token"),
                ("POST", "/identify"),
            ):  # fmt: skip
                sent = {"PATCH": {"name": "x"}, "POST": {"to_site_id": None} if path == "/move" else None}.get(method)
                assert await error(here, method, f"{PATH}/{device}{path}", sent) == (404, "device_not_found"), path
            assert await listed(here) == ["device"]
            status, after, _ = await here.get(device_id=uuid_of(device))
            assert (status, after["data"]) == (200, before["data"])
            assert after["removed_at"]
            assert await made(here) != device  # its name is free

    run(test())


def test_a_rotated_token_takes_the_place_of_the_old_one(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            body = {"site_id": site_id(here.site), "local_id": "fridge", "name": "Fridge", "model": "diy_esp32"}
            _, created, _ = await ask(here, "POST", body=body)
            began = await epoch(here)
            status, rotated, _ = await ask(here, "POST", f"{PATH}/{created['id']}/rotate-token")
            assert status == 200
            assert await is_valid(here, rotated["ingest_token"])
            assert not await is_valid(here, created["ingest_token"])
            changed = await superuser(here, "SELECT token_hash FROM credential_changes WHERE epoch > $1", began)
            assert TokenHasher(RING).digest(created["ingest_token"]) in {row["token_hash"] for row in changed}

    run(test())


# ---------------------------------------------------------------- moves


def test_a_move_replaces_what_follows_it(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            target, third = await another_site(here), await another_site(here, "Third")
            device = await made(here)
            one, now = f"{PATH}/{device}", datetime.now(UTC)

            async def move(site: UUID | None, at: datetime | None = None) -> dict[str, Any]:
                body = {"to_site_id": site and site_id(site)} | ({"effective_at": text(at)} if at else {})
                status, found, _ = await ask(here, "POST", f"{one}/move", body)
                assert status == 200, found
                moved: dict[str, Any] = found
                return moved

            async def history() -> list[tuple[UUID | None, datetime]]:
                rows = await superuser(
                    here, "SELECT site_id, valid_from FROM device_sites WHERE device_id = $1 ORDER BY 2",
                    uuid_of(device),
                )  # fmt: skip
                return [(row["site_id"], row["valid_from"]) for row in rows]

            ((_, began),) = await history()
            found = await move(target, now + HOUR)
            assert (found["site_id"], found["to_site_id"]) == (site_id(here.site), site_id(target))
            assert await listed(here) == ["device", "fridge"]
            await move(third, now + 2 * HOUR)
            assert await history() == [(here.site, began), (target, now + HOUR), (third, now + 2 * HOUR)]
            found = await move(third, now + HOUR)  # replaces both that follow
            assert await history() == [(here.site, began), (third, now + HOUR)]
            found = await move(target)
            assert (found["site_id"], len(await history())) == (site_id(target), 2)
            assert (await listed(here), await listed(here, site_id=site_id(target))) == (["device"], ["fridge"])
            await move(third, now - HOUR)
            assert await history() == [(here.site, began), (third, now - HOUR)]
            assert await site_of(here, device) == site_id(third)
            await move(None)
            assert (await history())[-1][0] is None
            assert await site_of(here, device) is None

    run(test())


def test_a_move_that_came_due_is_felt_before_anybody_settles_it(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            target = await another_site(here)
            device = await made(here, model="shelly-h-t-gen3")
            body = {"to_site_id": site_id(target), "effective_at": text(datetime.now(UTC) + HOUR)}
            await ask(here, "POST", f"{PATH}/{device}/move", body)
            # As an hour later, with nobody at work.
            await superuser(here, "UPDATE device_sites SET valid_from = valid_from - interval '61 minutes'")
            await superuser(here, "UPDATE devices SET site_until = site_until - interval '61 minutes'")
            assert await site_of(here, device) == site_id(target)
            queries: list[dict[str, str]] = [
                {}, {"online": "false"}, {"model": "gen3"}, {"model": "gen3", "online": "false"},
            ]  # fmt: skip
            for query in queries:
                assert "fridge" not in await listed(here, **query), query
                assert await listed(here, site_id=site_id(target), **query) == ["fridge"], query
            assert await listed(here, site_id=site_id(target), online="true") == []
            _, found, _ = await ask(here, "GET", account_id=account_id(here))
            assert [one["site_id"] for one in found["data"]] == [site_id(here.site), site_id(target)]

    run(test())


def test_a_name_is_a_device_s_own_at_its_site_at_every_time(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            target, now = await another_site(here), datetime.now(UTC)
            at_target = {"to_site_id": site_id(target)}
            mover = await made(here, "twin")
            other = await made(here, "twin", site_id=site_id(target))
            move, away = f"{PATH}/{mover}/move", f"{PATH}/{other}/move"
            taken = (409, "local_id_taken")
            for at in (None, now - HOUR, now + HOUR):
                when = {"effective_at": text(at)} if at else {}
                assert await error(here, "POST", move, at_target | when) == taken, at
            # The other is to go: from then on the name is free there, not before.
            await ask(here, "POST", away, {"to_site_id": None, "effective_at": text(now + HOUR)})
            before = text(now + HOUR - timedelta(microseconds=1))
            assert await error(here, "POST", move, at_target | {"effective_at": before}) == taken
            status, _, _ = await ask(here, "POST", move, at_target | {"effective_at": text(now + HOUR)})
            assert status == 200
            # Now it cannot stay after all, nor may a third take the name of what is to come.
            assert await error(here, "POST", away, at_target) == taken
            assert await error(here, "PATCH", f"{PATH}/{await made(here, 'third')}", {"local_id": "twin"}) == taken
            body = {"local_id": "twin", "name": "New", "model": "diy_esp32", "site_id": site_id(target)}
            assert await error(here, "POST", body=body) == taken
            # Renamed, it makes way.
            assert (await ask(here, "PATCH", f"{PATH}/{mover}", {"local_id": "solo"}))[0] == 200
            assert (await ask(here, "POST", away, at_target))[0] == 200
            assert (await ask(here, "PATCH", f"{PATH}/{mover}", {"local_id": "solo"}))[0] == 200
            assert await error(here, "PATCH", f"{PATH}/{mover}", {"local_id": "twin"}) == taken
            # Who stands nowhere has any name.
            for _ in range(2):
                await made(here, "twin", site_id=None)

    run(test())


def test_of_two_at_once_one_gets_the_name(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            target = await another_site(here)
            body = {"site_id": site_id(target), "local_id": "one", "name": "One", "model": "diy_esp32"}
            answers = await asyncio.gather(*(ask(here, "POST", body=body) for _ in range(4)))
            assert sorted(status for status, _, _ in answers) == [201, 409, 409, 409]
            movers = [await made(here, "two", site_id=None) for _ in range(4)]
            to = {"to_site_id": site_id(target)}
            answers = await asyncio.gather(*(ask(here, "POST", f"{PATH}/{one}/move", to) for one in movers))
            assert sorted(status for status, _, _ in answers) == [200, 409, 409, 409]
            renamed = [await made(here, f"three-{number}", site_id=site_id(target)) for number in range(4)]
            name = {"local_id": "three"}
            answers = await asyncio.gather(*(ask(here, "PATCH", f"{PATH}/{one}", name) for one in renamed))
            assert sorted(status for status, _, _ in answers) == [200, 409, 409, 409]
            names = await listed(here, site_id=site_id(target))
            assert [names.count(name) for name in ("one", "two", "three")] == [1, 1, 1]

    run(test())


# ---------------------------------------------------------------- tenants


def test_another_account_s_device_is_not_there(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            theirs, their_site, their_device, _ = await tenant(any_database)
            device = await made(here)
            paths = [
                f"dev_{their_device.hex}",
                f"dev_{uuid4().hex}",
                str(their_device),
                "dev_b1d2",
                "dev_",
                "%00",
                "é",
            ]
            for method, tail, body in (
                ("GET", "", None), ("PATCH", "", {"name": "x"}), ("DELETE", "", None),
                ("POST", "/move", {"to_site_id": None}), ("POST", "/rotate-token", None), ("POST", "/identify", None),
            ):  # fmt: skip
                told = set()
                for path in paths:
                    status, found, _ = await ask(here, method, f"{PATH}/{path}{tail}", body)
                    assert (status, found["error"].pop("code")) == (404, "device_not_found"), path
                    found["error"].pop("request_id")
                    told.add(str(found))
                assert len(told) == 1, told
            for site in (their_site, uuid4()):
                move = {"to_site_id": site_id(site)}
                assert await error(here, "POST", f"{PATH}/{device}/move", move) == (404, "site_not_found")
                body = {"site_id": site_id(site), "local_id": "device", "name": "x", "model": "diy_esp32"}
                assert await error(here, "POST", body=body) == (404, "site_not_found")
            rows = await superuser(here, "SELECT name, version FROM devices WHERE organisation_id = $1", theirs)
            assert [tuple(row) for row in rows] == [("Device", 1)]

    run(test())


def test_a_key_may_do_what_its_scopes_say(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            organisation, site, device, key = await tenant(database, scopes=["devices:read"])
            body = {"site_id": site_id(site), "local_id": "new", "name": "x", "model": "diy_esp32"}
            assert (await ask(here, "GET", key=key, account_id=organisation))[0] == 200
            assert (await ask(here, "GET", f"{PATH}/{device}", key=key))[0] == 200
            for method, path, sent in (
                ("POST", PATH, body), ("PATCH", f"{PATH}/{device}", {"name": "x"}),
                ("DELETE", f"{PATH}/{device}", None), ("POST", f"{PATH}/{device}/rotate-token", None),
            ):  # fmt: skip
                assert await error(here, method, path, sent, key=key) == (403, "scope_missing")

    run(test())


# ---------------------------------------------------------------- repetitions


def test_a_named_request_is_done_once_and_answered_alike(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database, public_url=BASE) as here, world(any_database, public_url=BASE) as elsewhere:
            body = {"site_id": site_id(here.site), "local_id": "new", "name": "x", "model": "diy_esp32"}
            named = {"Idempotency-Key": "make-it"}
            first = await ask(here, "POST", body=body, headers=named)
            assert first[0] == 201
            again = await ask(elsewhere, "POST", body=body, headers=named, key=here.key)
            assert (again[:2], again[2]["Location"]) == (first[:2], first[2]["Location"])
            assert [one[2].get("Idempotency-Replayed") for one in (first, again)] == [None, "true"]
            quoted = await ask(here, "POST", body=body, headers={"Idempotency-Key": '"make-it"'})
            assert quoted[1] == first[1]
            conflict = (409, "idempotency_conflict")
            assert await error(here, "POST", body=body | {"name": "y"}, headers=named) == conflict
            rotate = f"{PATH}/{first[1]['id']}/rotate-token"
            assert await error(here, "POST", rotate, headers=named) == conflict
            # Another organisation's request of that name is its own.
            theirs = {"site_id": site_id(elsewhere.site), "local_id": "new", "name": "x", "model": "diy_esp32"}
            assert (await ask(elsewhere, "POST", body=theirs, headers=named))[0] == 201
            rotated = [await ask(here, "POST", rotate, headers={"Idempotency-Key": "turn"}) for _ in range(2)]
            assert rotated[0][1] == rotated[1][1]
            assert await is_valid(here, rotated[0][1]["ingest_token"])
            kept = await superuser(here, "SELECT * FROM repeats")
            assert len(kept) == 3
            assert not any(secret in repr(kept) for secret in ("ds_live_", "make-it", "turn", here.key))

    run(test())


def test_of_two_requests_of_one_name_one_waits_for_the_other(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            body = {"site_id": None, "local_id": "new", "name": "x", "model": "diy_esp32"}
            named = {"Idempotency-Key": str(uuid4())}
            answers = await asyncio.gather(*(ask(here, "POST", body=body, headers=named) for _ in range(4)))
            assert {status for status, _, _ in answers} == {201}
            assert len({found["ingest_token"] for _, found, _ in answers}) == 1
            assert len(await superuser(here, "SELECT FROM devices WHERE local_id = 'new'")) == 1

    run(test())


def test_what_failed_may_be_tried_again_under_its_name_and_so_may_what_is_a_day_old(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            body = {"site_id": site_id(here.site), "local_id": "device", "name": "x", "model": "diy_esp32"}
            named = {"Idempotency-Key": "again"}
            assert await error(here, "POST", body=body, headers=named) == (409, "local_id_taken")
            assert await superuser(here, "SELECT FROM repeats") == []
            body["local_id"] = "new"
            assert (await ask(here, "POST", body=body, headers=named))[0] == 201
            await superuser(here, "UPDATE repeats SET made_at = now() - interval '25 hours'")
            assert await error(here, "POST", body=body, headers=named) == (409, "local_id_taken")
            body["local_id"] = "newer"
            assert (await ask(here, "POST", body=body, headers=named))[0] == 201
            for bad in ("", '""', "x" * (KEY_CHARACTERS_MAX + 1), "naïve"):
                found = await error(here, "POST", body=body, headers={"Idempotency-Key": bad})
                assert found == (400, "invalid_parameter"), bad

    run(test())


# ---------------------------------------------------------------- groups


def test_groups_of_devices(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            path = "/api/v1/device-groups"
            devices = sorted([uuid_of(await made(here, f"d{number}")) for number in range(3)])
            status, group, headers = await ask(here, "POST", path, {"name": "Kitchen"})
            assert (status, set(group)) == (201, {"group_id", "name", "description", "created_at", "updated_at"})
            one = f"{path}/{group['group_id']}"
            assert (headers["Location"], headers["ETag"]) == (one, (await ask(here, "GET", one))[2]["ETag"])
            for method in ("PUT", "DELETE"):
                for nobody in ("x", uuid4(), "%00"):
                    status, found, _ = await ask(here, method, f"{one}/devices/{nobody}")
                    assert (status, found["code"]) == (404, "device_not_found"), nobody
                for group_id in ("x", uuid4(), "%00"):
                    status, found, _ = await ask(here, method, f"{path}/{group_id}/devices/{devices[0]}")
                    assert (status, found["code"]) == (404, "device_group_not_found"), group_id
            assert (await ask(here, "POST", path, {"name": "Kitchen"}))[0] == 409
            for device in (*devices, devices[0]):
                assert (await ask(here, "PUT", f"{one}/devices/{device}"))[0] == 204
            _, found, _ = await ask(here, "GET", f"{one}/devices", limit=2)
            assert found["data"] == [str(device) for device in devices[:2]]
            _, found, _ = await ask(here, "GET", f"{one}/devices", limit=2, cursor=found["next_cursor"])
            assert (found["data"], found["next_cursor"]) == ([str(devices[2])], None)
            assert (await ask(here, "DELETE", f"{one}/devices/{devices[0]}"))[0] == 204
            assert (await ask(here, "DELETE", f"{one}/devices/{devices[0]}"))[0] == 404
            assert (await ask(here, "DELETE", f"{PATH}/dev_{devices[1].hex}"))[0] == 204
            _, found, _ = await ask(here, "GET", f"{one}/devices")
            assert found["data"] == [str(devices[2])]
            _, _, their_device, their_key = await tenant(any_database)
            assert (await ask(here, "PUT", f"{one}/devices/{their_device}"))[0] == 404
            for method, tail, body in (("GET", "", None), ("PATCH", "", {"name": "x"}), ("DELETE", "", None)):
                assert (await ask(here, method, f"{one}{tail}", body, key=their_key))[0] == 404
            status, found, _ = await ask(here, "PATCH", one, {"name": "Cold"}, headers={"If-Match": headers["ETag"]})
            assert (status, found["name"]) == (200, "Cold")
            stale = {"If-Match": headers["ETag"]}
            assert (await ask(here, "DELETE", one, headers=stale))[0] == 412
            assert (await ask(here, "POST", path, {"name": "Bar"}))[0] == 201
            _, page, _ = await ask(here, "GET", path, limit=1)
            _, rest, _ = await ask(here, "GET", path, limit=1, cursor=page["next_cursor"])
            assert [row["name"] for row in (*page["data"], *rest["data"])] == ["Cold", "Bar"]
            assert (await ask(here, "DELETE", one))[0] == 204
            assert (await ask(here, "GET", one))[0] == 404

    run(test())


def test_groups_and_stays_are_bounded(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            path = "/api/v1/device-groups"
            await superuser(
                here,
                "INSERT INTO device_groups (group_id, organisation_id, name)"
                " SELECT gen_random_uuid(), $1, i::text FROM generate_series(1, $2) i",
                here.organisation,
                GROUPS_MAX - 1,
            )
            assert (await ask(here, "POST", path, {"name": "Last"}))[0] == 201
            status, found, _ = await ask(here, "POST", path, {"name": "One more"})
            assert (status, found["code"]) == (409, "device_group_limit")
            device = await made(here)
            await superuser(
                here,
                "INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from)"
                " SELECT $1, $2, NULL, now() - i * interval '1 hour' FROM generate_series(1, $3) i",
                uuid_of(device),
                here.organisation,
                STAYS_MAX - 1,
            )
            move = f"{PATH}/{device}/move"
            assert await error(here, "POST", move, {"to_site_id": None}) == (409, "move_limit")
            # What takes the place of others makes room.
            early = text(datetime.now(UTC) - 2 * HOUR)
            body = {"to_site_id": site_id(await another_site(here)), "effective_at": early}
            assert (await ask(here, "POST", move, body))[0] == 200

    run(test())


# ---------------------------------------------------------------- readings by site


def test_a_backlog_older_than_its_device_is_of_where_that_stood_first(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            target = await another_site(here)
            device = await made(here)
            series = await here.series("temperature", device=uuid_of(device))
            moments = [datetime.now(UTC).replace(microsecond=0) - number * HOUR for number in range(6, 0, -1)]
            for number, moment in enumerate(moments):
                await here.store(series, moment, float(number))

            async def values(site: UUID) -> list[float]:
                pages = await here.pages(device_id=None, site_id=site)
                return [reading["value"] for page in pages for reading in page]

            assert (await values(here.site), await values(target)) == ([0, 1, 2, 3, 4, 5], [])
            move = {"to_site_id": site_id(target), "effective_at": text(moments[3])}
            assert (await ask(here, "POST", f"{PATH}/{device}/move", move))[0] == 200
            assert (await values(here.site), await values(target)) == ([0, 1, 2], [3, 4, 5])
            assert (await ask(here, "PATCH", f"{PATH}/{device}", {"local_id": "renamed"}))[0] == 200
            for early in ("0001-01-01T00:00:00Z", "1969-12-31T23:59:59Z"):
                move = {"to_site_id": site_id(target), "effective_at": early}
                assert await error(here, "POST", f"{PATH}/{device}/move", move) == (422, "invalid")
            assert (await values(here.site), await values(target)) == ([0, 1, 2], [3, 4, 5])

    run(test())


def test_a_site_s_readings_are_those_of_devices_while_they_stood_there(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database, api_page_series_max=4) as here:
            target = await another_site(here)
            device = await made(here)
            now = datetime.now(UTC).replace(microsecond=0)
            series = [await here.series(metric, device=uuid_of(device)) for metric in ("temperature", "humidity")]
            moments = [now - 8 * HOUR + number * HOUR for number in range(8)]
            for moment in moments:
                for one in series:
                    await here.store(one, moment, float(moments.index(moment)))
            # Here from the first on, there from the third, here again from the sixth, there from the seventh.
            for number, site in ((0, here.site), (2, target), (5, here.site), (6, target)):
                move = {"to_site_id": site_id(site), "effective_at": text(moments[number])}
                assert (await ask(here, "POST", f"{PATH}/{device}/move", move))[0] == 200
            assert (await ask(here, "DELETE", f"{PATH}/{device}"))[0] == 204

            async def values(site: UUID, **query: Any) -> list[float]:
                pages = await here.pages(device_id=None, site_id=site, **query)
                return [reading["value"] for page in pages for reading in page]

            stood, there = [0, 1, 5], [2, 3, 4, 6, 7]
            for limit in (1, 3, 100):
                for site, numbers in ((here.site, stood), (target, there)):
                    assert await values(site, metric="humidity", limit=limit) == numbers
                    assert await values(site, limit=limit) == sorted(numbers * 2)
                    assert await values(site, limit=limit, order="desc") == sorted(numbers * 2, reverse=True)
            span = {"from_": text(moments[1]), "to": text(moments[4])}
            assert await values(target, metric="humidity", **span) == [2, 3]
            assert await values(here.site, metric="humidity", **span) == [1]
            pages = await here.pages(device_id=uuid_of(device), site_id=here.site, metric="temperature")
            assert [reading["value"] for reading in pages[0]] == stood
            assert (await here.pages(site_id=target))[0] == []  # the world's own device never stood there

            _, their_site, _, _ = await tenant(any_database)
            for site in (their_site, uuid4()):
                status, found, _ = await here.get(device_id=None, site_id=site)
                assert (status, found["code"]) == (404, "site_not_found")
            for query in ({}, {"site_id": "kitchen"}):
                status, found, _ = await here.get(device_id=None, **query)
                assert (status, found["code"]) == (400, "invalid_parameter")
            await here.series("pressure", device=uuid_of(device))
            status, found, _ = await here.get(device_id=None, site_id=target)
            assert (status, found["code"]) == (400, "invalid_parameter")
            assert await values(target, metric="humidity") == there

    run(test())
