"""What readings come to, over HTTP and on both databases: buckets by a zone's clock, functions, fills, refusals."""

import asyncio
import csv
import io
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple
from uuid import uuid4
from zoneinfo import ZoneInfo

import asyncpg
import pytest

from api.http.problems import Problem
from api.readings.aggregation import Question
from api.readings.buckets import Bucket, edges_of, zone_of
from api.readings.functions import COLUMNS, FUNCTIONS
from api.registry.devices import add_device
from api.registry.organisations import acting_for
from api.registry.sites import add_site
from runtime.postgres import connect
from tests.databases import Database
from tests.landing_rig import until
from tests.services.test_api_readings import World, world
from tests.support import run

T0 = datetime(2026, 11, 2, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
EACH_5_MINUTES = """
INSERT INTO readings SELECT $1, 0, ts, 1
FROM generate_series($2::timestamptz, $3::timestamptz - interval '1 second', interval '5 minutes') ts"""
STAY = "INSERT INTO device_sites (device_id, site_id, organisation_id, valid_from) VALUES ($1, $2, $3, $4)"
GENERATION = "INSERT INTO log_generations (source, engine, identity, partitions) VALUES ($1, 'sqlite', 'x', 1)"
ROLL_UP = """
INSERT INTO rollups_{name} SELECT s.series_id, a.* FROM series s
CROSS JOIN LATERAL aggregate_{finer}(s.series_id, '2000-01-03', bucket_of('{width}', $1), '{width}') a
ON CONFLICT DO NOTHING"""
TIERS = (("5m", "readings", "5 minutes"), ("1h", "rollups_5m", "1 hour"), ("1d", "rollups_1h", "1 day"))


async def write(database: Database, sql: str, *values: object) -> Any:
    connection = await connect(database.settings, role="sluice_worker", application="test")
    try:
        return await connection.fetchval(sql, *values)
    finally:
        await connection.close()


async def landed(database: Database) -> None:
    """Something, somewhere: a log whose first records have landed."""
    connection = await asyncpg.connect(database.superuser_url)
    source = uuid4()
    await connection.execute(GENERATION, source)
    await connection.execute("INSERT INTO log_positions (source, partition, position) VALUES ($1, 0, 7)", source)
    await connection.close()


async def roll_up(it: World, through: datetime) -> None:
    """As a worker does, all at once."""
    await write(it.database, "SELECT ensure_rollups($1, $2)", datetime(2026, 1, 1, tzinfo=UTC), through)
    for name, finer, width in TIERS:
        await write(it.database, ROLL_UP.format(name=name, finer=finer, width=width), through)
    state = "UPDATE rollup_state SET closing_through = $1, computed_through = $1, landed_through = $1"
    await write(it.database, state, through)


async def fill(it: World, series: int, start: datetime, end: datetime) -> None:
    week = start
    while week < end + 7 * DAY:
        await write(it.database, "SELECT ensure_week($1)", week)
        week += 7 * DAY
    await write(it.database, EACH_5_MINUTES, series, start, end)


@pytest.mark.parametrize(
    ("zone", "day", "buckets", "longest"),
    [
        ("Europe/Prague", "2026-03-29", 23, 12),
        ("Europe/Prague", "2026-10-25", 25, 12),
        ("Europe/Prague", "2026-06-01", 24, 12),
        ("Australia/Lord_Howe", "2026-04-05", 24, 18),
        ("Australia/Lord_Howe", "2026-10-04", 24, 6),
    ],
)
@pytest.mark.parametrize("rolled", [False, True])
def test_a_local_day_has_its_own_hours(
    any_database: Database, zone: str, day: str, buckets: int, longest: int, rolled: bool
) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            midnight = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone))
            start, end = midnight.astimezone(UTC), (midnight + DAY).astimezone(UTC)
            await fill(it, await it.series("power"), start - DAY, end + DAY)
            if rolled:
                await roll_up(it, end + DAY)
            asked = {"from_": start.isoformat(), "to": end.isoformat(), "fn": "sum,count", "tz": zone}
            hours = await it.data("/aggregated", bucket="1h", **asked)
            assert len(hours) == buckets
            readings = (end - start) // (5 * MINUTE)
            assert sum(hour["sum"] for hour in hours) == readings
            assert sorted({hour["count"] for hour in hours}) == sorted({12, longest})
            (whole,) = await it.data("/aggregated", bucket="1d", **asked)
            assert (whole["count"], whole["bucket"]) == (readings, start.isoformat().replace("+00:00", "Z"))
            wide = {**asked, "from_": (start - DAY).isoformat(), "to": (end + DAY).isoformat()}
            assert [one["count"] for one in await it.data("/aggregated", bucket="1d", **wide)][1] == readings
            assert {one["sum"] for one in await it.data("/aggregated", bucket="15m", **wide)} == {3.0}

    run(test())


