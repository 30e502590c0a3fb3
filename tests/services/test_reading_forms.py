"""Readings in every form, on both databases: the same whichever is asked for, whole spans, and what bounds them."""

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

import asyncpg
import pyarrow as pa
import pytest

from bench.proxy import Proxy
from bench.usage import free_port
from runtime.http.server import HttpSettings
from runtime.postgres import connect
from schemas.record import Quality
from tests.databases import Database
from tests.services.test_api_readings import MINUTE, T0, World, tenant, world
from tests.support import run

HOUR: Final = timedelta(hours=1)
SECOND: Final = timedelta(seconds=1)
TYPES: Final = {
    "json": "application/json",
    "columns": "application/vnd.sluice.columns+json",
    "csv": "text/csv",
    "ndjson": "application/x-ndjson",
    "arrow": "application/vnd.apache.arrow.stream",
}
#: Series, time, value, flags.
Reading = tuple[int, datetime, float | str, int]
#: Device, metric, label, unit, time, type of the value, value, flags.
Row = tuple[str, str, str, str, datetime, str, object, tuple[str, ...]]


async def fetch(it: World, headers: dict[str, str] | None = None, **query: Any) -> tuple[int, Any, bytes]:
    """Status, headers and body, whatever form it has."""
    parameters = {"device_id": it.device} | {name.rstrip("_"): value for name, value in query.items()}
    sent = {name: str(value) for name, value in parameters.items() if value is not None}
    key = {"Authorization": f"Bearer {it.key}"}
    async with it.session.get(f"{it.url}/api/v1/readings", params=sent, headers=key | (headers or {})) as answer:
        return answer.status, answer.headers, await answer.read()


async def body(it: World, form: str, **query: Any) -> bytes:
    status, headers, raw = await fetch(it, format=form, **query)
    assert status == 200, raw
    assert headers["Content-Type"].startswith(TYPES[form])
    return raw


async def rows(it: World, form: str, **query: Any) -> list[Row]:
    return READ[form](await body(it, form, **query))


# ---------------------------------------------------------------- each form, read by what everybody reads it with


def _row(one: dict[str, Any], ts: datetime, value: object, flags: Sequence[str]) -> Row:
    return (one["device_id"], one["metric"], one["label"], one["unit"], ts, type(value).__name__, value, tuple(flags))


def read_json(raw: bytes) -> list[Row]:
    return [_read_object(one) for one in json.loads(raw)["data"]]


def read_ndjson(raw: bytes) -> list[Row]:
    return [_read_object(json.loads(line)) for line in raw.splitlines()]


def _read_object(one: dict[str, Any]) -> Row:
    assert list(one) == ["device_id", "metric", "label", "unit", "ts", "value", "flags"]
    return _row(one, datetime.fromisoformat(one["ts"]), one["value"], one["flags"])


def read_columns(raw: bytes) -> list[Row]:
    found = []
    for one in json.loads(raw)["series"]:
        flags = one["flags"] or [[]] * len(one["ts"])
        for ts, value, names in zip(one["ts"], one["value"], flags, strict=True):
            found.append(_row(one, datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=ts), value, names))
    return found


def read_csv(raw: bytes) -> list[Row]:
    assert raw.endswith(b"\r\n")
    found = []
    for one in csv.DictReader(io.StringIO(raw.decode(), newline="")):
        plain = {name: text.removeprefix("'") for name, text in one.items()}
        flags = one["flags"].split()
        value: object = plain["value_text"]
        if one["value"]:
            value = json.loads(one["value"])
        found.append(_row(plain, datetime.fromisoformat(one["ts"]), value, flags))
    return found


def read_arrow(raw: bytes) -> list[Row]:
    with pa.ipc.open_stream(raw) as stream:
        table = stream.read_all()
    assert table.schema.field("ts").type == pa.timestamp("us", "UTC")
    assert pa.types.is_dictionary(table.schema.field("device_id").type)
    found = []
    for one in table.to_pylist():
        value = one["value"] if one["value_text"] is None else one["value_text"]
        if "boolean" in one["flags"]:
            value = bool(value)
        if "integer" in one["flags"]:
            value = int(value)
        found.append(_row(one, one["ts"], value, one["flags"]))
    return found


