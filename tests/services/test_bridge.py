"""The bridge: what becomes of messages that a real broker delivers."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from itertools import combinations, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from ingest.mqtt.packets import Login, Version, connect
from ingest.mqtt.topics import FAMILIES
from runtime.errors import UnavailableError
from runtime.log import Log
from schemas.record import FENCE_SHIFT, VERSION, Quality
from tests.bridge_rig import Broker, Running, bridge, own_broker, records_of, topic
from tests.databases import Server
from tests.ingest_rig import Installation, install, measured, rows
from tests.landing_rig import Rig, until
from tests.support import run

ONE = json.dumps(measured(("temperature", 21.5)))
#: How two bridges share the sessions.
HALVES = [len(FAMILIES) // 2, -(-len(FAMILIES) // 2)]


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with own_broker() as started:
        yield started


# ---------------------------------------------------------------- readings


def test_readings_of_both_topics_are_what_was_sent(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        now = round(time.time()) - 60
        async with installation.open_log() as log, bridge(installation, broker, log) as running:
            await running.connected()
            timed = measured(("temperature", 21.5), ("humidity", 40), ts=now, device="fridge")
            broker.publish(topic(tenant), json.dumps(timed))
            spelt = f"opensense/acc_{tenant.organisation.hex}/dev_{tenant.device.hex}"
            broker.publish(spelt, json.dumps({"measurements": [{"type": "co2", "value": 612, "label": "front"}]}))
            await running.done("accepted", 2)
            found = {rows(record)[0][0]: record for record in await records_of(log, tenant)}
            assert {record.device for record in found.values()} == {tenant.device.bytes}
            assert [record.way for record in found.values()] == ["mqtt", "mqtt"]
            first = found["temperature"]
            assert sorted(rows(first)) == [
                ("humidity", "", "%", now * 1_000_000, 40.0, 0),
                ("temperature", "", "°C", now * 1_000_000, 21.5, 0),
            ]
            # Its times tell it from every other: landing needs no more.
            assert (first.version, first.delivery) == (1, None)
            stamped = found["co2"]
            ((metric, label, unit, _, value, quality),) = rows(stamped)
            assert (metric, label, unit, value, quality) == ("co2", "front", "ppm", 612.0, Quality.TIME_STAMPED)
            assert stamped.version == VERSION
            assert stamped.delivery is not None
            assert not stamped.delivery.again
            await running.settled()

    run(test())


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_both_versions_of_mqtt_bring_large_and_small_messages_in_order(
    installation: Installation, broker: Broker, version: str
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        begin = round(time.time()) - 100_000
        large = [{"type": "temperature", "value": n % 50, "ts": begin + n} for n in range(3_000)]
        async with (
            installation.open_log() as log,
            bridge(installation, broker, log, mqtt_version=version) as running,
        ):
            await running.connected()
            broker.publish_lines(topic(tenant), [json.dumps(measured(("humidity", n % 100))) for n in range(300)])
            broker.publish(topic(tenant), json.dumps({"measurements": large}))
            await running.done("accepted", 301)
            found = await records_of(log, tenant)
            assert [rows(record)[0][4] for record in found[:-1]] == [float(n % 100) for n in range(300)]
            assert [row[4] for row in rows(found[-1])] == [float(n % 50) for n in range(3_000)]
            await running.settled()
            assert running.counted("sluice_mqtt_repeated_messages_total") == 0

    run(test())


def test_a_bare_qos_0_message_is_taken_though_nobody_promises_it(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as log, bridge(installation, broker, log) as running:
            await running.connected()
            broker.publish(topic(tenant), ONE, "-q", "0")
            await running.done("accepted", 1)
            (record,) = await records_of(log, tenant)
            assert record.delivery is None

    run(test())


# ---------------------------------------------------------------- who may


def test_only_a_known_device_of_the_topic_s_organisation_is_listened_to(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        ours, theirs = await installation.tenant(), await installation.tenant()
        gone = await installation.add_device(ours, "gone")
        await installation.execute(ours, "UPDATE devices SET status = 'deleted' WHERE device_id = $1", gone)
        async with installation.open_log() as log, bridge(installation, broker, log) as running:
            await running.connected()
            broker.publish(topic(ours, theirs.device), ONE)
            broker.publish(topic(ours, uuid4()), ONE)
            broker.publish(topic(ours, gone), ONE)
            broker.publish(f"v1/readings/{ours.organisation}/not-an-id", ONE)
            broker.publish(f"v1/readings/{ours.organisation}/{ours.device.hex[:-1]}g", ONE)
            broker.publish(topic(ours), ONE)
            await running.done("accepted", 1)
            await running.done("foreign_organisation", 1)
            await running.done("unknown_device", 2)
            await running.done("malformed_topic", 2)
            await running.settled()
            assert len(await records_of(log, ours)) == 1
            assert await records_of(log, theirs) == []

    run(test())


def test_a_device_is_suspended_and_back_within_a_second(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        status = "UPDATE devices SET status = $2 WHERE device_id = $1"
        async with installation.open_log() as log, bridge(installation, broker, log) as running:
            await running.connected()
            broker.publish(topic(tenant), ONE)
            await running.done("accepted", 1)
            await installation.execute(tenant, status, tenant.device, "suspended")
            await asyncio.sleep(1)
            broker.publish(topic(tenant), ONE)
            await running.done("quarantined", 1)
            await installation.execute(tenant, status, tenant.device, "active")
            await asyncio.sleep(1)
            broker.publish(topic(tenant), ONE)
            await running.done("accepted", 2)
            refused = [one for record in await records_of(log, tenant) for one in record.refused]
            assert [(one.code, json.loads(one.payload)) for one in refused] == [
                ("device_suspended", {"type": "temperature", "value": 21.5})
            ]

    run(test())


# ---------------------------------------------------------------- what is no good


POISON: list[tuple[str, bytes, str]] = [
    ("no JSON", b"garbage", "garbage"),
    ("invalid UTF-8", b'{"measurements":[{"type":"temperature","value":"\xff"}]}', "base64"),
    ("binary", bytes(range(256)), "base64"),
    ("a NUL", b"a\0b", "base64"),
    ("another shape", b'{"temperature":21.5}', '{"temperature":21.5}'),
    ("too large", b'{"measurements":[' + b" " * 20_000 + b"]}", '{"measurements":['),
    ("too many", json.dumps(measured(*[("temperature", n % 50) for n in range(101)])).encode(), '{"measurements"'),
]


@pytest.mark.parametrize(("what", "payload", "shown"), POISON, ids=[what for what, _, _ in POISON])
def test_poison_stands_in_quarantine_and_is_acknowledged(
    installation: Installation, broker: Broker, what: str, payload: bytes, shown: str
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        settings = {"mqtt_message_bytes_max": 10_000, "readings_per_request_max": 100}
        async with installation.open_log() as log, bridge(installation, broker, log, **settings) as running:
            await running.connected()
            broker.publish(topic(tenant), payload)
            broker.publish(topic(tenant), ONE)
            await running.done("quarantined", 1)
            await running.done("accepted", 1)
            await running.settled()
            poison, good = await records_of(log, tenant)
            assert [(one.index, one.code) for one in poison.refused] == [(0, "undecodable")]
            kept = json.loads(poison.refused[0].payload)
            assert "base64" in kept if shown == "base64" else kept.startswith(shown)
            assert not poison.channels
            assert not good.refused

    run(test())


def test_a_message_beyond_every_bound_is_passed_over_without_being_kept(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as log, bridge(installation, broker, log) as running:
            await running.connected()
            broker.publish(topic(tenant), b"[" * 3_000_000)
            broker.publish(topic(tenant), ONE)
            await running.done("quarantined", 1)
            await running.done("accepted", 1)
            poison, _ = await records_of(log, tenant)
            assert "3000000 bytes" in poison.refused[0].message
            assert len(poison.refused[0].payload) < 5_000
            assert running.counted("sluice_mqtt_connections_ended_total") == 0

    run(test())


def test_what_is_wrong_in_a_message_is_refused_alone(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as log, bridge(installation, broker, log) as running:
            await running.connected()
            mixed = [
                measured(("temperature", 21.5), ("temperature", None)),
                measured(("humidity", 40), device="somebody-else"),
                measured(("humidity", 41), device=str(tenant.device)),
            ]
            broker.publish(topic(tenant), json.dumps(mixed))
            broker.publish(topic(tenant), '{"measurements":[]}')
            await running.done("accepted", 1)
            await running.done("empty", 1)
            (record,) = await records_of(log, tenant)
            assert sorted(row[4] for row in rows(record)) == [21.5, 41.0]
            assert [(one.index, one.code) for one in record.refused] == [(1, "invalid_value"), (2, "device_mismatch")]

    run(test())


# ---------------------------------------------------------------- what is no reading


def test_retained_messages_are_not_new_readings(installation: Installation, broker: Broker) -> None:
    """MQTT 5 does not even send them; 3.1.1 does, on each subscription."""

    async def test() -> None:
        tenant = await installation.tenant()
        broker.publish(topic(tenant), ONE, "-r")
        try:
            for version, retained in (("5", 0), ("3.1.1", 1)):
                async with (
                    installation.open_log() as log,
                    bridge(installation, broker, log, mqtt_version=version) as running,
                ):
                    await running.connected()
                    broker.publish(topic(tenant), ONE)
                    await running.done("accepted", 1)
                    await running.done("retained", retained)
        finally:
            broker.forget(topic(tenant))

    run(test())


def test_no_message_is_in_two_families() -> None:
    """Filters whose topics cannot meet: of another length, or with another word at some level."""
    for one, other in combinations(FAMILIES, 2):
        for first in one.topics:
            for second in other.topics:
                pairs = list(zip(first.filter.split("/"), second.filter.split("/"), strict=False))
                same_length = first.filter.count("/") == second.filter.count("/")
                assert not same_length or any(a != b and "+" not in (a, b) for a, b in pairs), (first, second)


# ---------------------------------------------------------------- limits


def test_a_message_over_its_limit_waits_and_one_for_which_that_is_too_long_is_set_aside(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        tenant, other = await installation.tenant(), await installation.tenant()
        settings: dict[str, Any] = {"limit_device_requests_per_minute": 3, "mqtt_limit_wait_s": 0}
        async with installation.open_log() as log, bridge(installation, broker, log, **settings) as running:
            await running.connected()
            broker.publish_lines(topic(tenant), [ONE] * 5)
            broker.publish(topic(other), ONE)
            await running.done("quarantined", 2)
            await running.done("accepted", 4)
            refused = [one.code for record in await records_of(log, tenant) for one in record.refused]
            assert refused == ["rate_limited"] * 2
        settings |= {"mqtt_limit_wait_s": 120}
        async with installation.open_log() as log, bridge(installation, broker, log, **settings) as running:
            await running.connected()
            broker.publish_lines(topic(tenant), [ONE] * 2)
            broker.publish(topic(other), ONE)
            await running.done("accepted", 1)
            assert running.counted("sluice_mqtt_held_messages") == 2
            await installation.execute(
                tenant,
                "INSERT INTO limit_overrides (organisation_id, device_id, requests_per_minute) VALUES ($1, $2, 1000)",
                tenant.organisation,
                tenant.device,
            )
            await running.done("accepted", 3)

    run(test())


def test_where_too_many_wait_for_a_limit_those_of_a_flood_go_and_others_stay(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        wild, other = await installation.tenant(), await installation.tenant()
        settings: dict[str, Any] = {
            "limit_device_requests_per_minute": 1, "mqtt_limit_wait_s": 3_600, "mqtt_held_max": 4,
        }  # fmt: skip
        async with installation.open_log() as log, bridge(installation, broker, log, **settings) as running:
            await running.connected()

            async def taken(count: int) -> None:
                """As many have come, and no more wait than may."""

                async def are() -> bool:
                    waiting = running.counted("sluice_mqtt_held_messages")
                    done = running.messages("accepted") + running.messages("quarantined")
                    return waiting + done == count and waiting <= 4

                await until(are)

            broker.publish_lines(topic(wild), [ONE] * 20)
            await taken(20)
            broker.publish_lines(topic(other), [ONE] * 3)
            await taken(23)
            assert [record.refused for record in await records_of(log, other) if record.refused] == []
            refused = [one.code for record in await records_of(log, wild) for one in record.refused]
            assert {*refused} == {"rate_limited"}

    run(test())


# ---------------------------------------------------------------- when something is away


class Moody:
    """A log that now and then cannot be reached; the real one otherwise."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.is_away = False
        self.appended = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    @property
    def trouble(self) -> str | None:
        return "it is away, says the test" if self.is_away else self._log.trouble

    def append(self, partition: int, body: bytes) -> "asyncio.Future[int]":
        if self.is_away:
            failed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            failed.set_exception(UnavailableError("it is away, says the test"))
            return failed
        self.appended += 1
        return self._log.append(partition, body)


