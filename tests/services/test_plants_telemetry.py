"""Telemetry of the Plants face over HTTP, on both databases."""

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from tests.certificate_rig import people_with_authority
from tests.databases import Database
from tests.people_rig import People
from tests.services.test_plants_face import error, made, worker_does
from tests.support import run

TELEMETRY = "/api/v1/telemetry"
SPAN = "from=2026-05-17T08:00:00Z&to=2026-05-17T10:00:00Z"
AT = datetime(2026, 5, 17, 8, tzinfo=UTC)


async def series(here: People, plant: str, metric: str, label: str = "", unit: str = "W") -> int:
    found: int = await worker_does(
        here,
        "INSERT INTO series (organisation_id, device_id, metric, label, unit) VALUES ($1, $2, $3, $4, $5)"
        " RETURNING series_id", here.organisation, UUID(plant), metric, label, unit,
    )  # fmt: skip
    return found


async def store(here: People, series_id: int, *readings: tuple[datetime, float]) -> None:
    for ts, value in readings:
        await worker_does(here, "SELECT ensure_week($1)", ts)
        await worker_does(here, "INSERT INTO readings VALUES ($1, 0, $2, $3)", series_id, ts, value)


def test_telemetry_by_the_bucket_is_what_the_platform_tells(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant = await made(here)
            power = await series(here, plant, "power", "L1")
            readings = [(AT + timedelta(minutes=minute), float(minute)) for minute in (0, 1, 2, 20, 61)]
            await store(here, power, *readings)
            await store(here, await series(here, plant, "voltage"), (AT, 230.0))
            url = f"{TELEMETRY}?plantId={plant}&metric=power&{SPAN}&bucket="
            found = await here.ask("GET", f"{url}15m", here.key)
            assert found.status == 200, found.body
            named = {"plantId": plant, "metric": "power", "label": "L1", "unit": "W"}
            assert found.body["data"] == [
                named | {"bucket": f"2026-05-17T{bucket}:00Z", "count": count, "mean": mean,
                         "min": low, "max": high, "last": high}
                for bucket, count, mean, low, high in (
                    ("08:00", 3, 1.0, 0.0, 2.0), ("08:15", 1, 20.0, 20.0, 20.0), ("09:00", 1, 61.0, 61.0, 61.0),
                )
            ]  # fmt: skip
            assert set(found.body) == {"data", "source", "tier", "completeThrough", "dirty"}
            of_platform = url.replace(TELEMETRY, "/api/v1/readings/aggregated").replace("plantId", "device_id")
            for bucket in ("1m", "5m", "15m", "1h", "1d"):
                found = await here.ask("GET", f"{url}{bucket}", here.key)
                other = await here.ask("GET", f"{of_platform}{bucket}&fn=count,mean,min,max,last", here.key)
                rows = [{"device_id": row.pop("plantId"), **row} for row in found.body["data"]]
                assert rows == other.body["data"]
            assert len((await here.ask("GET", url.removesuffix("&bucket="), here.key)).body["data"]) == 5
            every = f"{url.replace('&metric=power', '')}1d"
            both = await here.ask("GET", every, here.key)
            assert [row["metric"] for row in both.body["data"]] == ["power", "voltage"]
            tag = {"If-None-Match": both.headers["ETag"]}
            assert (await here.ask("GET", every, here.key, headers=tag)).status == 304

    run(test())


def test_the_newest_telemetry(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant = await made(here)
            await store(here, await series(here, plant, "power"), (AT, 1.0), (AT + timedelta(hours=1), 2.0))
            await store(here, await series(here, plant, "voltage"), (AT, 230.0))
            found = await here.ask("GET", f"{TELEMETRY}/latest?plantId={plant}", here.key)
            assert [(row["metric"], row["ts"], row["value"]) for row in found.body["data"]] == [
                ("power", "2026-05-17T09:00:00Z", 2.0), ("voltage", "2026-05-17T08:00:00Z", 230.0),
            ]  # fmt: skip
            assert set(found.body["data"][0]) == {"plantId", "metric", "label", "unit", "ts", "value", "flags"}
            one = await here.ask("GET", f"{TELEMETRY}/latest?plantId={plant}&metric=voltage", here.key)
            assert [row["metric"] for row in one.body["data"]] == ["voltage"]

    run(test())


def test_telemetry_that_cannot_be_told_of(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant = await made(here)
            await series(here, plant, "power")
            new = {"local_id": "one", "name": "One", "model": "diy_esp32"}
            device = (await here.ask("POST", "/v1/devices", here.key, new)).body["id"].removeprefix("dev_")
            for query, expected in (
                (f"plantId={uuid4()}&{SPAN}", (404, "PLANT_NOT_FOUND")),
                (f"plantId={device}&{SPAN}", (404, "PLANT_NOT_FOUND")),
                (f"plantId=x&{SPAN}", (400, "VALIDATION_ERROR")),
                (SPAN, (400, "VALIDATION_ERROR")),
                (f"plantId={plant}", (400, "VALIDATION_ERROR")),
                (f"plantId={plant}&from=2026-05-17T08:00:00Z&to=2026-05-17T08:00:00Z", (400, "VALIDATION_ERROR")),
                (f"plantId={plant}&{SPAN}&bucket=2h", (400, "VALIDATION_ERROR")),
                (f"plantId={plant}&{SPAN}&metric=nosuch", (404, "METRIC_NOT_FOUND")),
                (f"plantId={plant}&bucket=1m&{SPAN.replace('2026', '1990', 1)}", (422, "QUERY_TOO_LARGE")),
            ):  # fmt: skip
                assert error(await here.ask("GET", f"{TELEMETRY}?{query}", here.key)) == expected, query

    run(test())