def test_edges_follow_the_clock_whatever_the_bucket() -> None:
    prague = zone_of("Europe/Prague")
    start, end = datetime(2026, 2, 10, 3, tzinfo=UTC), datetime(2026, 11, 20, tzinfo=UTC)
    for text in ("5m", "1h", "6h", "1d", "2d", "1w", "1mo", "3mo"):
        for zone in (UTC, prague):
            edges = edges_of(start, end, Bucket.parse(text), zone)
            assert edges[0] <= start < edges[1], (text, zone)
            assert edges[-2] < end <= edges[-1], (text, zone)
            assert all(one < other for one, other in pairwise(edges))
    weeks = edges_of(start, end, Bucket.parse("1w"), prague)
    assert {edge.astimezone(prague).strftime("%a %H:%M") for edge in weeks} == {"Mon 00:00"}
    quarters = edges_of(start, end, Bucket.parse("3mo"), UTC)
    assert [edge.month for edge in quarters] == [1, 4, 7, 10, 1]
    zones = (UTC, "1d"), (prague, "1h"), (zone_of("Australia/Lord_Howe"), "5m")
    for zone, tier in zones:
        assert Question(start, end, edges_of(start, end, Bucket.parse("1d"), zone), ("mean",)).tier == tier
    assert Question(start, end, edges_of(start, start + DAY, Bucket.parse("1m"), UTC), ("mean",)).tier is None
    assert Question(start, end, [start, end], ("mean",)).tier == "1d"
    with pytest.raises(Problem, match="must divide a day"):
        edges_of(start, end, Bucket.parse("7m"), prague)
    assert len(edges_of(start, start + HOUR, Bucket.parse("7m"), UTC)) in (10, 11)


def test_edges_where_a_midnight_or_a_date_is_skipped_or_comes_twice() -> None:
    def edges(zone: str, day: str, bucket: str, days: int = 1) -> list[str]:
        start = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone))
        made = edges_of(
            start.astimezone(UTC), (start + days * DAY).astimezone(UTC), Bucket.parse(bucket), zone_of(zone)
        )
        return [edge.astimezone(ZoneInfo(zone)).strftime("%d %H:%M") for edge in made]

    assert edges("Africa/Cairo", "2026-04-24", "12h") == ["24 01:00", "24 12:00", "25 00:00"]
    assert edges("Africa/Cairo", "2026-04-23", "12h", 2) == [
        "23 00:00",
        "23 12:00",
        "24 01:00",
        "24 12:00",
        "25 00:00",
    ]
    assert edges("Europe/Prague", "2026-03-29", "2h")[:3] == ["29 00:00", "29 03:00", "29 04:00"]
    assert edges("America/Havana", "2026-11-01", "6h") == ["01 00:00", "01 06:00", "01 12:00", "01 18:00", "02 00:00"]
    assert edges("Pacific/Apia", "2011-12-29", "1d", 3) == ["29 00:00", "31 00:00", "01 00:00"]


