"""Reading back over HTTP, on both databases: pages, the newest, who may see what, and what happens when it breaks."""

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import orjson
import pytest
from aiohttp import ClientError, ClientSession, web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from api.http.problems import Problem
from api.metrics import ApiMetrics
from api.registry.credentials import Credentials
from api.registry.devices import add_device, remove
from api.registry.organisations import acting_for, add_organisation
from api.registry.sites import add_site, begin_erasure
from api.server import create_app
from api.serving import ApiFace
from api.settings import ApiSettings
from bench.proxy import Mode, Proxy
from bench.usage import free_port
from runtime.http.cors import Origins
from runtime.http.server import HttpServer, HttpSettings
from runtime.ids import uuid7
from runtime.postgres import Probe, connect, open_pool
from runtime.secrets import API_KEY_PREFIX, TokenHasher, make_token, new_ring
from runtime.sockets import address_of, listen
from schemas.record import Quality
from tests.databases import Database
from tests.landing_rig import until
from tests.support import run

T0 = datetime(2026, 11, 2, tzinfo=UTC)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
RING = new_ring()
CONNECTIONS_MAX = 10


@dataclass
class World:
    """An API on a database, one organisation in it, and a client that holds its key."""

    database: Database
    url: str
    session: ClientSession
    organisation: UUID
    site: UUID
    device: UUID
    key: str
    registry: CollectorRegistry
    app: web.Application

    async def get(self, path: str = "", *, key: str = "", **query: Any) -> tuple[int, Any, Any]:
        """Status, JSON, headers of a request under /api/v1/readings; `device_id` is the world's unless given."""
        headers = {"Authorization": f"Bearer {key or self.key}"}
        parameters = {"device_id": self.device} | {name.rstrip("_"): value for name, value in query.items()}
        url = f"{self.url}/api/v1/readings{path}"
        sent = {name: str(value) for name, value in parameters.items() if value is not None}
        async with self.session.get(url, params=sent, headers=headers) as answer:
            return answer.status, await answer.json(), answer.headers

    async def data(self, path: str = "", **query: Any) -> list[Any]:
        status, body, _ = await self.get(path, **query)
        assert status == 200, body
        found: list[Any] = body["data"]
        return found

    async def pages(self, **query: Any) -> list[list[Any]]:
        """Every page from the first to the last."""
        pages, cursor = [], None
        while True:
            status, body, _ = await self.get(cursor=cursor, **query)
            assert status == 200, body
            pages.append(body["data"])
            cursor = body["next_cursor"]
            if cursor is None:
                return pages

    async def series(self, metric: str, label: str = "", unit: str = "", device: UUID | None = None) -> int:
        found: int = await self._write(
            "INSERT INTO series (organisation_id, device_id, metric, label, unit) VALUES ($1, $2, $3, $4, $5)"
            " RETURNING series_id",
            self.organisation,
            device or self.device,
            metric,
            label,
            unit,
        )
        return found

    async def store(self, series: int, ts: datetime, value: float | str, quality: int = 0) -> None:
        table = "text_readings" if isinstance(value, str) else "readings"
        await self._write("SELECT ensure_week($1)", ts)
        await self._write(f"INSERT INTO {table} VALUES ($1, $2, $3, $4)", series, quality, ts, value)

    async def _write(self, sql: str, *values: object) -> Any:
        connection = await connect(self.database.settings, role="sluice_worker", application="test")
        try:
            return await connection.fetchval(sql, *values)
        finally:
            await connection.close()


@asynccontextmanager
async def world(
    database: Database,
    http: HttpSettings | None = None,
    *,
    origins: tuple[str, ...] = (),
    described: Sequence[Any] = (),
    **limits: Any,
) -> AsyncIterator[World]:
    registry = CollectorRegistry()
    bounds = ApiSettings(**limits)
    timeout = str(bounds.api_statement_timeout_ms)
    pool = await open_pool(
        database.settings, role="sluice_app", application="test", size_max=4, statement_timeout=timeout
    )
    metrics = ApiMetrics(registry)
    app = create_app(
        pool=pool,
        ring=RING,
        settings=bounds,
        metrics=metrics,
        origins=Origins(origins),
        described=described,
    )
    face = ApiFace(app, metrics)
    await face.start()
    listener = listen("TEST", "127.0.0.1:0")
    http = http or HttpSettings(http_connections_max=CONNECTIONS_MAX)
    server = HttpServer(listener, face.handler, http, face.refuse, face.request_factory)
    await server.start()
    organisation, site, device, key = await tenant(database)
    async with ClientSession() as session:
        url = f"http://{address_of(listener)}"
        yield World(database, url, session, organisation, site, device, key, registry, app)
    await server.stop(5)
    await face.stop()
    await pool.close()


