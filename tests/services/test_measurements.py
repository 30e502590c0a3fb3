"""Measurements as the Devices face has them, on both databases."""

import csv
import io
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from api.devices.shapes import DeviceId
from api.registry import devices
from api.registry.devices import add_device
from api.registry.organisations import acting_for
from runtime.postgres import connect
from tests.databases import Database
from tests.services.test_api_aggregates import fill, let_go, roll_up, spelt
from tests.services.test_api_readings import World, world
from tests.support import run

T0 = datetime(2026, 11, 2, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
SPAN = {"from": T0.isoformat(), "to": (T0 + DAY).isoformat()}


class Face:
    """Requests to it."""

    def __init__(self, it: World) -> None:
        self._it = it
        self.device = str(DeviceId(UUID(str(it.device))))

    async def get(self, path: str, **query: Any) -> tuple[int, Any]:
        url, headers = f"{self._it.url}/v1{path}", {"Authorization": f"Bearer {self._it.key}"}
        sent = {name: str(value) for name, value in query.items()}
        async with self._it.session.get(url, params=sent, headers=headers) as answer:
            is_json = answer.content_type == "application/json"
            return answer.status, await answer.json() if is_json else await answer.text()

    async def pages(self, path: str, **query: Any) -> list[Any]:
        """The rows of all pages, in order."""
        rows: list[Any] = []
        cursor: dict[str, str] = {}
        while True:
            status, body = await self.get(path, **query, **cursor)
            assert status == 200, body
            assert body["has_more"] == (body["next_cursor"] is not None)
            rows += body["data"]
            if not body["has_more"]:
                return rows
            cursor = {"cursor": body["next_cursor"]}


def test_a_device_s_measurements_raw_and_by_the_bucket(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            face = Face(it)
            path = f"/devices/{face.device}/measurements"
            for metric in ("temperature", "humidity"):
                await fill(it, await it.series(metric, unit="°C"), T0, T0 + DAY)
            raw = await face.pages(path, type="temperature", limit=100, **SPAN)
            assert len(raw) == 288
            assert raw[0] == {
                "device_id": face.device, "type": "temperature", "label": "", "unit": "°C",
                "ts": "2026-11-02T00:00:00Z", "value": 1.0, "flags": [],
            }  # fmt: skip
            whole = await face.pages(path, agg="1h", fn="mean,count,last,p95", limit=5_000, **SPAN)
            assert len(whole) == 48
            assert {(row["mean"], row["count"], row["last"], row["p95"]) for row in whole} == {(1.0, 12, 1.0, 1.0)}
            await roll_up(it, T0 + DAY)
            for limit in (1, 5, 24, 47, 48):
                assert await face.pages(path, agg="1h", fn="mean,count,last,p95", limit=limit, **SPAN) == whole
            _, text = await face.get(path, agg="1d", fn="count", format="csv", **SPAN)
            assert [(row["type"], row["count"]) for row in csv.DictReader(io.StringIO(text))] == [
                ("humidity", "288"), ("temperature", "288"),
            ]  # fmt: skip
            status, body = await face.get(path, agg="1d", fn="count", **SPAN)
            assert (status, body["source"], body["tier"]) == (200, "rollups", "1d")

    run(test())


def test_channels_of_several_devices_in_one_call(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it, world(any_database) as other:
            face = Face(it)
            await fill(it, await it.series("temperature", "inside"), T0, T0 + DAY)
            await fill(it, await it.series("temperature"), T0, T0 + DAY)
            await fill(it, await it.series("power"), T0, T0 + DAY)
            both = f"{face.device}:temperature,{face.device}:power"
            rows = await face.pages("/measurements", channels=both, agg="1d", fn="count", **SPAN)
            assert [(row["type"], row["label"], row["count"]) for row in rows] == [
                ("temperature", "", 288), ("temperature", "inside", 288), ("power", "", 288),
            ]  # fmt: skip
            one = f"{face.device}:temperature:inside"
            rows = await face.pages("/measurements", channels=one, limit=200, **SPAN)
            assert [len(rows), {row["label"] for row in rows}] == [288, {"inside"}]
            rows = await face.pages("/measurements", channels=face.device, agg="1d", fn="count", **SPAN)
            assert len(rows) == 3
            for channels, status, code in (
                (",".join([one] * 33), 400, "invalid_parameter"),
                (f"{DeviceId(UUID(str(other.device)))}:power", 404, "device_not_found"),
                (f"{DeviceId(uuid4())}:power", 404, "device_not_found"),
                ("nonsense:power", 404, "device_not_found"),
            ):
                got, body = await face.get("/measurements", channels=channels, **SPAN)
                assert (got, body["error"]["code"]) == (status, code), channels
            for wrong in ({"agg": "7m"}, {"agg": "1h", "fn": "median"}, {"limit": 5_001}, {"cursor": "x"}):
                asked: dict[str, Any] = {"channels": one, **SPAN, **wrong}
                got, body = await face.get("/measurements", **asked)
                assert (got, body["error"]["code"]) == (400, "invalid_parameter"), wrong
            got, body = await face.get("/measurements", channels=one, agg="1h")
            assert (got, body["error"]["code"]) == (400, "invalid_parameter")

    run(test())


def test_what_a_removed_device_measured_is_still_told(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            face = Face(it)
            await fill(it, await it.series("power"), T0, T0 + DAY)
            connection = await connect(it.database.settings, role="sluice_app", application="test")
            async with acting_for(connection, it.organisation):
                await devices.remove(connection, it.device, None)
            path = f"/devices/{face.device}"
            assert (await face.get(path))[0] == 404
            for query in ({}, {"agg": "1h"}):
                status, body = await face.get(f"{path}/measurements", **SPAN, **query)
                assert (status, len(body["data"]) > 0, "removed_at" in body) == (200, True, True)
            removed_at = body["removed_at"]
            async with acting_for(connection, it.organisation):
                second = await add_device(connection, it.organisation, it.site, "Second", "second")
            await connection.close()
            await it.series("power", device=second)
            both = f"{face.device}:power,{DeviceId(UUID(str(second)))}:power"
            for query in ({}, {"agg": "1h"}):
                status, body = await face.get("/measurements", channels=face.device, **SPAN, **query)
                assert (status, body["removed_at"]) == (200, removed_at)
                assert body["removed_devices"] == {face.device: removed_at}
                status, body = await face.get("/measurements", channels=both, **SPAN, **query)
                assert (status, "removed_at" in body) == (200, False), "the other one stands"
                assert body["removed_devices"] == {face.device: removed_at}
            status, _ = await face.get("/measurements", channels=face.device, format="csv", **SPAN)
            assert status == 200

    run(test())


def test_what_is_gone_unknown_or_empty_is_said_in_the_face_s_shape(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as it:
            face = Face(it)
            await fill(it, await it.series("power"), T0, T0 + 6 * DAY)
            await roll_up(it, T0 + 6 * DAY)
            await let_go(it)
            path, channel = f"/devices/{face.device}/measurements", {"channels": f"{face.device}:power"}
            span = {"from": spelt(T0), "to": spelt(T0 + 4 * DAY)}
            for where, of in ((path, {}), ("/measurements", channel)):
                status, body = await face.get(where, agg="5m", fn="count", **of, **span)
                assert (status, body["told_from"], body["coarser"]) == (200, spelt(T0 + 3 * DAY), "1d")
                assert (len(body["data"]), body["data"][0]["ts"]) == (288, spelt(T0 + 3 * DAY))
                status, body = await face.get(where, **of, **span)
                assert (status, body["data"], body["kept_from"]) == (200, [], spelt(T0 + 5 * DAY))
                for query in ({}, {"agg": "1h"}):
                    status, body = await face.get(where, **of, **query, **{"from": spelt(T0), "to": spelt(T0)})
                    assert (status, body["error"]["code"]) == (400, "invalid_parameter")
                    assert "from: is the same as `to`" in body["error"]["message"]
            for where, of in ((path, {"type": "powre"}), ("/measurements", {"channels": f"{face.device}:powre"})):
                status, body = await face.get(where, **of, **span)
                assert (status, body["error"]["code"]) == (404, "metric_not_found")
                assert "no metric of this name" in body["error"]["message"]
            status, body = await face.get(path, agg="1h", fn="median", **span)
            assert (status, body["error"]["message"]) == (
                400, "fn: must be a list with commas of mean, min, max, count, last, p50, p95",
            )  # fmt: skip

    run(test())
