"""The bridge, of devices that their topics call as their sites do: what Shelly and Tasmota publish, and the tray."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from prometheus_client import CollectorRegistry

from api import quarantine
from api.registry import site_brokers, unassigned
from api.registry.broker_passwords import Handovers
from ingest.http.compose import make_replayer
from ingest.metrics import IngestMetrics
from ingest.mqtt.topics import FAMILIES, Kind, Router
from ingest.settings import IngestSettings, ReplaySettings
from runtime.clock import SystemClock
from runtime.notifications import Notifications
from runtime.postgres import open_pool
from schemas.record import Quality
from tests.bridge_rig import Broker, Running, bridge, own_broker, records_of
from tests.databases import Server
from tests.ingest_rig import ROLE, Installation, Tenant, install, rows
from tests.landing_rig import Rig, until
from tests.services.test_verify import verify
from tests.support import run
from workers.metrics import QuarantineMetrics
from workers.quarantine import Bounds
from workers.settings import QuarantineSettings

STAMPED, REPLACED = Quality.TIME_STAMPED, Quality.TIME_REPLACED
CONVERTED, BOOLEAN = Quality.UNIT_CONVERTED, Quality.BOOLEAN


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with own_broker() as started:
        yield started


@pytest.fixture
def own(timescaledb: Server, timescaledb_template: str, tmp_path: Path) -> Iterator[Installation]:
    """Nobody else's rows."""
    yield from install(timescaledb, timescaledb_template, tmp_path)


class Site(NamedTuple):
    """A tenant's site and its prefix."""

    tenant: Tenant
    prefix: str

    def shelly(self, name: str, rest: str) -> str:
        return f"shellies/{self.prefix}/{name}/{rest}"

    def tasmota(self, name: str, rest: str) -> str:
        return f"tele/{self.prefix}/{name}/{rest}"


async def site_of(installation: Installation, timezone: str = "UTC", temperature_unit: str = "C") -> Site:
    tenant = await installation.tenant()
    async with installation.acting_for(tenant.organisation) as connection:
        await connection.execute("UPDATE sites SET timezone = $2 WHERE site_id = $1", tenant.site, timezone)
        await site_brokers.issue(connection, Handovers(installation.ring), tenant.organisation, tenant.site)
        await site_brokers.change(connection, tenant.site, temperature_unit)
        return Site(tenant, (await site_brokers.get(connection, tenant.site))["prefix"])


class Row(NamedTuple):
    metric: str
    label: str
    unit: str
    value: Any
    quality: int
    ts: float


async def stored(rig: Rig, device: UUID) -> list[Row]:
    """All that stands of a device; times in seconds since 1970."""
    await rig.landed()
    query = """
        SELECT s.metric, s.label, s.unit, r.value, r.quality, extract(epoch FROM r.ts)::float8
        FROM readings r JOIN series s USING (series_id) WHERE s.device_id = $1
        UNION ALL
        SELECT s.metric, s.label, s.unit, NULL, r.quality, extract(epoch FROM r.ts)::float8
        FROM text_readings r JOIN series s USING (series_id) WHERE s.device_id = $1 ORDER BY 6, 1, 2"""
    return [Row(*row) for row in await rig.fetch(query, device)]