async def tenant(database: Database, **credential: Any) -> tuple[UUID, UUID, UUID, str]:
    """A new organisation with a site, a device and an API key."""
    connection = await connect(database.settings, role=None, application="test")
    organisation = uuid7()
    async with acting_for(connection, organisation):
        await add_organisation(connection, organisation, "Test")
        site = await add_site(connection, organisation, "Site")
        device = await add_device(connection, organisation, site, "Device", "device")
        scopes = credential.pop("scopes", ["owner"])
        key = await Credentials(connection, TokenHasher(RING)).add_api_key(organisation, scopes, **credential)
    await connection.close()
    return organisation, site, device, key


# ---------------------------------------------------------------- what is answered


def test_readings_of_every_kind_come_back_as_they_were(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            temperature = await it.series("temperature", "inside", "°C")
            leak, text, big = [await it.series(metric) for metric in ("leak", "mode", "energy")]
            ts = T0 + timedelta(microseconds=120_001)
            await it.store(temperature, ts, 21.5)
            await it.store(leak, T0 + MINUTE, 1.0, Quality.BOOLEAN | Quality.TIME_REPLACED)
            await it.store(text, T0 + 2 * MINUTE, 'he said "ü"', Quality.TIME_STAMPED)
            await it.store(big, T0 + 3 * MINUTE, "-123456789012345678901234567890", Quality.INTEGER)
            first, second, third, fourth = await it.data()
            assert first == {
                "device_id": str(it.device),
                "metric": "temperature",
                "label": "inside",
                "unit": "°C",
                "ts": "2026-11-02T00:00:00.120001Z",
                "value": 21.5,
                "flags": [],
            }
            assert (second["value"], second["flags"], second["ts"]) == (
                True,
                ["time_replaced", "boolean"],
                "2026-11-02T00:01:00Z",
            )
            assert (third["value"], third["flags"]) == ('he said "ü"', ["time_stamped"])
            assert (fourth["value"], fourth["flags"]) == (-123456789012345678901234567890, ["integer"])

    run(test())


def test_the_span_is_half_open_and_the_filters_narrow_it(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            for metric, label in (("a", ""), ("a", "x"), ("b", "x")):
                series = await it.series(metric, label)
                for minute in range(4):
                    await it.store(series, T0 + minute * MINUTE, minute)
            start, end = T0 + MINUTE, T0 + 3 * MINUTE
            span = await it.data(from_=start.isoformat(), to=int(end.timestamp()))
            assert [reading["value"] for reading in span] == [1, 1, 1, 2, 2, 2]
            assert len(await it.data(metric="a")) == 8
            assert len(await it.data(metric="a", label="")) == 4
            assert len(await it.data(label="x")) == 8
            assert await it.data(metric="tilt") == []
            newest_first = await it.data(order="desc", metric="b")
            assert [reading["value"] for reading in newest_first] == [3, 2, 1, 0]

    run(test())


def test_the_newest_of_each_series_however_long_ago(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            now = datetime.now(UTC).replace(microsecond=0)
            fresh, silent, mixed, _ = [await it.series(metric) for metric in ("fresh", "silent", "mixed", "never")]
            await it.store(fresh, now - 2 * MINUTE, 1)
            await it.store(fresh, now - MINUTE, 2)
            await it.store(silent, now - timedelta(days=300), 3)
            await it.store(mixed, now - 2 * MINUTE, 4)
            await it.store(mixed, now - MINUTE, "text")
            found = await it.data("/latest")
            assert {(reading["metric"], reading["value"]) for reading in found} == {
                ("fresh", 2), ("silent", 3), ("mixed", "text"),
            }  # fmt: skip
            assert [reading["value"] for reading in await it.data("/latest", metric="silent")] == [3]

    run(test())


def test_the_newest_of_many_is_right_whatever_happens_between_two_questions(any_database: Database) -> None:
    """Where the newest were is where they are looked for first: some go on, some are erased, some are of long ago."""

    async def test() -> None:
        async with world(any_database) as it:
            now = datetime.now(UTC).replace(microsecond=0)
            series = [await it.series(f"m{number:03}") for number in range(120)]
            admin = await asyncpg.connect(it.database.superuser_url)
            try:
                for hours in (300 * 24, 20, 5):
                    await admin.execute("SELECT ensure_week($1)", now - hours * HOUR)
                    ts = [now - hours * HOUR + number * MINUTE for number in range(len(series))]
                    await admin.execute(
                        "INSERT INTO readings (series_id, quality, ts, value)"
                        " SELECT s, 0, t, $3 FROM unnest($1::int[], $2::timestamptz[]) u(s, t)", series, ts, hours,
                    )  # fmt: skip
                assert await newest(it) == dict.fromkeys(range(120), 5)
                assert await newest(it) == dict.fromkeys(range(120), 5)
                await it.store(series[0], now - HOUR, 1)
                await it.store(series[1], now - HOUR, "text")
                await admin.execute("DELETE FROM readings WHERE series_id = ANY ($1) AND value = 5", series[2:40])
                await admin.execute("DELETE FROM readings WHERE series_id = ANY ($1) AND value < 300", series[40:45])
                await admin.execute("DELETE FROM readings WHERE series_id = $1", series[45])
                changed: dict[int, Any] = {0: 1, 1: "text"} | dict.fromkeys(range(2, 40), 20)
                changed |= dict.fromkeys(range(40, 45), 7200) | dict.fromkeys(range(46, 120), 5)
                assert await newest(it) == changed
                await it.store(series[45], now - 200 * 24 * HOUR, 9)
                assert await newest(it) == changed | {45: 9}
            finally:
                await admin.close()

    run(test())


async def newest(it: World) -> dict[int, Any]:
    return {int(reading["metric"][1:]): reading["value"] for reading in await it.data("/latest")}


def test_the_newest_at_a_site_is_of_while_each_device_stood_there(any_database: Database) -> None:
    """Of what stands there all the time, came, fell silent, left, came back, is to leave or come, and was deleted."""

    async def test() -> None:
        async with world(any_database) as it:
            now = datetime.now(UTC).replace(microsecond=0)
            stays: dict[str, list[tuple[UUID | None, int]]] = {
                "always": [(it.site, 10_000)],
                "came": [(None, 10_000), (it.site, 5)],
                "silent": [(it.site, 10_000)],
                "left": [(it.site, 10_000), (None, 3)],
                "back": [(it.site, 10_000), (None, 7), (it.site, 4), (None, 2)],
                "too late": [(None, 10_000), (it.site, 1)],
                "to leave": [(it.site, 10_000), (None, -1)],
                "to come": [(None, 10_000), (it.site, -1)],
                "deleted": [(it.site, 10_000)],
            }
            for metric, stood in stays.items():
                device = await standing(it, metric, [(site, now - hours * HOUR) for site, hours in stood])
                series = await it.series(metric, device=device)
                for hours in (9, 6, 4, 2) if metric != "silent" else (9_000,):
                    await it.store(series, now - hours * HOUR, float(hours))
                if metric in ("always", "left"):
                    await it.store(series, now - 4 * HOUR + MINUTE, "text")
                if metric == "deleted":
                    await delete(it, device)
            of_site: dict[str, Any] = {"device_id": None, "site_id": it.site}
            found = {one["metric"]: one["value"] for one in await it.data("/latest", **of_site)}
            assert found == {"always": 2, "came": 2, "silent": 9_000, "to leave": 2}
            until_now = await it.data("/latest", **of_site, to=now.isoformat())
            assert {one["metric"]: one["value"] for one in until_now} == {
                "always": 2, "came": 2, "silent": 9_000, "left": "text", "back": 4, "to leave": 2,
                "deleted": 2,
            }  # fmt: skip
            earlier = await it.data("/latest", **of_site, to=(now - 5 * HOUR).isoformat())
            assert {one["metric"]: one["value"] for one in earlier} == {
                "always": 6, "silent": 9_000, "left": 6, "back": 9, "to leave": 6, "deleted": 6,
            }  # fmt: skip

    run(test())


def test_the_newest_at_a_site_are_others_once_a_move_has_come_due(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            now = datetime.now(UTC)
            device = await standing(it, "leaves", [(it.site, now - HOUR), (None, now + timedelta(seconds=5))])
            await it.store(await it.series("a", device=device), now - MINUTE, 1)
            url, query = f"{it.url}/api/v1/readings/latest", {"site_id": str(it.site)}
            headers = {"Authorization": f"Bearer {it.key}"}
            async with it.session.get(url, params=query, headers=headers) as answer:
                assert [reading["value"] for reading in (await answer.json())["data"]] == [1]
                headers["If-None-Match"] = answer.headers["ETag"]

            async def has_left() -> bool:
                async with it.session.get(url, params=query, headers=headers) as answer:
                    return answer.status == 200 and (await answer.json())["data"] == []

            await until(has_left)

    run(test())


async def delete(it: World, device: UUID) -> None:
    connection = await connect(it.database.settings, role="sluice_app", application="test")
    async with acting_for(connection, it.organisation):
        await remove(connection, device, None)
    await connection.close()


async def standing(it: World, name: str, stays: Sequence[tuple[UUID | None, datetime]]) -> UUID:
    """A device that came to each site, or to none, at its time."""
    connection = await connect(it.database.settings, role=None, application="test")
    async with acting_for(connection, it.organisation):
        device = await add_device(connection, it.organisation, it.site, name, name)
    await connection.close()
    admin = await asyncpg.connect(it.database.superuser_url)
    await admin.execute("DELETE FROM device_sites WHERE device_id = $1", device)
    for site, since in stays:
        await admin.execute(
            "INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from) VALUES ($1, $2, $3, $4)",
            device,
            it.organisation,
            site,
            since,
        )
    await admin.close()
    return device


# ---------------------------------------------------------------- pages


def test_pages_join_without_gap_or_double_while_rows_come_in(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            dense, sparse, text = [await it.series(metric) for metric in ("dense", "sparse", "text")]
            for minute in range(60):
                await it.store(dense, T0 + minute * MINUTE, minute)
            for minute in range(0, 60, 20):
                await it.store(sparse, T0 + minute * MINUTE, minute)
                await it.store(text, T0 + minute * MINUTE, str(minute))
                await it.store(dense, T0 + minute * MINUTE, str(minute))  # a number and a text of one series and time
            for order in ("asc", "desc"):
                whole = await it.data(order=order, limit=1000)
                assert len(whole) == 69
                for limit in (1, 2, 7, 68, 69, 70):
                    pages = await it.pages(order=order, limit=limit)
                    assert [reading for page in pages for reading in page] == whole
                    assert all(len(page) == limit for page in pages[:-1])
            _, first, _ = await it.get(limit=40)
            await it.store(sparse, T0 + timedelta(seconds=1), 99)  # before the place that was reached
            await it.store(sparse, T0 + timedelta(minutes=59, seconds=1), 100)  # behind it
            _, rest, _ = await it.get(limit=1000, cursor=first["next_cursor"])
            together = first["data"] + rest["data"]
            assert len(together) == 70
            assert together[-1]["value"] == 100

    run(test())


# The fixture is meant to serve all examples: they only read.
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_pages_of_uneven_series_are_the_whole(uneven: "Uneven", data: st.DataObject) -> None:
    """Many series, of which some have very many readings: rounds of any size put the same pages together."""
    limit = data.draw(st.integers(1, 60))
    order = data.draw(st.sampled_from(["asc", "desc"]))
    pages = uneven.run(uneven.world.pages(order=order, limit=limit))
    found = [(reading["ts"], reading["metric"]) for page in pages for reading in page]
    assert len(found) == uneven.count
    assert len(set(found)) == uneven.count
    times = [ts for ts, _ in found]
    assert times == sorted(times, reverse=order == "desc")


class Uneven:
    """A world whose forty series have between none and 400 readings, kept for many examples."""

    def __init__(self, database: Database) -> None:
        self._runner = asyncio.Runner()
        self._context = world(database)
        self.world = self.run(self._context.__aenter__())
        self.count = self.run(self._fill())

    def run(self, work: Any) -> Any:
        return self._runner.run(work)

    def close(self) -> None:
        self.run(self._context.__aexit__(None, None, None))
        self._runner.close()

    async def _fill(self) -> int:
        count = 0
        connection = await connect(self.world.database.settings, role="sluice_worker", application="test")
        for number in range(40):
            series = await self.world.series(f"m{number:02}")
            size = 400 if number in (0, 39) else number % 5
            rows = [(series, 0, T0 + timedelta(seconds=60 * row + number), float(row)) for row in range(size)]
            await connection.copy_records_to_table("readings", records=rows)
            count += size
        await connection.close()
        return count


@pytest.fixture
def uneven(database: Database) -> Iterator[Uneven]:
    it = Uneven(database)
    yield it
    it.close()


def test_a_cursor_is_for_its_own_query_and_organisation(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            series = await it.series("a")
            for minute in range(3):
                await it.store(series, T0 + minute * MINUTE, minute)
            _, page, _ = await it.get(limit=1)
            cursor = page["next_cursor"]
            assert (await it.get(limit=2, cursor=cursor))[0] == 200
            for other in ({"order": "desc"}, {"metric": "a"}, {"from_": "0"}):
                status, body, _ = await it.get(cursor=cursor, **other)
                assert (status, body["code"]) == (400, "invalid_parameter")
                assert body["detail"].startswith("cursor: ")
            _, _, _, stranger = await tenant(any_database)
            assert (await it.get(cursor=cursor, key=stranger))[0] == 400
            for forged in ("", "AAAA", cursor[:-1], cursor + "A"):
                assert (await it.get(cursor=forged))[0] == 400

    run(test())


def test_limits_are_those_of_the_settings(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database, api_page_readings_default=2, api_page_readings_max=3) as it:
            series = await it.series("a")
            for minute in range(5):
                await it.store(series, T0 + minute * MINUTE, minute)
            assert len(await it.data()) == 2
            assert len(await it.data(limit=3)) == 3
            status, body, _ = await it.get(limit=4)
            assert status == 400
            assert "from 1 to 3" in body["detail"]

    run(test())


def test_series_are_listed_with_the_ids_by_which_they_may_be_asked(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            ids = {await it.series("b", "out"), await it.series("b"), await it.series("a")}
            found = await it.data("/series")
            assert [(one["metric"], one["label"]) for one in found] == [("a", ""), ("b", ""), ("b", "out")]
            assert {one["series_id"] for one in found} == ids
            assert {one["device_id"] for one in found} == {str(it.device)}
            for narrowed, number in (({"metric": "b"}, 2), ({"site_id": it.site, "device_id": None}, 3)):
                assert len(await it.data("/series", **narrowed)) == number
            await it.store(found[2]["series_id"], T0, 1)
            (reading,) = await it.data(device_id=None, series_id=found[2]["series_id"])
            assert (reading["metric"], reading["label"]) == ("b", "out")
            (series,) = await it.data("/series", device_id=None, series_id=found[1]["series_id"])
            assert series == found[1]
            _, _, others_device, _ = await tenant(any_database)
            assert (await it.get("/series", device_id=others_device))[0] == 404
            assert (await it.get("/series", metric="nosuch"))[1]["code"] == "metric_not_found"

    run(test())


# ---------------------------------------------------------------- who may see what


def test_only_the_organisation_of_the_key_is_seen(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            await it.store(await it.series("a"), T0, 1)
            _, _, others_device, others_key = await tenant(any_database)
            for path in ("", "/latest"):
                status, body, _ = await it.get(path, key=others_key)
                assert (status, body["code"]) == (404, "device_not_found")
                assert (await it.get(path, device_id=others_device))[0] == 404
                assert (await it.get(path, device_id=uuid7()))[0] == 404
            assert (await it.get(key=others_key, device_id=others_device))[1]["data"] == []

    run(test())


def test_a_site_that_is_being_erased_is_nobodys(any_database: Database) -> None:
    """From the moment on at which it is deleted, not once its readings are gone."""

    async def test() -> None:
        async with world(any_database) as it:
            await it.store(await it.series("a"), datetime.now(UTC) - HOUR, 1)
            span = {"from_": (datetime.now(UTC) - 2 * HOUR).isoformat(), "to": datetime.now(UTC).isoformat()}
            paths: dict[str, dict[str, str]] = {
                "": {}, "/latest": {}, "/series": {}, "/aggregated": span, "/stats": span,
            }  # fmt: skip
            for device in (None, it.device):
                for path, query in paths.items():
                    assert len(await it.data(path, device_id=device, site_id=it.site, **query)) == 1
            connection = await connect(any_database.settings, role="sluice_app", application="test")
            async with acting_for(connection, it.organisation):
                await begin_erasure(connection, it.site)
            await connection.close()
            for device in (None, it.device):
                for path, query in paths.items():
                    status, body, _ = await it.get(path, device_id=device, site_id=it.site, **query)
                    assert (status, body.get("code")) == (404, "site_not_found"), path

    run(test())


def test_a_key_ends_at_once_when_it_is_revoked_or_expires(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            assert (await it.get())[0] == 200
            connection = await connect(any_database.settings, role=None, application="test")
            async with acting_for(connection, it.organisation):
                credentials = Credentials(connection, TokenHasher(RING))
                past = await credentials.add_api_key(
                    it.organisation, ["owner"], expires_at=datetime.now(UTC) - timedelta(seconds=1)
                )
                reader = await credentials.add_api_key(it.organisation, ["readings:read"])
                nothing = await credentials.add_api_key(it.organisation, [])
                device_token = await credentials.add_device_token(it.organisation, it.device)
            assert (await it.get(key=past))[0] == 401
            assert (await it.get(key=reader))[0] == 200
            status, body, _ = await it.get(key=nothing)
            assert (status, body["code"]) == (403, "scope_missing")
            assert (await it.get(key=device_token))[0] == 401
            async with acting_for(connection, it.organisation):
                await connection.execute("UPDATE credentials SET revoked_at = now()")
            await connection.close()
            for key in (it.key, reader):
                status, body, headers = await it.get(key=key)
                assert (status, body["code"]) == (401, "token_invalid")
                assert headers["WWW-Authenticate"].startswith("Bearer")

    run(test())


def test_keys_hashed_under_an_older_secret_go_on(any_database: Database) -> None:
    async def test() -> None:
        organisation, _, device, key = await tenant(any_database)
        assert organisation
        pool = await open_pool(any_database.settings, role="sluice_app", application="test")
        async with pool.acquire() as connection, connection.transaction():
            sql = "SELECT organisation_id FROM authenticate_api_key($1)"
            assert await connection.fetchval(sql, TokenHasher(RING.rotated()).digests(key)) == organisation
            assert await connection.fetchval("SELECT count(*) FROM devices") == 1
        await pool.close()
        assert device

    run(test())


def test_without_an_organisation_nothing_is_seen(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            series = await it.series("a")
            await it.store(series, T0, 1)
            connection = await connect(any_database.settings, role="sluice_app", application="test")
            for table in ("organisations", "devices", "series", "credentials", "organisation_readings"):
                assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 0
            page = "SELECT count(*) FROM readings_page($1, '-infinity', 'infinity', false, '-infinity', 0, 0, 10)"
            assert await connection.fetchval(page, [series]) == 0
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.fetchval("SELECT count(*) FROM readings")
            await connection.close()

    run(test())


# ---------------------------------------------------------------- what goes wrong


def test_errors_have_one_shape_and_stable_codes(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            expected = [
                (it.session.get(f"{it.url}/api/v1/nothing"), 404, "not_found"),
                (it.session.post(f"{it.url}/api/v1/readings"), 405, "method_not_allowed"),
                (it.session.get(f"{it.url}/api/v1/readings"), 401, "auth_required"),
                (
                    it.session.get(
                        f"{it.url}/api/v1/readings",
                        headers={"Authorization": f"Bearer {make_token(API_KEY_PREFIX)}"},
                        params={"device_id": str(it.device)},
                    ),
                    401,
                    "token_invalid",
                ),
            ]
            for request, status, code in expected:
                async with request as answer:
                    body = await answer.json()
                    assert (answer.status, body["code"]) == (status, code)
                    assert body["request_id"] == answer.headers["X-Request-Id"]
                    assert set(body) == {"type", "title", "status", "detail", "code", "request_id"}
            status, body, _ = await it.get(device_id="fridge")
            assert (status, body["detail"]) == (400, "device_id: is not a UUID")
            for route, status, count in (("/api/v1/readings", 401, 2), ("unknown", 404, 1), ("unknown", 405, 1)):
                sample = {"route": route, "status": str(status)}
                assert it.registry.get_sample_value("sluice_api_requests_total", sample) == count

    run(test())


def test_what_was_refused_is_gone_without_being_looked_for(any_database: Database) -> None:
    """Garbage is looked for once there is much of it, and what a refused request held may be large."""

    async def test() -> None:
        async with world(any_database) as it:
            url, headers = f"{it.url}/api/v1/readings/batch", {"Authorization": f"Bearer {it.key}"}
            unknown = {"series_id": 2**31 - 1, "from": "2026-11-01T00:00:00Z", "to": "2026-11-02T00:00:00Z"}
            bodies = [(b'{"queries":', 400), (orjson.dumps({"queries": [unknown, unknown]}), 200)]
            await it.get()
            gc.collect()
            gc.disable()
            try:
                before = problems_held()
                for query in ({"limit": "x"}, {"cursor": "x"}, {"device_id": uuid7()}, {"site_id": uuid7()}):
                    assert (await it.get(**query))[0] >= 400
                for body, status in bodies:
                    async with it.session.post(url, data=body, headers=headers) as answer:
                        assert (answer.status, b"not_found" in await answer.read()) == (status, status == 200)
                assert problems_held() == before
            finally:
                gc.enable()

    run(test())


def problems_held() -> int:
    return sum(isinstance(one, Problem) for one in gc.get_objects())


def test_bad_http_is_refused_in_the_face_s_words_without_quoting_it(any_database: Database) -> None:
    key = make_token(API_KEY_PREFIX)
    bad, many = (400, "bad_request"), "X: y\r\n" * 100
    lines: list[tuple[str, tuple[int, str]]] = [
        (f"GET {{}}?key={key} HTTP/9.9", bad),
        (f"GET {{}} HTTP/1.1\r\nHost: x\r\nBad Header {key}: x", bad),
        ("GET {} HTTP/1.1\r\nHost: x\r\nHost: y", bad),
        (f"GET {{}}/{'x' * 20_000} HTTP/1.1\r\nHost: x", (414, "uri_too_long")),
        (f"GET {{}}?{'x' * 20_000} HTTP/1.1\r\nHost: x", (414, "uri_too_long")),
        (f"GET {{}} HTTP/1.1\r\nHost: x\r\nX-Long: {'x' * 20_000}", (431, "head_too_large")),
        (f"GET {{}} HTTP/1.1\r\nHost: x\r\n{many}", (431, "head_too_large")),
        ("BREW {} HTTP/1.1\r\nHost: x", (501, "not_implemented")),
        ("PROPFIND {} HTTP/1.1\r\nHost: x\r\nConnection: close", (405, "method_not_allowed")),
        ("GET {} HTTP/1.1\r\nHost: x\r\nExpect: wonders\r\nConnection: close", (417, "expectation_failed")),
    ]
    faces = {
        "/api/v1/readings": "application/problem+json",
        "/v1/devices": "application/json",
        f"/api/organisations/{uuid7()}/sites": "application/json",
    }

    async def test() -> None:
        async with world(any_database) as it:
            for path, kind in faces.items():
                for line, wanted in lines:
                    status, head, found = await _told(it, line.format(path).encode())
                    inner = found if kind == "application/problem+json" else found["error"]
                    assert (status, inner["code"]) == wanted, line[:40]
                    assert f"Content-Type: {kind}".encode() in head, line[:40]
                    assert (b"Allow: GET" in head) == (status == 405)
                    assert key not in json.dumps(found)
            for raw in (key.encode(), b"GET /\xff HTTP/1.1\r\nHost: x"):
                status, head, found = await _told(it, raw)
                assert (status, found["code"]) == bad
                assert b"Content-Type: application/problem+json" in head
            assert (await it.get())[0] == 200

    run(test())


async def _told(it: World, head: bytes) -> tuple[int, bytes, Any]:
    """Status, head and JSON of the answer to this head, sent in two pieces but where the first one is refused."""
    place = urlsplit(it.url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    whole = head + b"\r\n\r\n"
    first = len(whole) if head.startswith(b"BREW") else 9
    for piece in (whole[:first], whole[first:]):
        with contextlib.suppress(ConnectionError):
            writer.write(piece)
        await asyncio.sleep(0.001)
    answer, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return int(answer.split(b" ")[1]), answer, json.loads(body)


def test_a_request_keeps_the_good_id_that_it_came_with(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            for path in ("/api/v1/readings", "/v1/devices", "/nowhere"):
                for sent, is_kept in (("7d0c-1", True), ("a" * 64, True), ("a" * 65, False), ("a b", False),
                                      (it.key, False)):  # fmt: skip
                    async with it.session.get(f"{it.url}{path}", headers={"X-Request-Id": sent}) as answer:
                        assert (answer.headers["X-Request-Id"] == sent) == is_kept, sent[:10]
                        assert answer.headers["X-Request-Id"] in await answer.text()

    run(test())


def test_connections_are_bounded(database: Database) -> None:
    async def test() -> None:
        async with world(database) as it:
            place = urlsplit(it.url)
            held = [await asyncio.open_connection(place.hostname, place.port) for _ in range(CONNECTIONS_MAX)]
            reader, writer = await asyncio.open_connection(place.hostname, place.port)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            for _, one in [*held, (reader, writer)]:
                one.close()
                with contextlib.suppress(ConnectionError):
                    await one.wait_closed()

            async def is_let_in() -> bool:
                with contextlib.suppress(ClientError):  # the server may not have noticed yet that the others left
                    return (await it.session.get(it.url)).status == 404
                return False

            await until(is_let_in)

    run(test())


def test_a_database_that_goes_away_is_503_and_comes_back(database: Database) -> None:
    async def test() -> None:
        port = urlsplit(database.url).port or 0
        away = free_port()
        behind = replace(database, url=database.url.replace(f":{port}/", f":{away}/"))
        async with Proxy(away, port) as proxy, world(behind) as it:
            assert (await it.get())[0] == 200
            proxy.refuse = True
            proxy.cut()
            for _ in range(3):
                status, body, headers = await it.get()
                assert (status, body["code"]) == (503, "database_unavailable")
                assert 1 <= int(headers["Retry-After"]) <= 5
            proxy.refuse = False
            assert (await it.get())[0] == 200

    run(test())


def test_a_database_that_answers_nothing_is_503_after_a_bounded_wait(database: Database) -> None:
    """It is there, takes what it is sent, and says nothing: no statement of it ends, and no cancellation."""

    async def test() -> None:
        port = urlsplit(database.url).port or 0
        silent = free_port()
        behind = replace(database, url=database.url.replace(f":{port}/", f":{silent}/"))
        async with Proxy(silent, port) as proxy, world(behind, api_statement_timeout_ms=200) as it:
            assert (await it.get())[0] == 200
            proxy.set_mode(Mode.BLACKHOLE)
            status, body, headers = await it.get()
            assert (status, body["code"]) == (503, "database_unavailable")
            assert 1 <= int(headers["Retry-After"]) <= 5
            # Clients that give up leave no session behind that waits for what was lost.
            for _ in range(5):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await it.get()
            proxy.set_mode(Mode.PASS)
            while (await it.get())[0] != 200:  # noqa: ASYNC110 -- only a request tells
                await asyncio.sleep(0.1)

    run(test())


def test_readiness_tells_of_a_database_that_answers_nothing(database: Database) -> None:
    async def test() -> None:
        port = urlsplit(database.url).port or 0
        silent = free_port()
        behind = replace(database, url=database.url.replace(f":{port}/", f":{silent}/"))
        async with Proxy(silent, port) as proxy:
            pool = await open_pool(behind.settings, role="sluice_app", application="test", size_max=2)
            probe = Probe(pool)
            probing = asyncio.create_task(probe.run())
            proxy.set_mode(Mode.BLACKHOLE)
            while probe.check() is None:  # noqa: ASYNC110 -- only the probe knows
                await asyncio.sleep(0.1)
            proxy.set_mode(Mode.PASS)
            proxy.cut()
            while probe.check() is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)
            await pool.close()

    run(test())


def test_too_many_at_once_are_told_to_come_back(database: Database) -> None:
    async def test() -> None:
        async with world(database, api_connection_wait_ms=1_000) as it:
            locker = await asyncpg.connect(database.superuser_url)
            await locker.execute("BEGIN; LOCK TABLE credentials")
            held = [asyncio.create_task(it.get()) for _ in range(4)]
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'credentials'::regclass"
            while await locker.fetchval(waiting) < 4:  # noqa: ASYNC110 -- only the database knows
                await asyncio.sleep(0.01)
            status, body, headers = await it.get()
            assert (status, body["code"]) == (503, "overloaded")
            assert headers["Retry-After"]
            await locker.execute("COMMIT")
            await locker.close()
            assert [status for status, _, _ in await asyncio.gather(*held)] == [200] * 4

    run(test())


def test_one_organisation_leaves_sessions_to_others(database: Database) -> None:
    async def test() -> None:
        async with world(database, api_connection_wait_ms=5_000) as it:
            _, _, device, key = await tenant(database)
            locker = await asyncpg.connect(database.superuser_url)
            watcher = await asyncpg.connect(database.superuser_url)  # what a transaction sees of others stands still
            await locker.execute("BEGIN")
            await locker.execute("SELECT FROM devices WHERE device_id = $1 FOR UPDATE", it.device)
            headers = {"Authorization": f"Bearer {it.key}"}
            url = f"{it.url}/v1/devices/dev_{it.device.hex}"

            async def change() -> int:
                async with it.session.patch(url, json={"name": "New"}, headers=headers) as answer:
                    return answer.status

            held = [asyncio.create_task(change()) for _ in range(8)]
            waiting = (
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            while await watcher.fetchval(waiting) < 3:  # noqa: ASYNC110 -- only the database knows
                await asyncio.sleep(0.01)
            for _ in range(3):
                status, _, _ = await it.get(device_id=device, key=key)
                assert status == 200
            assert await watcher.fetchval(waiting) == 3
            await locker.execute("COMMIT")
            await locker.close()
            await watcher.close()
            assert await asyncio.gather(*held) == [200] * 8

    run(test())


# ---------------------------------------------------------------- plans


def test_a_page_reads_by_index_and_stops_when_it_is_full(any_database: Database) -> None:
    """Of a year in weekly chunks, a page touches only the rows it gives."""
    database = any_database

    async def test() -> int:
        async with world(database) as it:
            series = await it.series("a")
            admin = await asyncpg.connect(database.superuser_url)
            week = "SELECT ensure_week($1::timestamptz + n * interval '7 days') FROM generate_series(-52, 0) n"
            await admin.execute(week, T0)
            await admin.execute(
                "INSERT INTO readings SELECT $1, 0, $2::timestamptz + n * interval '1 hour', n"
                " FROM generate_series(0, 364 * 24) n",
                series,
                T0 - timedelta(days=364),
            )
            await admin.execute("ANALYZE readings")
            await admin.execute("SELECT pg_stat_reset()")
            await admin.close()
            assert len(await it.data(limit=10, order="desc")) == 10
            assert len(await it.data(limit=10)) == 10
            assert len(await it.data("/latest")) == 1
        # The sessions have ended, and with that told what they did.
        return await rows_read(database)

    assert run(test()) < 200


async def rows_read(database: Database) -> int:
    """Rows of readings that any plan fetched, by index or not, once the statistics have arrived."""
    admin = await asyncpg.connect(database.superuser_url)
    try:
        while True:
            row = await admin.fetchrow(
                "SELECT coalesce(sum(idx_tup_fetch), 0)::int AS by_index,"
                " coalesce(sum(seq_tup_read), 0)::int AS whole"
                " FROM pg_stat_all_tables WHERE relname ~ '^(_hyper_|readings_[0-9]|text_readings_)'"
            )
            assert row is not None
            if row["by_index"] or row["whole"]:
                return int(row["by_index"] + row["whole"])
            await asyncio.sleep(0.05)
    finally:
        await admin.close()


def test_options_and_head_and_pages_of_other_origins(any_database: Database) -> None:
    async def test() -> None:
        ours, other = "https://app.example.org", "https://elsewhere.example.org"
        async with world(any_database, origins=(ours,)) as it:
            url = f"{it.url}/api/v1/readings"
            asked = {"Access-Control-Request-Method": "GET"}
            async with it.session.options(url, headers={"Origin": ours} | asked) as answer:
                assert (answer.status, answer.headers["Allow"]) == (204, "GET, HEAD, OPTIONS")
                assert answer.headers["Access-Control-Allow-Origin"] == ours
                for name in ("Authorization", "X-Request-Id", "Idempotency-Key"):
                    assert name in answer.headers["Access-Control-Allow-Headers"]
                for name in ("X-Request-Id", "Idempotency-Replayed", "Location", "ETag"):
                    assert name in answer.headers["Access-Control-Expose-Headers"]
            async with it.session.options(url, headers={"Origin": other} | asked) as answer:
                assert answer.status == 204
                assert "Access-Control-Allow-Origin" not in answer.headers
            key = {"Authorization": f"Bearer {it.key}", "Origin": ours}
            for method, body in (("GET", True), ("HEAD", False)):
                async with it.session.request(method, url, params={"device_id": str(it.device)}, headers=key) as got:
                    assert (got.status, got.headers["Access-Control-Allow-Origin"]) == (200, ours)
                    assert (got.headers["Vary"], bool(await got.read())) == ("Accept, Origin", body)
            async with it.session.delete(url) as answer:
                assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
            async with it.session.options(f"{it.url}/api/v1/nothing") as answer:
                assert answer.status == 404

    run(test())