READ: Final[dict[str, Callable[[bytes], list[Row]]]] = {
    "json": read_json,
    "columns": read_columns,
    "csv": read_csv,
    "ndjson": read_ndjson,
    "arrow": read_arrow,
}


# ---------------------------------------------------------------- the same in every form

TEXTS: Final = ("", "21.5", "true", "=1+1", "'quoted", "-", "@x", 'he, "said"\r\nü', "\tx", "+1", "null")
INTEGERS: Final = ("9007199254740993", "-123456789012345678901234567890", "1" * 300)


async def fill_hour(it: World) -> int:
    """Every kind of value, unit, label and flag; a text and a number at one time. How many readings it is."""
    numbers = await it.series("temperature", "=HYPERLINK(1)", "°C")
    readings: list[Reading] = [(numbers, T0 + n * MINUTE + timedelta(microseconds=n), n / 7, 0) for n in range(60)]
    for minute, value in enumerate((-0.0, 1e300, 5e-324, 2.0**53, -1.5)):
        readings.append((await it.series("extreme", str(minute), '"%"'), T0 + minute * MINUTE, value, 0))
    leak = await it.series("leak")
    readings += [(leak, T0 + minute * MINUTE, float(minute % 2), Quality.BOOLEAN) for minute in range(20)]
    mode = await it.series("mode", "a,b")
    for minute, text in enumerate(TEXTS):
        readings.append((mode, T0 + minute * MINUTE, text, Quality.TIME_STAMPED if minute % 2 else 0))
    flags = Quality.UNIT_CONVERTED | Quality.TIME_REPLACED
    readings += [(mode, T0 + minute * MINUTE, float(minute), flags) for minute in range(0, 20, 3)]
    energy = await it.series("energy", unit="Wh")
    for minute, text in enumerate(INTEGERS):
        readings.append((energy, T0 + minute * MINUTE, text, Quality.INTEGER))
    before, after = T0 - timedelta(microseconds=1), T0 + HOUR
    await store(it, [*readings, (energy, before, 1.0, 0), (energy, after, 1.0, 0)])
    return len(readings)


async def store(it: World, readings: Sequence[Reading]) -> None:
    worker = await connect(it.database.settings, role="sluice_worker", application="fill")
    for week in {ts.date() for _, ts, _, _ in readings}:
        await worker.execute("SELECT ensure_week($1)", datetime.combine(week, time(), UTC))
    for table, kind in (("readings", float), ("text_readings", str)):
        records = [(series, int(flags), ts, value) for series, ts, value, flags in readings if type(value) is kind]
        await worker.copy_records_to_table(table, records=records)
    await worker.close()


def _order(row: Row) -> Any:
    return (*row[:5], row[5] == "str" or "integer" in row[7])


@pytest.mark.parametrize("block", [1, 7, 10_000])
def test_an_hours_readings_are_equal_in_every_form(any_database: Database, block: int) -> None:
    async def test() -> None:
        async with world(any_database, api_stream_block_readings=block) as it:
            count = await fill_hour(it)
            hour = {"from_": T0.isoformat(), "to": (T0 + HOUR).isoformat()}
            expected = sorted(await rows(it, "json", limit=1_000, **hour), key=_order)
            assert len(expected) == count
            assert {row[5] for row in expected} == {"float", "bool", "int", "str"}
            assert {row[6] for row in expected if row[5] == "int"} == {int(text) for text in INTEGERS}
            assert {row[6] for row in expected if row[5] == "str"} == set(TEXTS)
            for form in TYPES:
                limits = (1_000,) if form == "json" else (None, 1_000)
                for limit in limits:
                    assert sorted(await rows(it, form, limit=limit, **hour), key=_order) == expected, (form, limit)

    run(test())