@asynccontextmanager
async def replaying(installation: Installation, rig: Rig) -> AsyncIterator[None]:
    """A process that carries out replays."""
    postgres = installation.database.settings
    pool = await open_pool(postgres, role=ROLE, application="test", size_max=2)
    replayer = make_replayer(
        log=rig.log,
        pool=pool,
        listener=Notifications(postgres, role=ROLE, application="test"),
        ingest=IngestSettings(),
        settings=ReplaySettings(replay_poll_s=0.1),
        clock=SystemClock(),
        metrics=IngestMetrics(CollectorRegistry()),
        trouble=lambda: None,
    )
    task = asyncio.create_task(replayer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        pool.terminate()


async def keep(installation: Installation, **settings: Any) -> None:
    """What a worker does every now and then."""
    bounds = Bounds(
        installation.database.settings,
        QuarantineSettings(**settings),
        QuarantineMetrics(CollectorRegistry()),
        nonce_memory_s=3_600.0,
    )
    await bounds.keep()


async def tray(installation: Installation, site: Site) -> list[Any]:
    async with installation.acting_for(site.tenant.organisation) as connection:
        return [*await unassigned.find(connection, site.tenant.site, 100)]


async def claim(installation: Installation, site: Site, identity: UUID) -> int:
    async with installation.acting_for(site.tenant.organisation) as connection:
        return await unassigned.create(connection, site.tenant.organisation, identity, None, None)


async def states(rig: Rig, device: UUID) -> list[str]:
    return [row[0] for row in await rig.fetch("SELECT state FROM quarantine WHERE device_id = $1", device)]


async def books_are_right(rig: Rig) -> None:
    """`sluice verify` finds every reading where the log and the books say that it is."""
    report, findings = await verify(rig)
    assert (findings, report.differs) == ([], False)
    await rig.ledger()


# ---------------------------------------------------------------- topics


def test_no_topic_is_in_two_filters() -> None:
    """Not of one family either: nobody says how often a broker sends a message for which a session asked twice."""
    filters = [topic.filter for family in FAMILIES for topic in family.topics]
    # Nor does a bridge hear what is said to devices.
    commands = ["cpi/+/command", "v1/gateways/+/+/commands", "opensense/+/+/cmd/identify"]
    for one, other in combinations([*filters, *commands], 2):
        levels = list(zip(one.split("/"), other.split("/"), strict=False))
        is_apart = one.count("/") != other.count("/") or any(a != b and "+" not in (a, b) for a, b in levels)
        assert is_apart, (one, other)
    assert not any("#" in one for one in filters)


def router(name: str) -> Router:
    return Router(next(family for family in FAMILIES if family.name == name), 100)


def test_a_topic_names_a_site_a_device_and_what_of_it() -> None:
    found = router("shelly").find(b"shellies/k3vq7m2a/shellyht-1BDD1B/sensor/temperature")
    assert found is not None
    assert (found.prefix, found.name, found.words) == (b"k3vq7m2a", "shellyht-1BDD1B", ("sensor", "temperature"))
    status = router("shelly").find(b"shellies/k3vq7m2a/plug/status/switch:0")
    assert status is not None
    assert status.words == ("status", "switch:0")
    will = router("tasmota").find(b"tele/k3vq7m2a/plug/LWT")
    assert will is not None
    assert will.kind is Kind.WILL


@pytest.mark.parametrize(
    "topic",
    [
        b"shellies/k3vq7m2a/plug/relay/0/command",
        b"shellies/k3vq7m2/plug/relay/0",
        b"shellies/K3VQ7M2A/plug/relay/0",
        b"shellies/k3vq7m2a//relay/0",
        b"shellies/k3vq7m2a/caf\xc3\xa9/relay/0",
        b"shellies/k3vq7m2a/\xff/relay/0",
        b"shellies/k3vq7m2a/" + b"x" * 65 + b"/relay/0",
        b"shellies/announce",
        b"shellies/k3vq7m2a/plug/sensor/\xff",
    ],
)
def test_a_topic_that_names_none_is_none(topic: bytes) -> None:
    assert router("shelly").find(topic) is None


# ---------------------------------------------------------------- what devices publish


def test_what_shelly_and_tasmota_publish_stands_with_its_values_units_and_times(
    own: Installation, broker: Broker
) -> None:
    async def test() -> None:
        site = await site_of(own, "Europe/Prague", "F")
        h_and_t = await own.add_device(site.tenant, "shellyht-1BDD1B")
        plus = await own.add_device(site.tenant, "shellyplusht-b8d61a8b17cc")
        sonoff = await own.add_device(site.tenant, "sonoff")
        async with own.open_log() as log:
            rig = Rig(own.database, log, own.log_settings)
            async with bridge(own, broker, log) as running, rig.worker():
                await running.connected()
                before = time.time()
                broker.publish(site.shelly("shellyht-1BDD1B", "sensor/temperature"), "70.5")
                broker.publish(site.shelly("shellyht-1BDD1B", "sensor/humidity"), "45")
                broker.publish(site.shelly("shellyht-1BDD1B", "relay/0/energy"), "90")
                # fmt: off
                frame = {"src": "x", "method": "NotifyFullStatus", "params": {
                    "ts": round(before) - 100.38, "temperature:0": {"id": 0, "tC": 19.8, "tF": 67.6},
                    "devicepower:0": {"battery": {"V": 0.43, "percent": 0}, "external": {"present": True}}}}
                # fmt: on
                broker.publish(site.shelly("shellyplusht-b8d61a8b17cc", "events/rpc"), json.dumps(frame))
                clockless = {"method": "NotifyStatus", "params": {"ts": 3.10, "humidity:0": {"rh": 42.2}}}
                broker.publish(site.shelly("shellyplusht-b8d61a8b17cc", "events/rpc"), json.dumps(clockless))
                local = datetime.fromtimestamp(round(before) - 60, UTC).replace(tzinfo=None)
                told = own_time(round(before) - 60, "Europe/Prague")
                assert told != local.isoformat()
                sensor = {"Time": told, "AM2301": {"Temperature": 22.6, "Humidity": 32.4}, "TempUnit": "C",
                          "ENERGY": {"Total": 3.185, "Yesterday": 3.058}}  # fmt: skip
                broker.publish(site.tasmota("sonoff", "SENSOR"), json.dumps(sensor))
                old = {"Time": "1970-01-01T00:00:12", "Wifi": {"RSSI": 86, "Signal": -57}}
                broker.publish(site.tasmota("sonoff", "STATE"), json.dumps(old))
                await running.done("accepted", 7)
                first = {row.metric: row for row in await stored(rig, h_and_t)}
                assert first["temperature"][1:5] == (
                    "",
                    "°C",
                    pytest.approx((70.5 - 32) * 5 / 9),
                    STAMPED | CONVERTED,
                )
                assert first["humidity"][1:5] == ("", "%", 45.0, STAMPED)
                assert first["energy"][1:5] == ("relay:0", "Wh", 1.5, STAMPED | CONVERTED)
                assert all(before <= row.ts <= time.time() for row in first.values())
                second = {row.metric: row for row in await stored(rig, plus)}
                told_at: Any = pytest.approx(round(before) - 100.38, abs=1e-5)
                assert second["temperature"][1:] == ("", "°C", 19.8, 0, told_at)
                assert second["external_power"][1:] == ("", "", 1.0, BOOLEAN, told_at)
                assert "battery" not in second
                assert second["humidity"][1:5] == ("", "%", 42.2, REPLACED)
                assert before <= second["humidity"].ts <= time.time()
                assert await rig.value("SELECT original_time FROM reading_notes WHERE original_time = '3.1'") == "3.1"
                third = {row.metric: row for row in await stored(rig, sonoff)}
                moment = float(round(before) - 60)
                assert third["temperature"][1:] == ("AM2301", "°C", 22.6, 0, moment)
                assert third["humidity"][1:] == ("AM2301", "%", 32.4, 0, moment)
                assert third["energy"][1:] == ("ENERGY", "Wh", 3185.0, CONVERTED, moment)
                assert third["energy_yesterday"][1:] == ("ENERGY", "kWh", 3.058, 0, moment)
                assert third["signal"][1:5] == ("", "dBm", -57.0, REPLACED)
                assert before <= third["signal"].ts <= time.time()

    run(test())


def test_a_site_s_zone_that_is_changed_is_the_next_message_s(own: Installation, broker: Broker) -> None:
    async def test() -> None:
        site = await site_of(own)
        await own.add_device(site.tenant, "plug")
        payload = json.dumps({"Time": "2026-01-15T12:00:00", "B": {"Humidity": 40}})
        noon = round(datetime(2026, 1, 15, 12, tzinfo=UTC).timestamp() * 1e6)
        async with own.open_log() as log, bridge(own, broker, log) as running:
            await running.connected()
            broker.publish(site.tasmota("plug", "SENSOR"), payload)
            await running.done("accepted", 1)
            sql = "UPDATE sites SET timezone = 'Europe/Prague' WHERE site_id = $1"
            await own.execute(site.tenant, sql, site.tenant.site)

            async def is_earlier() -> bool:
                broker.publish(site.tasmota("plug", "SENSOR"), payload)
                return [row[3] for row in rows((await records_of(log, site.tenant))[-1])] == [noon - 3_600_000_000]

            await until(is_earlier)
            assert [row[3] for row in rows((await records_of(log, site.tenant))[0])] == [noon]

    run(test())


def own_time(moment: int, zone: str) -> str:
    """A local time as Tasmota writes it."""
    return datetime.fromtimestamp(moment, ZoneInfo(zone)).replace(tzinfo=None).isoformat()


def test_what_is_said_with_its_time_and_then_without_is_one_row(own: Installation, broker: Broker) -> None:
    async def test() -> None:
        site = await site_of(own)
        plug, other = await own.add_device(site.tenant, "plug"), await own.add_device(site.tenant, "other")
        async with own.open_log() as log:
            rig = Rig(own.database, log, own.log_settings)
            async with bridge(own, broker, log) as running, rig.worker():
                await running.connected()
                params = {"ts": time.time() - 5, "switch:0": {"id": 0, "apower": 8.9}}
                frame = json.dumps({"method": "NotifyStatus", "params": params})
                for _ in range(2):
                    broker.publish(site.shelly("plug", "events/rpc"), frame)
                    broker.publish(site.shelly("plug", "status/switch:0"), json.dumps(params["switch:0"]))
                broker.publish(site.shelly("other", "status/switch:0"), json.dumps(params["switch:0"]))
                await running.done("echo", 2)
                await running.done("accepted", 3)
                assert [row[:4] for row in await stored(rig, plug)] == [("power", "switch:0", "W", 8.9)]
                assert [row[:5] for row in await stored(rig, other)] == [("power", "switch:0", "W", 8.9, STAMPED)]

    run(test())


def test_bad_payloads_are_set_aside_and_stop_nobody(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        site = await site_of(installation)
        await installation.add_device(site.tenant, "plug")
        async with installation.open_log() as log, bridge(installation, broker, log) as running:
            await running.connected()
            for rest, payload in (
                ("events/rpc", b"{"), ("events/rpc", b"\xff"), ("status/switch:0", b"[" * 100_000),
                ("status/switch:0", b'{"apower": NaN}'), ("sensor/temperature", b"\xff\x00"),
                ("sensor/temperature", b" "), ("sensor/temperature", b"nan"), ("status/switch:0", b"3"),
            ):  # fmt: skip
                broker.publish(site.shelly("plug", rest), payload)
            broker.publish(site.shelly("plug", "sensor/humidity"), "45")
            broker.publish(site.shelly("plug", "events/rpc"), '{"id":1,"result":{}}')
            await running.done("accepted", 1)
            await running.done("quarantined", 8)
            await running.done("empty", 1)
            codes = [one.code for record in await records_of(log, site.tenant) for one in record.refused]
            assert codes == [*["undecodable"] * 3, "not_finite", "undecodable", "invalid_value", "not_finite",
                             "undecodable"]  # fmt: skip

    run(test())


# ---------------------------------------------------------------- whose they are


def test_a_prefix_that_is_nobody_s_or_was_revoked_is_dropped(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        site = await site_of(installation)
        await installation.add_device(site.tenant, "plug")
        async with installation.open_log() as log, bridge(installation, broker, log) as running:
            await running.connected()
            broker.publish("shellies/aaaaaaaa/plug/sensor/humidity", "45")
            await running.done("unknown_device", 1)
            broker.publish(site.shelly("plug", "sensor/humidity"), "45")
            await running.done("accepted", 1)
            async with installation.acting_for(site.tenant.organisation) as connection:
                await site_brokers.revoke(connection, site.tenant.site)

            async def refused() -> bool:
                broker.publish(site.shelly("plug", "sensor/humidity"), "45")
                return running.messages("unknown_device") > 1

            await until(refused)
            async with installation.acting_for(site.tenant.organisation) as connection:
                await site_brokers.issue(
                    connection, Handovers(installation.ring), site.tenant.organisation, site.tenant.site
                )
                assert (await site_brokers.get(connection, site.tenant.site))["prefix"] == site.prefix
            accepted = running.messages("accepted")

            async def taken() -> bool:
                broker.publish(site.shelly("plug", "sensor/humidity"), "45")
                return running.messages("accepted") > accepted

            await until(taken)

    run(test())


def test_a_will_is_heard_of_a_device_of_the_site_alone(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        site = await site_of(installation)
        plug = await installation.add_device(site.tenant, "plug")
        async with installation.open_log() as log, bridge(installation, broker, log) as running:
            await running.connected()
            broker.publish(site.shelly("plug", "online"), "true")
            broker.publish(site.tasmota("plug", "LWT"), "Online")
            broker.publish(site.shelly("plug", "info"), '{"wifi_sta":{"connected":true}}')
            broker.publish(site.shelly("new", "online"), "true")
            await running.done("announced", 2)
            await running.done("noted", 1)
            await running.done("unknown_device", 1)

            async def is_there() -> bool:
                query = "SELECT device_id FROM devices WHERE online AND organisation_id = $1"
                return await installation.superuser(query, site.tenant.organisation) == [(plug,)]

            await until(is_there)
            assert await tray(installation, site) == []

    run(test())


def test_a_device_that_moves_away_leaves_its_name(installation: Installation, broker: Broker) -> None:
    """Another site's device of the same name has nothing to do with it."""

    async def test() -> None:
        site, other = await site_of(installation), await site_of(installation)
        plug = await installation.add_device(site.tenant, "plug")
        theirs = await installation.add_device(other.tenant, "plug")
        async with installation.open_log() as log, bridge(installation, broker, log) as running:
            await running.connected()
            broker.publish(site.shelly("plug", "sensor/humidity"), "45")
            broker.publish(other.shelly("plug", "sensor/humidity"), "46")
            await running.done("accepted", 2)
            ((ours,), (their,)) = [await records_of(log, one.tenant) for one in (site, other)]
            assert (ours.device, their.device) == (plug.bytes, theirs.bytes)
            await installation.execute(
                site.tenant,
                "INSERT INTO device_sites (device_id, organisation_id, valid_from) VALUES ($1, $2, now())",
                plug, site.tenant.organisation,
            )  # fmt: skip

            async def held() -> bool:
                broker.publish(site.shelly("plug", "sensor/humidity"), "45")
                return bool(await tray(installation, site))

            await until(held)

    run(test())


# ---------------------------------------------------------------- the tray


async def hold(running: Running, broker: Broker, site: Site, count: int, name: str = "new") -> None:
    """So many readings of a device that the site does not know, in order."""
    before = round(running.messages("quarantined"))
    broker.publish_lines(site.shelly(name, "sensor/humidity"), [str(number % 100) for number in range(count)])
    await running.done("quarantined", before + count)


def test_what_is_held_of_a_name_becomes_its_device_s_once_and_in_order(own: Installation, broker: Broker) -> None:
    async def test() -> None:
        site, stranger = await site_of(own), await site_of(own)
        async with own.open_log(log_keep_landed_h=1) as log:
            rig = Rig(own.database, log, own.log_settings)
            async with bridge(own, broker, log) as running, rig.worker(), replaying(own, rig):
                await running.connected()
                await hold(running, broker, site, 200)
                told = {"Time": "2026-01-01T00:00:00", "B": {"Temperature": 4.5}}
                broker.publish(site.tasmota("new", "SENSOR"), json.dumps(told))
                await running.done("quarantined", 201)
                await rig.landed()
                (row,) = await tray(own, site)
                assert (row["name"], row["held"], row["site_id"]) == ("new", 201, site.tenant.site)
                assert json.loads(row["last_payload"])["value"] == 4.5
                assert await tray(own, stranger) == []
                assert await rig.fetch("SELECT DISTINCT code FROM quarantine") == [("unassigned_device",)]
                assert await claim(own, site, row["unassigned_id"]) == 201
                assert await tray(own, site) == []

                async def released() -> bool:
                    return set(await states(rig, row["unassigned_id"])) == {"released"}

                await until(released)
                found = await stored(rig, row["unassigned_id"])
                humidity = [one for one in found if one.metric == "humidity"]
                assert [one.value for one in humidity] == [float(number % 100) for number in range(200)]
                assert {one.quality for one in humidity} == {STAMPED.value}
                (temperature,) = (one for one in found if one.metric == "temperature")
                assert temperature[1:] == ("B", "°C", 4.5, 0, datetime(2026, 1, 1, tzinfo=UTC).timestamp())
                await books_are_right(rig)

                async def is_its() -> bool:
                    broker.publish(site.shelly("new", "sensor/battery"), "88")
                    await rig.landed()
                    return "battery" in [one.metric for one in await stored(rig, row["unassigned_id"])]

                await until(is_its)

    run(test())


def test_a_replay_that_comes_before_the_claim_leaves_the_readings_in_the_tray(
    own: Installation, broker: Broker
) -> None:
    async def test() -> None:
        site = await site_of(own)
        async with own.open_log() as log:
            rig = Rig(own.database, log, own.log_settings)
            async with bridge(own, broker, log) as running, rig.worker(), replaying(own, rig):
                await running.connected()
                await hold(running, broker, site, 5)
                await rig.landed()
                async with own.acting_for(site.tenant.organisation) as connection:
                    assert await quarantine.replay_found(connection, quarantine.Filter(), 100) == 5
                tried = "SELECT count(*) FROM quarantine WHERE state = 'held' AND attempts = 2"

                async def are_back() -> bool:
                    return bool(await rig.value(tried) == 5)

                await until(are_back)
                (row,) = await tray(own, site)
                assert row["held"] == 5
                assert await claim(own, site, row["unassigned_id"]) == 5

    run(test())


def test_what_came_under_way_of_a_claim_is_the_device_s_as_well(own: Installation, broker: Broker) -> None:
    """Nothing has landed yet when it is claimed."""

    async def test() -> None:
        site = await site_of(own)
        async with own.open_log() as log:
            rig = Rig(own.database, log, own.log_settings)
            async with bridge(own, broker, log) as running:
                await running.connected()
                await hold(running, broker, site, 20)
                (row,) = await tray(own, site)
                assert await claim(own, site, row["unassigned_id"]) == 0
            async with rig.worker(), replaying(own, rig):
                await rig.landed()
                assert await states(rig, row["unassigned_id"]) == ["held"] * 20
                await keep(own)

                async def released() -> bool:
                    return await states(rig, row["unassigned_id"]) == ["released"] * 20

                await until(released)
                assert [one.value for one in await stored(rig, row["unassigned_id"])] == [*map(float, range(20))]

    run(test())


@pytest.mark.parametrize("is_claimed", [True, False])
def test_a_device_that_is_there_may_take_a_name_with_what_is_held(
    own: Installation, broker: Broker, is_claimed: bool
) -> None:
    """By being bound to it; or because it was given that name some other way."""

    async def test() -> None:
        site = await site_of(own)
        device = await own.add_device(site.tenant, "old")
        async with own.open_log(log_keep_landed_h=1) as log:
            rig = Rig(own.database, log, own.log_settings)
            async with bridge(own, broker, log) as running, rig.worker(), replaying(own, rig):
                await running.connected()
                await hold(running, broker, site, 20)
                await rig.landed()
                (row,) = await tray(own, site)
                async with own.acting_for(site.tenant.organisation) as connection:
                    if is_claimed:
                        assert await unassigned.bind(connection, row["unassigned_id"], device) == 20
                    else:
                        sql = "UPDATE devices SET local_id = 'new' WHERE device_id = $1"
                        await connection.execute(sql, device)
                if not is_claimed:
                    await keep(own)
                assert await tray(own, site) == []

                async def released() -> bool:
                    return await states(rig, device) == ["released"] * 20

                await until(released)
                assert [one.value for one in await stored(rig, device)] == [*map(float, range(20))]
                await books_are_right(rig)

    run(test())


def test_messages_that_are_sent_again_are_held_once(
    own: Installation, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bridge that is killed before its acknowledgements reach the broker; and the name is claimed in between."""

    async def test() -> None:
        site = await site_of(own)
        settings = {"mqtt_broker": uuid4().hex}
        async with own.open_log() as log:
            rig = Rig(own.database, log, own.log_settings)
            async with bridge(own, broker, log, **settings) as running:
                await running.connected()
                broker.publish(site.shelly("new", "sensor/humidity"), "99")
                await running.done("quarantined", 1)
                await running.settled()
                running.mute(monkeypatch)
                await hold(running, broker, site, 50)
                await running.kill()
            (row,) = await tray(own, site)
            await claim(own, site, row["unassigned_id"])
            async with bridge(own, broker, log, **settings) as second, rig.worker(), replaying(own, rig):
                await second.connected()
                await second.settled()
                assert second.counted("sluice_mqtt_repeated_messages_total") == 50
                await rig.landed()
                await keep(own)

                async def done() -> bool:
                    await rig.landed()
                    return len(await stored(rig, row["unassigned_id"])) >= 51

                await until(done)
                found = await stored(rig, row["unassigned_id"])
                assert [one.value for one in found] == [99.0, *map(float, range(50))]
                assert set(await states(rig, row["unassigned_id"])) == {"released"}

    run(test())


def test_a_tray_is_bounded_in_names_rows_and_age(own: Installation, broker: Broker) -> None:
    async def test() -> None:
        site = await site_of(own)
        async with own.open_log(log_keep_landed_h=1) as log:
            rig = Rig(own.database, log, own.log_settings)
            async with bridge(own, broker, log, mqtt_tray_names_max=2) as running, rig.worker():
                await running.connected()
                await hold(running, broker, site, 10, "one")
                await hold(running, broker, site, 10, "two")
                broker.publish(site.shelly("three", "sensor/humidity"), "1")
                await running.done("tray_full", 1)
                await rig.landed()
                held = "SELECT count(*), min(payload::text) FROM quarantine WHERE state = 'held'"
                await keep(own, tray_held_rows_max=6)
                assert [row["held"] for row in await tray(own, site)] == [6, 6]
                await keep(own, tray_site_rows_max=4)
                assert [row["held"] for row in await tray(own, site)] == [0, 4]
                await books_are_right(rig)
                await rig.fetch("UPDATE quarantine SET received_at = received_at - interval '31 days'")
                await rig.fetch("UPDATE ledger SET hour = hour - interval '31 days'")
                await rig.fetch("UPDATE unassigned_devices SET last_seen_at = now() - interval '31 days'")
                await keep(own, books_memory_days=100)
                assert (await rig.fetch(held))[0][0] == 0
                assert await tray(own, site) == []
                assert await rig.value("SELECT sum(expired)::int FROM ledger") == 20
                notes = {row[0] for row in await rig.fetch("SELECT DISTINCT note FROM quarantine")}
                assert len(notes) == 3
                await rig.ledger()

    run(test())


def test_discarded_readings_are_gone_and_the_name_comes_back_when_it_is_heard(
    own: Installation, broker: Broker
) -> None:
    async def test() -> None:
        site = await site_of(own)
        async with own.open_log() as log:
            rig = Rig(own.database, log, own.log_settings)
            async with bridge(own, broker, log) as running, rig.worker():
                await running.connected()
                await hold(running, broker, site, 5)
                await rig.landed()
                (row,) = await tray(own, site)
                async with own.acting_for(site.tenant.organisation) as connection:
                    assert await unassigned.discard(connection, row["unassigned_id"], "a neighbour's") == 5
                assert await tray(own, site) == []

                async def heard() -> bool:
                    broker.publish(site.shelly("new", "sensor/humidity"), "45")
                    return bool(await tray(own, site))

                await until(heard)
                assert (await tray(own, site))[0]["unassigned_id"] != row["unassigned_id"]
                assert await rig.value("SELECT sum(discarded)::int FROM ledger") == 5

    run(test())


def test_a_site_that_is_erased_takes_its_tray_with_it(own: Installation, broker: Broker) -> None:
    async def test() -> None:
        site = await site_of(own)
        async with own.open_log() as log:
            rig = Rig(own.database, log, own.log_settings)
            async with bridge(own, broker, log) as running, rig.worker():
                await running.connected()
                await hold(running, broker, site, 5)
                (row,) = await tray(own, site)
                async with own.acting_for(site.tenant.organisation) as connection:
                    await connection.execute("SELECT begin_site_erasure($1)", site.tenant.site)
                await rig.landed()
                spans = await rig.fetch("SELECT from_ts FROM tombstones WHERE device_id = $1", row["unassigned_id"])
                assert len(spans) == 1
                assert await rig.value("SELECT revoked_at IS NOT NULL FROM site_brokers")
                assert await tray(own, site) == []

    run(test())