def test_nothing_is_acknowledged_while_the_log_is_away(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as real:
            moody: Any = Moody(real)
            async with bridge(installation, broker, moody) as running:
                await running.connected()
                broker.publish(topic(tenant), ONE)
                await running.done("accepted", 1)
                await running.settled()
                moody.is_away = True
                broker.publish_lines(topic(tenant), [json.dumps(measured(("humidity", n))) for n in range(50)])

                async def says_so() -> bool:
                    return "away" in (running.bridge.trouble or "")

                await until(says_so)
                ended = running.counted("sluice_mqtt_connections_ended_total")
                await asyncio.sleep(0.5)
                assert running.counted("sluice_mqtt_connections_ended_total") == ended  # it does not try in vain
                moody.is_away = False
                await running.done("accepted", 51)
                values = [rows(record)[0][4] for record in await records_of(real, tenant)]
                assert values == [21.5, *map(float, range(50))]
                assert running.bridge.trouble is None

    run(test())


def test_what_is_published_while_no_bridge_is_there_waits(installation: Installation, broker: Broker) -> None:
    """Beyond what a broker keeps by default, and in order."""

    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.open_log() as log:
            async with bridge(installation, broker, log, mqtt_broker="absent") as running:
                await running.connected()
            lines = [json.dumps(measured(("humidity", n % 100))) for n in range(5_000)]
            broker.publish_lines(topic(tenant), lines)
            async with bridge(installation, broker, log, mqtt_broker="absent", mqtt_in_flight_max=50) as running:
                await running.done("accepted", 5_000)
                await running.settled()
                values = [rows(record)[0][4] for record in await records_of(log, tenant)]
                assert values == [float(n % 100) for n in range(5_000)]
                assert running.counted("sluice_mqtt_repeated_messages_total") == 0

    run(test())


def test_a_reading_is_one_row_whichever_way_it_comes_and_however_often(
    timescaledb: Server, timescaledb_template: str, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installation,) = installs = [*islice(made := install(timescaledb, timescaledb_template, tmp_path), 1)]

    async def test() -> None:
        tenant = await installation.tenant()
        timed = measured(("temperature", 21.5), ("humidity", 40), ts=round(time.time()) - 60)
        settings = {"mqtt_broker": uuid4().hex}
        async with installation.open_log() as log:
            rig = Rig(installation.database, log, installation.log_settings)
            async with bridge(installation, broker, log, **settings) as running, installation.face(log=log) as face:
                await running.connected()
                for _ in range(2):
                    broker.publish(topic(tenant), json.dumps(timed))
                    assert (await face.post(tenant.token, timed)).status == 202
                await running.done("accepted", 2)
                await running.settled()
                running.mute(monkeypatch)
                broker.publish_lines(topic(tenant), [ONE] * 100)
                await running.done("accepted", 102)
                await running.kill()
            async with bridge(installation, broker, log, **settings) as second, rig.worker():
                await second.connected()
                await second.settled()
                repeated = second.counted("sluice_mqtt_repeated_messages_total")
                assert repeated == 100
                await rig.landed()
                stored = await rig.readings()
                assert len([row for row in stored if row[0] == "humidity"]) == 1
                assert len([row for row in stored if row[0] == "temperature"]) == 101
                assert await rig.ledger() == (108 + repeated, 102, 6 + repeated, 0, 0)

    try:
        run(test())
    finally:
        assert len(installs) == 1
        next(made, None)


def test_a_bridge_whose_lease_was_taken_is_thrown_out_and_does_not_come_back(
    installation: Installation, broker: Broker
) -> None:
    """It cannot renew, as if the database was away for it alone: it goes on until somebody else connects."""

    async def test() -> None:
        tenant = await installation.tenant()
        name = uuid4().hex
        async with installation.open_log() as log:
            alone: dict[str, Any] = {"mqtt_broker": name, "mqtt_lease_renew_s": 60, "mqtt_lease_ttl_s": 1}
            async with bridge(installation, broker, log, **alone) as late:
                await late.connected()
                await asyncio.sleep(1.1)
                broker.publish(topic(tenant), ONE)
                await late.done("accepted", 1)
                async with bridge(installation, broker, log, mqtt_broker=name) as successor:
                    await successor.connected()
                    broker.publish_lines(topic(tenant), [ONE] * 10)

                    async def has_all() -> bool:
                        return successor.messages("accepted") >= 10

                    await until(has_all)
                    assert late.messages("accepted") == 1
                    assert "lease" in (late.bridge.trouble or "")
                    assert successor.counted("sluice_mqtt_connections_ended_total") == 0
                    fences = {
                        record.delivery.number >> FENCE_SHIFT: record.delivery.again
                        for record in await records_of(log, tenant)
                        if record.delivery is not None
                    }
                    assert fences == {1: False, 2: False}

    run(test())


async def _sessions(*bridges: Running) -> list[int]:
    return [len(running.bridge._sessions) for running in bridges]


def test_bridges_share_the_sessions_and_one_takes_over_what_another_leaves(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        async with installation.open_log() as log, bridge(installation, broker, log, mqtt_broker="shared") as first:
            await first.connected(len(FAMILIES))
            async with bridge(installation, broker, log, mqtt_broker="shared") as second:

                async def shared() -> bool:
                    return sorted(await _sessions(first, second)) == HALVES

                await until(shared)
                for one in (first, second):
                    await one.connected(len(one.bridge._sessions))
                assert second.bridge.trouble is None
            await first.connected(len(FAMILIES))
            query = "SELECT fence, filters <> '{}' FROM mqtt_slots WHERE broker = 'shared' ORDER BY fence"
            assert [is_known for _, is_known in await installation.superuser(query)] == [True] * len(FAMILIES)

    run(test())


def test_a_session_that_the_broker_lost_is_made_again_and_said(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        with own_broker() as broker:
            async with installation.open_log() as log, bridge(installation, broker, log) as running:
                await running.connected()
                await running.settled()
                broker.kill()
                (broker.directory / "mosquitto" / "data" / "mosquitto.db").unlink(missing_ok=True)
                broker.start()

                async def lost() -> bool:
                    return running.counted("sluice_mqtt_sessions_lost_total") == len(FAMILIES)

                await until(lost)
                await running.connected()
                broker.publish(topic(tenant), ONE)
                await running.done("accepted", 1)

    run(test(), timeout_s=120)


def test_a_session_that_is_there_without_its_subscriptions_gets_them(installation: Installation) -> None:
    """As after a broker lost it, and a bridge connected that got no further."""

    async def test() -> None:
        tenant = await installation.tenant()
        with own_broker() as broker:
            async with installation.open_log() as log:
                async with bridge(installation, broker, log, mqtt_broker="empty") as running:
                    await running.connected()
                    ids = [session.lease.session.hex for session, _ in running.bridge._sessions.values()]
                broker.kill()
                (broker.directory / "mosquitto" / "data" / "mosquitto.db").unlink(missing_ok=True)
                broker.start()
                for one in ids:
                    with socket.create_connection(("127.0.0.1", broker.port), 10) as only_connects:
                        only_connects.sendall(connect(Version.V5, Login(f"sluice-{one}", None, None, 60, 3_600, 10)))
                        assert only_connects.recv(4)[3] == 0
                async with bridge(installation, broker, log, mqtt_broker="empty") as running:
                    await running.connected()
                    broker.publish(topic(tenant), ONE)
                    await running.done("accepted", 1)
                    assert running.counted("sluice_mqtt_sessions_lost_total") == 0

    run(test(), timeout_s=120)