def test_each_function_of_a_bucket_and_each_way_to_fill_it(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            energy, state = await it.series("energy", unit="Wh"), await it.series("state")
            for minute, value in ((-10, 90), (10, 100), (40, 130), (70, 5), (200, 25), (400, 30)):
                await it.store(energy, T0 + minute * MINUTE, value)
                await it.store(state, T0 + minute * MINUTE, minute % 20 == 10)
            names = "count,sum,mean,min,max,first,last,delta,rate,time_weighted_mean,time_in_state,p50"
            asked = {"from_": T0.isoformat(), "to": (T0 + 4 * HOUR).isoformat(), "bucket": "1h", "fn": names}
            first, second, third = await it.data("/aggregated", metric="energy", **asked)
            plain = {
                "unit": "Wh", "count": 2, "sum": 230, "mean": 115, "min": 100, "max": 130, "first": 100, "last": 130,
            }  # fmt: skip
            assert {name: first[name] for name in plain} == plain
            assert (first["delta"], first["p50"], second["delta"], third["delta"]) == (40, 115, 5, 20)
            assert first["rate"] == pytest.approx(40 / 3_000)
            assert first["time_weighted_mean"] == pytest.approx((90 * 10 + 100 * 30 + 130 * 20) / 60)
            (of_state, *_) = await it.data("/aggregated", metric="state", **asked)
            assert of_state["time_in_state"] == 40 * 60
            buckets = {}
            for how in ("none", "null", "previous", "linear"):
                rows = await it.data("/aggregated", metric="energy", **{**asked, "fn": "last,count"}, fill=how)
                buckets[how] = [(row["last"], row["count"]) for row in rows]
            assert buckets == {
                "none": [(130, 2), (5, 1), (25, 1)],
                "null": [(130, 2), (5, 1), (None, 0), (25, 1)],
                "previous": [(130, 2), (5, 1), (5, 0), (25, 1)],
                "linear": [(130, 2), (5, 1), (15, 0), (25, 1)],
            }
            (stats,) = await it.data("/stats", metric="energy", from_=asked["from_"], to=asked["to"])
            assert (stats["count"], stats["delta"], stats["first_ts"]) == (4, 65, "2026-11-02T00:10:00Z")
            await roll_up(it, T0 + DAY)
            again = await it.data("/aggregated", metric="energy", **asked)
            assert again == [first, second, third]
            status, body, _ = await it.get("/aggregated", **{**asked, "fn": "mean,rate"})
            assert (status, body["source"], body["tier"], body["dirty"]) == (200, "rollups", "1h", False)
            assert body["complete_through"] == "2026-11-03T00:00:00Z"

    run(test())


def test_a_bucket_that_a_move_cuts_is_right_for_each_site(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            series = await it.series("energy")
            await fill(it, series, T0, T0 + DAY)
            moved = T0 + 10 * HOUR + 7 * MINUTE
            connection = await connect(it.database.settings, role="sluice_app", application="test")
            async with acting_for(connection, it.organisation):
                other = await add_site(connection, it.organisation, "Other")
                stay = (it.device, other, it.organisation, moved)
                await connection.execute(STAY, *stay)
            await connection.close()
            asked = {"from_": T0.isoformat(), "to": (T0 + DAY).isoformat(), "bucket": "1h", "fn": "count,last"}
            for _ in ("from readings", "from roll-ups"):
                counts = []
                for site in (it.site, other):
                    asked = {
                        "from_": T0.isoformat(),
                        "to": (T0 + DAY).isoformat(),
                        "bucket": "1h",
                        "fn": "count,last",
                    }
                    rows = await it.data("/aggregated", device_id=None, site_id=site, **asked)
                    counts.append({row["bucket"]: row["count"] for row in rows})
                cut = "2026-11-02T10:00:00Z"
                assert (len(counts[0]), counts[0][cut], len(counts[1]), counts[1][cut]) == (11, 2, 14, 10)
                assert sum(counts[0].values()) + sum(counts[1].values()) == 288
                await roll_up(it, T0 + DAY)

    run(test())


def test_a_function_says_the_same_alone_as_beside_the_others(any_database: Database) -> None:
    """Only what was asked for is worked out and sent. A bucket of two stays is put together from both."""

    async def test() -> None:
        async with world(any_database) as it:
            series = await it.series("energy")
            for number in range(60):
                await it.store(series, T0 + number * 5 * MINUTE, float(number * 7 % 31))
            connection = await connect(it.database.settings, role="sluice_app", application="test")
            async with acting_for(connection, it.organisation):
                other = await add_site(connection, it.organisation, "Other")
                for site, minutes in ((other, 67), (it.site, 88)):
                    await connection.execute(STAY, it.device, site, it.organisation, T0 + minutes * MINUTE)
            await connection.close()
            span = {"from_": T0.isoformat(), "to": (T0 + 6 * HOUR).isoformat(), "bucket": "1h"}
            asked = {"device_id": None, "site_id": it.site, **span}
            for _ in ("from readings", "from roll-ups"):
                together = await it.data("/aggregated", **asked, fn=",".join(FUNCTIONS))
                assert [row["count"] for row in together] == [12, 8, 12, 12, 12]
                for name in FUNCTIONS:
                    alone = await it.data("/aggregated", **asked, fn=name)
                    assert [row[name] for row in alone] == [row[name] for row in together], name
                await roll_up(it, T0 + DAY)

    run(test())


def test_what_a_question_takes_is_told_by_its_functions() -> None:
    def question(*functions: str) -> Question:
        return Question(T0, T0 + DAY, [T0, T0 + DAY], functions)

    assert (question("mean").level, question("mean").columns) == ("short", ("counts", "sums"))
    assert (question("p50").level, question("p50").columns) == ("short", ())
    assert question("rate", "last").columns == ("lasts", "deltas", "deltas_seconds")
    assert question("rate", "last").level == "stepped"
    assert question("count", "time_in_state").level == "whole"
    assert set(question(*FUNCTIONS).columns) == {*COLUMNS} - {"firsts_ts", "lasts_ts"}


def test_an_answer_that_is_known_is_not_made_again_until_it_changes(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            series = await it.series("power")
            await fill(it, series, T0, T0 + DAY)
            await roll_up(it, T0 + 2 * DAY)
            url = f"{it.url}/api/v1/readings/aggregated"
            query = {"series_id": str(series), "from": T0.isoformat(), "to": (T0 + DAY).isoformat(), "bucket": "1h"}
            headers = {"Authorization": f"Bearer {it.key}"}
            async with it.session.get(url, params=query, headers=headers) as answer:
                assert answer.status == 200
                version = answer.headers["ETag"]
                assert version.startswith('W/"'), "what it says of itself is not of its version"
                fresh = (await answer.json())["complete_through"]
            later = "UPDATE rollup_state SET landed_through = landed_through + interval '1 hour'"
            await write(it.database, later)
            known = headers | {"If-None-Match": version}
            async with it.session.get(url, params=query, headers=known) as answer:
                assert (answer.status, await answer.read()) == (304, b"")
                assert answer.headers["ETag"] == version
            async with it.session.get(url, params=query, headers=headers) as answer:
                assert (await answer.json())["complete_through"] > fresh
            mark = "INSERT INTO rollup_marks (series_id, first_bucket, last_bucket) VALUES ($1, $2, $2)"
            await write(it.database, mark, series, T0)
            await it.store(series, T0 + 1 * MINUTE, 50)
            async with it.session.get(url, params=query, headers=known) as answer:
                body = await answer.json()
                assert (answer.status, body["dirty"], body["source"]) == (200, True, "both")
            lasting = query | {"fn": "time_weighted_mean"}
            async with it.session.get(url, params=lasting, headers=headers) as answer:
                known = headers | {"If-None-Match": answer.headers["ETag"]}
            await landed(it.database)
            async with it.session.get(url, params=lasting, headers=known) as answer:
                assert answer.status == 200, "how long the last value stood is told by what lands later"
            await it.series("silent")
            empty = {"metric": "silent", "fill": "null", "from_": T0.isoformat(), "to": (T0 + DAY).isoformat()}
            assert [row["mean"] for row in await it.data("/aggregated", bucket="6h", **empty)] == [None] * 4
            async with it.session.get(url, params=query | {"format": "csv"}, headers=headers) as answer:
                rows = list(csv.DictReader(io.StringIO(await answer.text())))
                assert [float(row["mean"]) for row in rows] == [row["mean"] for row in body["data"]]
                assert answer.headers["Sluice-Source"] == "both"

    run(test())


async def status_of(it: World, path: str, tag: str = "", **query: Any) -> tuple[int, Any]:
    """Status and headers of what answers who has that tag."""
    headers = {"Authorization": f"Bearer {it.key}"} | ({"If-None-Match": tag} if tag else {})
    async with it.session.get(f"{it.url}/api/v1/readings{path}", params=query, headers=headers) as answer:
        assert bool(await answer.read()) == (answer.status == 200)
        return answer.status, answer.headers


def test_raw_answers_and_the_newest_are_not_sent_again_until_they_change(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            series, mode = await it.series("power"), await it.series("mode")
            await it.store(series, T0, 1)
            await it.store(series, T0 + 2 * MINUTE, 2)
            await it.store(mode, T0 + MINUTE, "on")
            await roll_up(it, T0 + 2 * DAY)
            device = {"device_id": str(it.device)}
            past = {**device, "from": T0.isoformat(), "to": (T0 + DAY).isoformat()}
            asked: list[tuple[str, dict[str, str]]] = [
                ("", past | {"limit": "1"}),
                ("", past | {"limit": "1", "order": "desc"}),
                ("", past | {"format": "csv"}),
                ("", past | {"format": "csv", "limit": "2"}),
                ("", past | {"format": "columns"}),
                ("/latest", past),
            ]
            present: list[tuple[str, dict[str, str]]] = [("", device), ("/latest", device)]
            tags: list[str] = []

            async def changed() -> list[bool]:
                statuses = [
                    (await status_of(it, path, tag, **query))[0]
                    for tag, (path, query) in zip(tags, asked + present, strict=True)
                ]
                assert set(statuses) <= {200, 304}
                tags[:] = [(await status_of(it, path, **query))[1]["ETag"] for path, query in asked + present]
                return [status == 200 for status in statuses]

            tags = [(await status_of(it, path, **query))[1]["ETag"] for path, query in asked + present]
            assert len(set(tags)) == len(tags)
            assert all(tag.startswith('W/"') for tag in tags), "a cursor is spelt anew each time"
            assert not any(await changed())
            await landed(it.database)
            assert await changed() == [False] * len(asked) + [True] * len(present)
            mark = "INSERT INTO rollup_marks (series_id, first_bucket, last_bucket) VALUES ($1, $2, $2)"
            for late in (series, mode):
                await it.store(late, T0 + 3 * MINUTE, 3 if late == series else "off")
                await write(it.database, mark, late, T0)
                assert all(await changed())
            await let_go(it)
            assert all(await changed())

    run(test())


def test_readings_that_are_kept_no_longer_are_not_told_while_they_still_stand(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            series = await it.series("power")
            horizon = T0 + 5 * DAY
            for time in (T0, horizon - MINUTE, horizon, horizon + MINUTE):
                await it.store(series, time, 1)
            await let_go(it)
            of_site: dict[str, Any] = {"device_id": None, "site_id": it.site}
            for asked in ({}, of_site):
                for span in ({"from_": T0.isoformat()}, {"from_": (horizon - HOUR).isoformat()}):
                    for query in ({}, {"limit": 1, "order": "desc"}):
                        rows = [row["ts"] for page in await it.pages(**asked, **span, **query) for row in page]
                        assert sorted(rows) == [spelt(horizon), spelt(horizon + MINUTE)]
                    status, body, _ = await it.get(**asked, **span)
                    assert (status, body["kept_from"]) == (200, spelt(horizon))
                    status, body, _ = await it.get(**asked, **span, format="columns")
                    assert [len(one["ts"]) for one in body["series"]] == [2]
                    assert body["kept_from"] == spelt(horizon)
                whole = {**asked, "from_": T0.isoformat(), "to": horizon.isoformat()}
                assert await it.data("/latest", **whole) == []
                status, body, _ = await it.get(**asked, from_=horizon.isoformat())
                assert (len(body["data"]), "kept_from" in body) == (2, False)

    run(test())


def test_an_empty_span_is_refused_everywhere(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            series = await it.series("power")
            empty = {"from_": T0.isoformat(), "to": T0.isoformat()}
            for path in ("", "/latest", "/aggregated", "/stats"):
                status, body, _ = await it.get(path, **empty)
                assert (status, body["code"]) == (400, "invalid_parameter"), path
                assert "from: is the same as `to`" in body["detail"]
            question = {"series_id": series, "from": T0.isoformat(), "to": (T0 + HOUR).isoformat()}
            refused, told = await batch(it, {**question, "to": T0.isoformat()}, question)
            assert (refused["status"], refused["error"]["code"], told["status"]) == (400, "invalid_parameter", 200)
            told, refused = await batch(it, question, {**question, "bucket": "90s"})
            assert (told["status"], refused["status"], refused["error"]["code"]) == (200, 400, "invalid_parameter")
            assert refused["error"]["message"].startswith("bucket: must be a number and m, h, d, w or mo"), refused

    run(test())


def test_what_cannot_be_asked_is_refused_in_words(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database, api_aggregate_cells_max=100, api_aggregate_readings_max=50) as it:
            await fill(it, await it.series("power"), T0, T0 + DAY)
            right = {"from_": T0.isoformat(), "to": (T0 + HOUR).isoformat()}
            for wrong, status, code, words in (
                ({"from_": None}, 400, "invalid_parameter", "from: is missing"),
                ({"to": None}, 400, "invalid_parameter", "to: is missing"),
                ({"to": T0.isoformat()}, 400, "invalid_parameter", "from: is the same as `to`"),
                ({"from_": "2027-01-01T00:00:00Z"}, 400, "invalid_parameter", "after"),
                ({"bucket": "0m"}, 400, "invalid_parameter", "bucket"),
                (
                    {"bucket": "90s"},
                    400,
                    "invalid_parameter",
                    "bucket: must be a number and m, h, d, w or mo: 1m, 5m",
                ),
                ({"bucket": "5 minutes"}, 400, "invalid_parameter", "bucket: must be a number and m, h, d, w or mo"),
                ({"fn": "MEAN"}, 400, "invalid_parameter", "fn: must be a list with commas of count, sum"),
                ({"tz": "Mars, Olympus"}, 400, "invalid_parameter", "tz: must be a time zone of the IANA database"),
                ({"metric": "powre"}, 404, "metric_not_found", "no metric of this name"),
                (
                    {"metric": "powre", "site_id": "$site", "device_id": None},
                    404,
                    "metric_not_found",
                    "no metric of this name",
                ),
                ({"bucket": "999999w"}, 400, "invalid_parameter", "bucket"),
                ({"bucket": "7m", "tz": "Europe/Prague"}, 400, "invalid_parameter", "must divide a day"),
                ({"tz": "Europe/Atlantis"}, 400, "invalid_parameter", "tz"),
                ({"tz": "localtime"}, 400, "invalid_parameter", "tz"),
                ({"from_": "0001-01-01T00:00:00Z"}, 400, "invalid_parameter", "1900"),
                ({"to": "9999-12-31T23:59:59.999999Z"}, 400, "invalid_parameter", "9000"),
                ({"tz": "../../etc/passwd"}, 400, "invalid_parameter", "tz"),
                ({"fn": "mean,median"}, 400, "invalid_parameter", "fn"),
                ({"fill": "zero"}, 400, "invalid_parameter", "fill"),
                ({"device_id": str(uuid4())}, 404, "device_not_found", ""),
                ({"device_id": None}, 400, "invalid_parameter", "device_id"),
                ({"series_id": 2**31 - 1}, 404, "series_not_found", ""),
                ({"to": "8999-12-31T00:00:00Z", "bucket": "1m"}, 422, "query_too_large", "buckets"),
                ({"bucket": "1m", "to": (T0 + 90 * 5 * MINUTE).isoformat()}, 422, "query_too_large", "buckets"),
                ({"fn": "p95", "to": (T0 + DAY).isoformat(), "bucket": "1d"}, 422, "query_too_large", "readings"),
            ):
                asked: dict[str, Any] = {**right, **wrong}
                if asked.get("site_id"):
                    asked["site_id"] = it.site
                got, body, _ = await it.get("/aggregated", **asked)
                assert (got, body["code"]) == (status, code), (wrong, body)
                assert words in body["detail"], body
                assert "regex" not in body["detail"], body

    run(test())


def test_what_may_still_be_sent_is_no_unknown_metric(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it, world(any_database) as other:
            span = {"from_": T0.isoformat(), "to": (T0 + HOUR).isoformat()}
            whole: tuple[tuple[str, dict[str, Any]], ...] = (
                ("/aggregated", span),
                ("/stats", span),
                ("", {}),
                ("/latest", {}),
            )
            for path, asked in whole:
                assert await it.data(path, metric="flux", **asked) == [], "nothing was sent yet"
            await it.series("power")
            await other.series("flux")
            for path, asked in whole:
                assert await it.data(path, metric="temperature", **asked) == [], "in the catalogue"
                status, body, _ = await it.get(path, metric="flux", **asked)
                assert (status, body["code"]) == (404, "metric_not_found"), path
            question = {"device_id": str(it.device), "from": span["from_"], "to": span["to"]}
            questions = [{**question, "metric": metric} for metric in ("flux", "power")]
            url, headers = f"{it.url}/api/v1/readings/batch", {"Authorization": f"Bearer {it.key}"}
            async with it.session.post(url, json={"queries": questions}, headers=headers) as answer:
                results = (await answer.json())["results"]
            assert [result["status"] for result in results] == [404, 200]
            assert results[0]["error"]["code"] == "metric_not_found"
            connection = await connect(it.database.settings, role="sluice_app", application="test")
            async with acting_for(connection, it.organisation):
                second = await add_device(connection, it.organisation, it.site, "Second", "second")
            await connection.close()
            await it.series("flux", device=second)
            for path, asked in whole:
                assert await it.data(path, metric="flux", **asked) == [], "another device has sent it"

    run(test())


def test_a_batch_answers_each_question_by_itself(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database, api_batch_questions_max=10, api_aggregate_cells_max=200) as it:
            power, heat = await it.series("power"), await it.series("temperature")
            await fill(it, power, T0, T0 + DAY)
            await fill(it, heat, T0, T0 + DAY)
            span = {"from": T0.isoformat(), "to": (T0 + DAY).isoformat()}
            questions: list[dict[str, Any]] = [
                {"ref": "a", "series_id": power, "bucket": "1h", "fn": "count", **span},
                {"device_id": str(it.device), "metric": "temperature", "bucket": "1h", "fn": "sum,last", **span},
                {"site_id": str(it.site), "bucket": "1d", "fn": "count", **span},
                {"device_id": str(uuid4()), **span},
                {"series_id": power, "bucket": "1m", **span},
                {"series_id": power, "fn": "bogus", **span},
                {"series_id": power, "fn": "A B", **span},
                {"series_id": power, "bucket": "1y", **span},
                {"series_id": power, "bucket": "soon", **span},
                {"series_id": power, "tz": "Mars/../X", **span},
            ]
            url, headers = f"{it.url}/api/v1/readings/batch", {"Authorization": f"Bearer {it.key}"}
            async with it.session.post(url, json={"queries": questions}, headers=headers) as answer:
                assert answer.status == 200
                results = (await answer.json())["results"]
            assert [result["status"] for result in results] == [200, 200, 200, 404, 422, *[400] * 5]
            assert (results[0]["ref"], results[1]["ref"]) == ("a", None)
            (counted,) = results[0]["series"]
            assert (counted["metric"], counted["count"]) == ("power", [12] * 24)
            assert counted["bucket"][0] == int(T0.timestamp()) * 10**6
            (summed,) = results[1]["series"]
            assert set(summed) == {"device_id", "metric", "label", "unit", "bucket", "sum", "last"}
            assert sorted(one["count"] for one in results[2]["series"]) == [[288], [288]]
            await roll_up(it, T0 + 2 * DAY)
            mark = "INSERT INTO rollup_marks (series_id, first_bucket, last_bucket) VALUES ($1, $2, $2)"
            await write(it.database, mark, heat, T0)
            async with it.session.post(url, json={"queries": questions[:2]}, headers=headers) as answer:
                told = (await answer.json())["results"]
            assert [(one["source"], one["dirty"]) for one in told] == [("rollups", False), ("both", True)]
            too_large = results[4]["error"]
            assert (too_large["code"], too_large["estimate"], too_large["most"]) == ("query_too_large", 1_442, 150)
            fits = {name: datetime.fromisoformat(at) for name, at in too_large["fits"].items()}
            assert fits == {"from": T0, "to": T0 + timedelta(minutes=148)}
            for wrong in ([], questions[:1] * 11, [{"series_id": power}], [{**questions[0], "bucket": 5}]):
                async with it.session.post(url, json={"queries": wrong}, headers=headers) as answer:
                    assert answer.status == 422, await answer.text()

    run(test())


def test_another_s_series_are_not_there(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it, world(any_database) as other:
            series = await other.series("power")
            await fill(other, series, T0, T0 + DAY)
            span = {"from_": T0.isoformat(), "to": (T0 + DAY).isoformat()}
            for path in ("/aggregated", "/stats"):
                for mine in ({"series_id": series}, {"device_id": other.device}, {"site_id": other.site}):
                    asked: dict[str, Any] = {"device_id": None, **span, **mine}
                    status, _, _ = await it.get(path, **asked)
                    assert status == 404

    run(test())


EACH_7_MINUTES = """
INSERT INTO readings SELECT $1, 0, ts, extract(epoch FROM ts - $2::timestamptz)::bigint % 100000
FROM generate_series($2::timestamptz, $3::timestamptz, interval '7 minutes') ts"""
TOLD = "count,sum,min,first,last,delta,rate,time_weighted_mean,time_in_state"
GONE = {"readings": ("raw", 5), "rollups_5m": ("5m", 3), "rollups_1h": ("1h", 1)}


async def let_go(it: World) -> None:
    """Horizons as retention leaves them: readings from day 5 on are kept, 5 minutes from day 3, hours from day 1."""
    connection = await asyncpg.connect(it.database.superuser_url)
    for tier, days in GONE.values():
        await connection.execute(
            "INSERT INTO retention_horizons VALUES ($1, $2, $3, $3, '-infinity', 1)",
            it.organisation,
            tier,
            T0 + days * DAY,
        )
    await connection.close()


async def delete_gone(it: World) -> None:
    connection = await asyncpg.connect(it.database.superuser_url)
    for table, (_, days) in GONE.items():
        time = "ts" if table == "readings" else "bucket"
        await connection.execute(f"DELETE FROM {table} WHERE {time} < $1", T0 + days * DAY)
    await connection.close()


def spelt(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


def alike(rows: list[Any], others: list[Any]) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row == {name: pytest.approx(value) if type(value) is float else value for name, value in other.items()}


#: Buckets, the span that is asked for, the span that is told once finer ones are gone, and which buckets would do.
CASES = (
    ("1d", 0 * DAY, 7 * DAY, 0 * DAY, 7 * DAY, None),
    ("1d", 3 * DAY + 13 * MINUTE, 7 * DAY, 3 * DAY + 15 * MINUTE, 7 * DAY, None),
    ("1d", 2 * DAY + 33 * MINUTE, 7 * DAY, 2 * DAY + HOUR, 7 * DAY, None),
    ("1d", 33 * MINUTE, 7 * DAY, 1 * DAY, 7 * DAY, None),
    ("1d", 0 * DAY, 2 * DAY + 12 * HOUR + 33 * MINUTE, 0 * DAY, 2 * DAY + 12 * HOUR, None),
    ("1d", 33 * MINUTE, 1 * DAY + 33 * MINUTE, 1 * DAY, 1 * DAY, None),
    ("1d", -1 * DAY, 12 * HOUR, -1 * DAY, 0 * DAY, None),
    ("1d", 1 * DAY, 3 * DAY + 12 * HOUR, 1 * DAY, 3 * DAY + 12 * HOUR, None),
    ("1w", 1 * DAY + 90 * MINUTE, 4 * DAY + 91 * MINUTE, 1 * DAY + 2 * HOUR, 4 * DAY + 90 * MINUTE, None),
    ("1h", 2 * DAY, 4 * DAY, 2 * DAY, 4 * DAY, None),
    ("1h", 2 * DAY + 33 * MINUTE, 2 * DAY + 99 * MINUTE, 2 * DAY + HOUR, 2 * DAY + HOUR, None),
    ("1h", 0 * DAY, 2 * DAY, 1 * DAY, 2 * DAY, "1d"),
    ("5m", 2 * DAY, 4 * DAY, 3 * DAY, 4 * DAY, "1h"),
    ("5m", 0 * DAY, 4 * DAY, 3 * DAY, 4 * DAY, "1d"),
    ("5m", 0 * DAY, 1 * DAY, 3 * DAY, 1 * DAY, "1d"),
    ("1m", 4 * DAY + 12 * HOUR, 5 * DAY + HOUR, 5 * DAY, 5 * DAY + HOUR, "5m"),
)


class Case(NamedTuple):
    """One of them."""

    bucket: str
    start: timedelta
    end: timedelta
    told_start: timedelta
    told_end: timedelta
    coarser: str | None

    @property
    def asked(self) -> dict[str, Any]:
        return {"bucket": self.bucket, "from": spelt(T0 + self.start), "to": spelt(T0 + self.end)}

    @property
    def head(self) -> dict[str, str | None]:
        return {
            "told_from": spelt(T0 + self.told_start) if self.told_start > self.start else None,
            "told_to": spelt(T0 + self.told_end) if max(self.told_start, self.told_end) < self.end else None,
            "coarser": self.coarser,
        }

    async def told(self, it: World) -> list[Any]:
        """Of the span that is told later."""
        span = {"from": spelt(T0 + self.told_start), "to": spelt(T0 + self.told_end)}
        if self.told_start >= self.told_end:
            return []
        return await it.data("/aggregated", **{**self.asked, **span}, fn=TOLD)


def test_coarser_roll_ups_tell_once_finer_ones_are_gone_and_answers_say_how_far(any_database: Database) -> None:
    """What is told then is the same as before, of the span that the answer names."""

    async def test() -> None:
        async with world(any_database) as it:
            series = await it.series("energy")
            await fill(it, series, T0 - DAY, T0 + 8 * DAY)
            await write(it.database, "DELETE FROM readings")
            # Of some, no finer tier has a later reading.
            ended = [
                (await it.series("energy", label), end)
                for label, end in (("m", 90 * HOUR), ("h", 62 * HOUR), ("d", 10 * HOUR))
            ]
            for one, end in ((series, 8 * DAY), *ended):
                await write(it.database, EACH_7_MINUTES, one, T0 - DAY, T0 + end)
            await roll_up(it, T0 + 7 * DAY)
            cases = [Case(*case) for case in CASES]
            before = [await case.told(it) for case in cases]
            await let_go(it)
            for _ in ("going", "gone"):
                for case, kept in zip(cases, before, strict=True):
                    await check(it, series, case, kept)
                await delete_gone(it)

    async def check(it: World, series: int, case: Case, kept: list[Any]) -> None:
        status, body, _ = await it.get("/aggregated", **case.asked, fn=TOLD)
        assert status == 200
        alike(body["data"], kept)
        (answer,) = await batch(it, {"series_id": series, **case.asked})
        for told in (body, answer):
            assert {name: told.get(name) for name in case.head} == case.head, case
        filled = await it.data("/aggregated", **case.asked, fn="count", fill="null")
        assert bool(filled) == bool(kept), "what nothing tells of is not filled"
        first = min([spelt(T0 + case.told_start), *(row["bucket"] for row in kept)])
        assert all(row["bucket"] >= first for row in filled), case
        assert sum(row["count"] for row in filled) == sum(row["count"] for row in kept)

    run(test())


async def batch(it: World, *questions: dict[str, Any]) -> list[Any]:
    url, headers = f"{it.url}/api/v1/readings/batch", {"Authorization": f"Bearer {it.key}"}
    async with it.session.post(url, json={"queries": questions}, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        results: list[Any] = (await answer.json())["results"]
        return results


def test_a_question_that_takes_too_long_takes_no_other_with_it(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database, api_statement_timeout_ms=500) as it:
            series = await it.series("power")
            await fill(it, series, T0, T0 + DAY)
            await roll_up(it, T0 + 2 * DAY)
            span = {"series_id": series, "from": T0.isoformat(), "to": (T0 + DAY).isoformat(), "fn": "count"}
            hours = {"bucket": "1h", **span}
            holder = await asyncpg.connect(it.database.superuser_url)
            async with holder.transaction():
                await holder.execute("LOCK TABLE rollups_1d IN ACCESS EXCLUSIVE MODE")
                late, told, later = await batch(it, {"bucket": "1d", **span}, hours, {"bucket": "2d", **span})
                assert (told["status"], told["series"][0]["count"]) == (200, [12] * 24)
                for one in (late, later):
                    assert (one["status"], one["error"]["code"]) == (503, "query_timeout")
                # What nobody waits for any more is not begun.
                days = [{"bucket": f"{number}d", **span} for number in range(1, 7)]
                results = await batch(it, *days, hours)
                assert {one["status"] for one in results} == {503}
                assert "before it" in results[-1]["error"]["message"]
            await holder.close()
            assert [one["status"] for one in await batch(it, *days, hours)] == [200] * 7

    run(test())


def test_a_question_that_fails_takes_no_other_with_it_and_a_lost_database_takes_all(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            series = await it.series("power")
            await fill(it, series, T0, T0 + DAY)
            await roll_up(it, T0 + 2 * DAY)
            span = {"series_id": series, "from": T0.isoformat(), "to": (T0 + DAY).isoformat(), "fn": "count"}
            questions = [{"bucket": bucket, **span} for bucket in ("1d", "1h")]
            holder = await asyncpg.connect(it.database.superuser_url)
            await holder.execute("ALTER FUNCTION short_of_rollups_1d RENAME TO missing")
            broken, told = await batch(it, *questions)
            assert (broken["status"], broken["error"]["code"], told["status"]) == (500, "internal_error", 200)
            await holder.execute("ALTER FUNCTION missing RENAME TO short_of_rollups_1d")
            url, headers = f"{it.url}/api/v1/readings/batch", {"Authorization": f"Bearer {it.key}"}
            async with holder.transaction():
                await holder.execute("LOCK TABLE rollups_1d IN ACCESS EXCLUSIVE MODE")
                async with asyncio.TaskGroup() as group:
                    asking = group.create_task(it.session.post(url, json={"queries": questions}, headers=headers))
                    await until(lambda: holder.fetchval(ENDED))
                answer = await asking
                body = await answer.json()
                assert (answer.status, body["code"]) == (503, "database_unavailable")
                assert int(answer.headers["Retry-After"]) > 0
            await holder.close()

    run(test())


#: Ends the session that waits for the lock, if there is one yet.
ENDED = """
SELECT bool_or(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock' AND usename = 'sluice'"""