def test_a_spreadsheet_finds_no_formula(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            await fill_hour(it)
            raw = await body(it, "csv")
            assert raw.startswith(b"device_id,metric,label,unit,ts,value,value_text,flags\r\n")
            for one in csv.DictReader(io.StringIO(raw.decode(), newline="")):
                for name in set(one) - {"value"}:
                    assert one[name][:1] not in tuple("=+-@\t\r"), one
                assert one["value"] in {"", "true", "false"} or float(one["value"]) is not None

    run(test())


def test_a_form_that_is_empty_is_whole(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            for metric in ("a", "b"):
                for form in TYPES:
                    assert await rows(it, form) == [], form
                await it.series(metric)
            assert json.loads(await body(it, "columns")) == {"series": [], "next_cursor": None}
            assert (await body(it, "csv")).count(b"\r\n") == 1

    run(test())


def test_the_newest_come_in_every_form(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            await fill_hour(it)
            found = []
            for form in TYPES:
                url = f"{it.url}/api/v1/readings/latest?" + urlencode({"device_id": it.device, "format": form})
                async with it.session.get(url, headers={"Authorization": f"Bearer {it.key}"}) as answer:
                    assert answer.status == 200
                    found.append(sorted(READ[form](await answer.read()), key=_order))
            assert len(found[0]) == 9
            assert all(one == found[0] for one in found)

    run(test())


# ---------------------------------------------------------------- order, pages


def test_streams_go_series_by_series_in_order_of_time(any_database: Database) -> None:
    """Whatever a block holds: series longer than it, shorter, and none at all."""

    async def test() -> None:
        async with world(any_database, api_stream_block_readings=16) as it:
            sizes = [1, 0, 16, 100, 3, 3, 3, 0, 17, 1] * 4
            for number, size in enumerate(sizes):
                series = await it.series(f"m{number:02}")
                await store(it, [(series, T0 + row * SECOND, float(row), 0) for row in range(size)])
            expected = [(f"m{number:02}", float(row)) for number, size in enumerate(sizes) for row in range(size)]
            assert [(row[1], row[6]) for row in await rows(it, "ndjson")] == expected
            backwards = sorted(sorted(expected, reverse=True), key=lambda one: one[0])
            assert [(row[1], row[6]) for row in await rows(it, "ndjson", order="desc")] == backwards
            entries = json.loads(await body(it, "columns", metric="m03"))["series"]
            assert [len(one["ts"]) for one in entries] == [16, 16, 16, 16, 16, 16, 4]

    run(test())


def test_a_limit_makes_pages_of_any_form(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            count = await fill_hour(it)
            for form in TYPES:
                found: list[Row] = []
                cursor = None
                while True:
                    status, headers, raw = await fetch(it, format=form, limit=40, cursor=cursor)
                    assert status == 200
                    found += READ[form](raw)
                    in_body = json.loads(raw)["next_cursor"] if form in {"json", "columns"} else None
                    cursor = headers.get("Sluice-Next-Cursor", in_body)
                    assert ("Sluice-Next-Cursor" in headers) <= (form not in {"json", "columns"})
                    if cursor is None:
                        break
                assert len(found) == len(set(found)) == count + 2, form
            _, page, _ = await it.get(limit=1)
            status, _, raw = await fetch(it, format="csv", cursor=page["next_cursor"])
            assert (status, json.loads(raw)["detail"][:8]) == (400, "cursor: ")

    run(test())


def test_a_sites_stream_is_of_the_stays(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database, api_stream_block_readings=4) as it:
            series = await it.series("a")
            await store(it, [(series, T0 + minute * MINUTE, float(minute), 0) for minute in range(60)])
            admin = await asyncpg.connect(any_database.superuser_url)
            await admin.execute("DELETE FROM device_sites WHERE device_id = $1", it.device)
            names = "device_id, organisation_id, site_id, valid_from"
            stays = [(it.site, 10), (None, 20), (it.site, 40), (None, 55)]
            for site, minute in stays:
                stay = it.device, it.organisation, site, T0 + minute * MINUTE
                await admin.execute(f"INSERT INTO device_sites ({names}) VALUES ($1, $2, $3, $4)", *stay)
            await admin.close()
            expected = [*range(10, 20), *range(40, 55)]
            for order, wanted in (("asc", expected), ("desc", expected[::-1])):
                found = await rows(it, "arrow", device_id=None, site_id=it.site, order=order)
                assert [row[6] for row in found] == wanted

    run(test())


# ---------------------------------------------------------------- which form


def test_the_form_follows_accept_unless_it_is_named(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            await it.store(await it.series("a"), T0, 1)
            for form, kind in TYPES.items():
                for accept in (kind, f"{kind};q=0.9, text/html;q=0.1", f"text/html, {kind}"):
                    status, headers, _ = await fetch(it, {"Accept": accept})
                    assert (status, headers["Content-Type"].partition(";")[0]) == (200, kind)
                    assert headers["Vary"].startswith("Accept")
                _, headers, _ = await fetch(it, {"Accept": "text/html"}, format=form)
                assert headers["Content-Type"].startswith(kind)
            for accept in ("*/*", "application/*", "text/html, */*;q=0.1"):
                assert (await fetch(it, {"Accept": accept}))[1]["Content-Type"] == "application/json"
            assert (await fetch(it, {"Accept": "text/csv"}))[1]["Content-Type"].endswith("; header=present")
            status, headers, raw = await fetch(it, {"Accept": "text/html, image/*"})
            assert (status, json.loads(raw)["code"]) == (406, "not_acceptable")
            assert all(kind in json.loads(raw)["detail"] for kind in TYPES.values())
            assert (await fetch(it, format="xml"))[0] == 400

    run(test())


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("rolled", [False, True])
def test_what_is_too_long_is_refused_with_a_span_that_would_do(any_database: Database, *, rolled: bool) -> None:
    async def test() -> None:
        async with world(any_database, api_stream_readings_max=100) as it:
            dense, sparse, text = [await it.series(metric) for metric in ("dense", "sparse", "text")]
            readings: list[Reading] = [(dense, T0 + minute * MINUTE, float(minute), 0) for minute in range(150)]
            for minute in range(0, 150, 50):
                readings += [(sparse, T0 + minute * MINUTE, 1.0, 0), (text, T0 + minute * MINUTE, "text", 0)]
            await store(it, readings)
            if rolled:
                await _roll_up(any_database, dense, 5_000)
            status, _, raw = await fetch(it, format="csv", from_=T0.isoformat())
            problem = json.loads(raw)
            assert (status, problem["code"], problem["readings_max"]) == (422, "query_too_large", 100)
            assert problem["estimate"] == (5_000 if rolled else 101)
            assert problem["fits"]["to"] in problem["detail"]
            found = await rows(it, "csv", from_=problem["fits"]["from"], to=problem["fits"]["to"])
            assert 30 <= len(found) <= 100
            # What an hour has is known from the readings themselves.
            within = await rows(it, "csv", from_=T0.isoformat(), to=(T0 + HOUR).isoformat())
            assert len(within) == 60 + 2 + 2
            assert "from" not in json.loads((await fetch(it, format="csv"))[2])["fits"]
            assert len(await rows(it, "csv", limit=100)) == 100
            assert (await fetch(it))[0] == 200

    run(test())


async def _roll_up(database: Database, series: int, count: int) -> None:
    admin = await asyncpg.connect(database.superuser_url)
    await admin.execute("SELECT ensure_rollups($1, $2)", T0, T0 + timedelta(days=1))
    await admin.execute("INSERT INTO rollups_1d SELECT $1, $2, $3, 0, 0, 0, 0, $2, 0, $2, 0, 0, 0", series, T0, count)
    await admin.close()


def test_no_other_organisation_is_read_or_counted(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            series = await it.series("a")
            await it.store(series, T0, 1)
            await it.store(series, T0, "text")
            stranger, _, _, _ = await tenant(any_database)
            connection = await connect(any_database.settings, role="sluice_app", application="test")
            span = [series], [T0], [T0 + HOUR]
            for organisation, expected in ((None, 0), (stranger, 0), (it.organisation, 1)):
                async with connection.transaction():
                    acting = "" if organisation is None else str(organisation)
                    await connection.execute("SELECT set_config('sluice.organisation', $1, true)", acting)
                    blocks = await connection.fetch("SELECT * FROM readings_blocks($1, $2, $3, false, 10)", *span)
                    assert len(blocks) == expected
                    sql = "SELECT readings FROM readings_estimated($1, $2, $3, 10)"
                    assert await connection.fetchval(sql, *span) == 2 * expected
            await connection.close()

    run(test())


ROWS: Final = 150_000


@asynccontextmanager
async def stalled(database: Database, **settings: Any) -> AsyncIterator[tuple[World, asyncio.StreamReader]]:
    """A stream that is far larger than what lies between the server and a client that has read its head."""
    async with world(database, api_stream_block_readings=1_000, api_streams_per_organisation_max=1, **settings) as it:
        series = await it.series("a" * 200)
        admin = await asyncpg.connect(database.superuser_url)
        await admin.execute(
            "SELECT ensure_week($1::timestamptz + n * interval '7 days') FROM generate_series(0, 1) n", T0
        )
        seconds = "FROM generate_series(1, $3::int) n"
        sql = f"INSERT INTO readings SELECT $1, 0, $2::timestamptz + n * interval '1 second', n {seconds}"
        await admin.execute(sql, series, T0, ROWS)
        await admin.close()
        place = urlsplit(it.url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1_024)
        query = urlencode({"device_id": it.device, "format": "ndjson"})
        head = f"GET /api/v1/readings?{query} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {it.key}\r\n\r\n"
        writer.write(head.encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        try:
            yield it, reader
        finally:
            writer.transport.abort()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What still comes, to its end or to where it is cut."""
    found = bytearray()
    try:
        while chunk := await reader.read(65_536):
            found += chunk
    except ConnectionError:
        pass
    return bytes(found)


def test_while_a_client_reads_nothing_of_the_database_is_held(any_database: Database) -> None:
    """And nobody of its organisation begins another stream beyond those it may have."""

    async def test() -> None:
        async with stalled(any_database) as (it, reader):
            admin = await asyncpg.connect(any_database.superuser_url)
            busy = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'test' AND state <> 'idle'"
            quiet = 0
            while quiet < 10:
                quiet = 0 if await admin.fetchval(busy) else quiet + 1
                await asyncio.sleep(0.02)
            await admin.close()
            status, headers, raw = await fetch(it, format="csv")
            assert (status, json.loads(raw)["code"], headers["Retry-After"]) == (429, "rate_limited", "5")
            assert (await fetch(it))[0] == 200
            whole = await rest_of_chunked(reader)
            assert whole.count(b"\n") == ROWS
            assert (await fetch(it, format="csv", to=T0.isoformat()))[0] == 200

    run(test())


async def rest_of_chunked(reader: asyncio.StreamReader) -> bytes:
    while await reader.readline() != b"\r\n":
        pass
    found = bytearray()
    while size := int(await reader.readline(), 16):
        found += (await reader.readexactly(size + 2))[:-2]
    return bytes(found)


def test_a_client_that_stops_reading_is_cut_and_its_stream_is_free(any_database: Database) -> None:
    async def test() -> None:
        async with stalled(any_database, http=HttpSettings(http_unread_timeout_s=0.3)) as (it, reader):
            while (await fetch(it, format="csv", to=T0.isoformat()))[0] == 429:  # noqa: ASYNC110 -- only the server knows
                await asyncio.sleep(0.05)
            assert not (await rest(reader)).endswith(b"0\r\n\r\n")

    run(test())


def test_a_database_that_goes_away_breaks_a_stream_off(database: Database) -> None:
    async def test() -> None:
        port = urlsplit(database.url).port or 0
        away = free_port()
        behind = replace(database, url=database.url.replace(f":{port}/", f":{away}/"))
        async with Proxy(away, port) as proxy, stalled(behind) as (it, reader):
            proxy.refuse = True
            proxy.cut()
            assert not (await rest(reader)).endswith(b"0\r\n\r\n")
            proxy.refuse = False
            assert (await fetch(it, format="csv", to=T0.isoformat()))[0] == 200

    run(test())


def test_the_head_alone_leaves_no_stream_behind(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database, api_streams_per_organisation_max=1) as it:
            await it.store(await it.series("a"), T0, 1)
            url = f"{it.url}/api/v1/readings"
            key = {"Authorization": f"Bearer {it.key}", "Accept": "text/csv"}
            for _ in range(3):
                async with it.session.head(url, params={"device_id": str(it.device)}, headers=key) as answer:
                    assert answer.status == 200
                assert len(await rows(it, "csv")) == 1

    run(test())
