"""What plants and gateways say beside readings, over a real broker: what the database has of it, and who is there."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from bench.proxy import Proxy
from ingest import registry
from ingest.mqtt import events
from runtime.ids import uuid7
from tests.bridge_rig import Broker, Running, bridge, own_broker
from tests.databases import Database
from tests.ingest_rig import Installation, Tenant, measured
from tests.landing_rig import until
from tests.support import run

ACTIVE_PLANT = """
INSERT INTO plants (device_id, organisation_id, serial_number, type, auth_method, lifecycle)
VALUES ($1, $2, $3, 'GATEWAY', 'MTLS', 'ACTIVE')
"""
COMMAND = """
INSERT INTO commands (command_id, organisation_id, device_id, command, state, expires_at)
VALUES ($1, $2, $3, 'reboot', $4, now() + interval '5 minutes')
"""


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with own_broker() as started:
        yield started


@dataclass
class Plant:
    """A plant of an installation, and what the database has of it."""

    installation: Installation
    tenant: Tenant
    broker: Broker

    @property
    def id(self) -> UUID:
        return self.tenant.device

    def say(self, kind: str, told: Any, *options: str) -> None:
        payload = told if isinstance(told, bytes | str) else json.dumps(told)
        self.broker.publish(f"cpi/{self.id}/{kind}", payload, *options)

    async def row(self, table: str) -> Any:
        (found,) = await self.rows(f"SELECT * FROM {table} WHERE device_id = $1", self.id)
        return found

    async def rows(self, sql: str, *values: Any) -> list[Any]:
        connection = await asyncpg.connect(self.installation.database.superuser_url)
        try:
            return list(await connection.fetch(sql, *values))
        finally:
            await connection.close()

    async def command(self, state: str = "SENT") -> UUID:
        command = uuid7()
        await self.installation.superuser(COMMAND, command, self.tenant.organisation, self.id, state)
        return command

    async def state(self, command: UUID) -> Any:
        return (await self.rows("SELECT * FROM commands WHERE command_id = $1", command))[0]

    async def alerts(self) -> list[Any]:
        return await self.rows("SELECT * FROM plant_alerts WHERE device_id = $1 ORDER BY created_at", self.id)


async def plant(installation: Installation, broker: Broker) -> Plant:
    tenant = await installation.tenant()
    await installation.superuser(ACTIVE_PLANT, tenant.device, tenant.organisation, uuid4().hex)
    return Plant(installation, tenant, broker)


@asynccontextmanager
async def bridged(installation: Installation, broker: Broker, **settings: Any) -> AsyncIterator[Running]:
    async with installation.open_log() as log, bridge(installation, broker, log, **settings) as running:
        await running.connected()
        yield running


# ---------------------------------------------------------------- answers


def test_a_plant_acknowledges_a_command_and_says_what_became_of_it(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        first, second, third = [await one.command() for _ in range(3)]
        async with bridged(installation, broker) as running:
            one.say("ack", {"cmdId": str(first)})
            await running.done("noted", 1)
            row = await one.state(first)
            assert (row["state"], row["response"]) == ("ACKNOWLEDGED", None)
            assert row["acked_at"] is not None
            one.say("ack", {"cmdId": str(first), "status": "success", "response": {"uptime": 3}})
            one.say("ack", {"cmdId": second.hex, "status": "FAILED", "error": "no such relay"})
            one.say("ack", {"cmdId": str(third), "status": "SUCCESS", "response": {"dump": "x" * 9_000}})
            await running.done("noted", 4)
            row = await one.state(first)
            assert (row["state"], json.loads(row["response"])) == ("SUCCESS", {"uptime": 3})
            row = await one.state(second)
            assert (row["state"], json.loads(row["response"])) == ("FAILED", {"error": "no such relay"})
            row = await one.state(third)
            assert (row["state"], list(json.loads(row["response"]))) == ("SUCCESS", ["omitted"])
            await running.settled()

    run(test())


def test_a_gateway_answers_on_its_own_topic(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        command = await one.command()
        topic = f"v1/gateways/{one.tenant.organisation}/{one.id}/commands/response"
        async with bridged(installation, broker) as running:
            broker.publish(topic, json.dumps({"commandId": str(command), "status": "COMPLETED"}))
            await running.done("noted", 1)
            assert (await one.state(command))["state"] == "SUCCESS"

    run(test())


def test_nobody_answers_for_another_twice_or_to_what_was_never_asked(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        one, other = await plant(installation, broker), await plant(installation, broker)
        command, over = await one.command(), await one.command("TIMEOUT")
        foreign = f"v1/gateways/{other.tenant.organisation}/{one.id}/commands/response"
        async with bridged(installation, broker) as running:
            other.say("ack", {"cmdId": str(command), "status": "SUCCESS"})
            one.say("ack", {"cmdId": str(uuid4()), "status": "SUCCESS"})
            await running.done("unknown_command", 2)
            broker.publish(foreign, json.dumps({"cmdId": str(command), "status": "SUCCESS"}))
            await running.done("foreign_organisation", 1)
            assert (await one.state(command))["state"] == "SENT"
            one.say("ack", {"cmdId": str(command), "status": "FAILED"})
            await running.done("noted", 1)
            row = await one.state(command)
            one.say("ack", {"cmdId": str(command), "status": "FAILED"})
            one.say("ack", {"cmdId": str(command), "status": "SUCCESS"})
            one.say("ack", {"cmdId": str(command)})
            one.say("ack", {"cmdId": str(over), "status": "SUCCESS"})
            await running.done("repeated", 4)
            assert await one.state(command) == row
            assert (await one.state(over))["state"] == "TIMEOUT"
            await running.settled()

    run(test())


def test_an_answer_may_overtake_the_note_that_its_command_was_sent(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        command = await one.command("PENDING")
        async with bridged(installation, broker) as running:
            one.say("ack", {"cmdId": str(command)})
            await running.done("noted", 1)
            assert await one.rows("SELECT command_sent($1)", command) == [(False,)]
            row = await one.state(command)
            assert (row["state"], row["sent_at"] is not None) == ("ACKNOWLEDGED", True)

    run(test())


# ---------------------------------------------------------------- alarms


def test_an_alarm_opens_an_alert_however_often_it_is_sent_until_it_is_over(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        alarm = {"type": "OVER_TEMPERATURE", "severity": "critical", "message": "88 °C"}
        async with bridged(installation, broker) as running:
            one.say("alarm", alarm)
            one.say("alarm", alarm)
            one.say("alarm", {"type": "DOOR_OPEN"})
            await running.done("noted", 2)
            await running.done("repeated", 1)
            found = {row["type"]: (row["severity"], row["status"], row["message"]) for row in await one.alerts()}
            assert found == {
                "OVER_TEMPERATURE": ("CRITICAL", "ACTIVE", "88 °C"),
                "DOOR_OPEN": ("WARNING", "ACTIVE", "DOOR_OPEN"),
            }
            one.say("alarm", {"type": "OVER_TEMPERATURE", "status": "CLEARED"})
            await running.done("noted", 3)
            standing = {row["type"]: row["status"] for row in await one.alerts()}
            assert standing == {"OVER_TEMPERATURE": "RESOLVED", "DOOR_OPEN": "ACTIVE"}
            one.say("alarm", alarm)
            await running.done("noted", 4)
            assert sorted((row["type"], row["status"]) for row in await one.alerts()) == [
                ("DOOR_OPEN", "ACTIVE"), ("OVER_TEMPERATURE", "ACTIVE"), ("OVER_TEMPERATURE", "RESOLVED"),
            ]  # fmt: skip

    run(test())


def test_an_alarm_of_one_moment_that_is_over_is_not_opened_by_its_repeat(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        ((now_ms,),) = await one.rows("SELECT (extract(epoch FROM now()) * 1000)::bigint")
        alarm = {"type": "SMOKE", "severity": "CRITICAL", "message": "smoke", "ts": now_ms}
        async with bridged(installation, broker) as running:
            for told in (alarm, {"type": "SMOKE", "status": "RESOLVED"}, alarm, alarm | {"ts": now_ms + 1}):
                one.say("alarm", told)
            await running.done("noted", 3)
            await running.done("repeated", 1)
            assert sorted(row["status"] for row in await one.alerts()) == ["ACTIVE", "RESOLVED"]

    run(test())


async def only_plant(connection: Any) -> UUID:
    """In a database where nothing else is."""
    organisation, device = uuid7(), uuid7()
    await connection.execute("INSERT INTO organisations (organisation_id, name) VALUES ($1, 'x')", organisation)
    await connection.execute(
        "INSERT INTO devices (device_id, organisation_id, name, local_id) VALUES ($1, $2, 'x', 'x')",
        device, organisation,
    )  # fmt: skip
    await connection.execute(ACTIVE_PLANT, device, organisation, "x")
    return device


PLANS = """
LOAD 'auto_explain';
SET client_min_messages = log; SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on;
SET auto_explain.log_analyze = on; SET auto_explain.log_timing = off; SET auto_explain.log_format = json;
SET enable_hashjoin = off; SET enable_mergejoin = off;
"""


def test_an_alarm_goes_through_a_plant_s_alerts_a_few_times_whatever_the_planner_believes(database: Database) -> None:
    """As before the first ANALYZE of the table, when it takes a nested loop for cheap."""

    async def test() -> None:
        connection = await asyncpg.connect(database.superuser_url)
        device = await only_plant(connection)
        said = """SELECT device_said(gen_random_uuid(), $1, 'alarm', jsonb_build_object('type', 'T',
            'severity', 'INFO', 'message', gen_random_uuid(), 'is_over', false)) FROM generate_series(1, $2::int)"""
        await connection.execute(said, device, 1_300)
        told: list[str] = []
        connection.add_log_listener(lambda _, message: told.append(message.message))
        await connection.execute(PLANS)
        await connection.execute(said, device, 1)
        await connection.close()
        plans = [json.loads(one[one.index("{") :]) for one in told if "Query Text" in one]
        bounds = [one["Plan"] for one in plans if "OFFSET" in one["Query Text"]]
        assert len(bounds) == 2
        assert all(_rows(plan) < 10_000 for plan in bounds), [_rows(plan) for plan in bounds]

    run(test())


def _rows(plan: dict[str, Any]) -> float:
    """How many a plan's nodes gave, or passed over, in all."""
    here = plan["Actual Loops"] * (plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0))
    return float(here + sum(_rows(part) for part in plan.get("Plans", ())))


def test_a_plant_has_a_hundred_open_alerts_at_most_and_what_is_worst_stays(
    any_database: Database,
) -> None:
    async def test() -> None:
        connection = await asyncpg.connect(any_database.superuser_url)
        device = await only_plant(connection)
        await connection.execute("SET ROLE sluice_ingest")
        said = (
            "SELECT device_said(gen_random_uuid(), $1, 'alarm', jsonb_build_object('type', 'T', 'severity', $2::text,"
        )
        said += " 'message', $3::text, 'is_over', false))"
        assert await connection.fetchval(said, device, "CRITICAL", "the worst") == "noted"
        for number in range(1_100):
            assert await connection.fetchval(said, device, "INFO", str(number)) == "noted"
        await connection.execute("RESET ROLE")
        rows = await connection.fetch("SELECT status, message FROM plant_alerts WHERE device_id = $1", device)
        standing = {row["message"] for row in rows if row["status"] == "ACTIVE"}
        assert standing == {"the worst", *map(str, range(1_001, 1_100))}
        assert len(rows) <= 1_001
        await connection.close()

    run(test())


# ---------------------------------------------------------------- reports


def test_what_a_plant_reports_of_itself_stands_in_its_fields(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        before = (await one.row("devices"))["version"]
        info = {"fwVersion": "2.1", "esiState": "PLC_READY", "capacityKwh": 12.5, "plantWithLoad": True, "other": [1]}
        async with bridged(installation, broker) as running:
            one.say("info", info)
            one.say("config", {"configEnabled": True, "capacityKwh": "a lot", "fvePeakPowerKwp": -1})
            await running.done("noted", 2)
            row, device = await one.row("plants"), await one.row("devices")
            names = ("esi_state", "capacity_kwh", "plant_with_load", "config_enabled", "fve_peak_power_kwp")
            assert [row[name] for name in names] == ["PLC_READY", 12.5, True, True, None]
            assert (device["fw_version"], device["version"]) == ("2.1", before + 2)
            one.say("info", info)
            await running.done("noted", 3)
            assert (await one.row("devices"))["version"] == before + 2  # nothing of it is new
            kept = await one.rows("SELECT kind, report FROM device_reports WHERE device_id = $1 ORDER BY 1", one.id)
            assert [(row["kind"], list(json.loads(row["report"]))) for row in kept] == [
                ("config", ["capacityKwh", "configEnabled", "fvePeakPowerKwp"]),
                ("info", ["other", "esiState", "fwVersion", "capacityKwh", "plantWithLoad"]),
            ]

    run(test())


def test_what_gateways_report_is_kept_and_what_is_retained_is_told_again(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        begin = f"v1/gateways/{tenant.organisation}/{tenant.device}"
        info = f"opensense/{tenant.organisation}/{tenant.device}/info"
        try:
            broker.publish(info, json.dumps({"fw_version": "1.0"}), "-r")
            async with bridged(installation, broker) as running:
                broker.publish(f"{begin}/health", json.dumps({"cpu": 0.4}))
                broker.publish(f"{begin}/config/reported", json.dumps({"version": 7}))
                await running.done("noted", 3)
                sql = "SELECT kind, report FROM device_reports WHERE device_id = $1 ORDER BY 1"
                kept = {kind: json.loads(told) for kind, told in await installation.superuser(sql, tenant.device)}
                assert kept == {"config": {"version": 7}, "health": {"cpu": 0.4}, "info": {"fw_version": "1.0"}}
                firmware = "SELECT fw_version FROM devices WHERE device_id = $1"
                assert await installation.superuser(firmware, tenant.device) == [("1.0",)]
        finally:
            broker.forget(info)

    run(test())


# ---------------------------------------------------------------- what is no good

MALFORMED: list[tuple[str, bytes]] = [
    ("ack", b"garbage"),
    ("ack", b"[]"),
    ("ack", b"\xff\x00"),
    ("ack", b"{}"),
    ("ack", b'{"cmdId":"x"}'),
    ("ack", b'{"cmdId":5}'),
    ("ack", b'{"cmdId":"01900000-0000-7000-8000-000000000001","status":"MAYBE"}'),
    ("ack", b'{"cmdId":"01900000-0000-7000-8000-000000000001","response":{"a":"\\u0000"}}'),
    ("ack", b'{"cmdId":"01900000-0000-7000-8000-000000000001","response":' + b"[" * 5_000 + b"]" * 5_000 + b"}"),
    ("alarm", b'{"severity":"INFO"}'),
    ("alarm", b'{"type":""}'),
    ("alarm", b'{"type":"' + b"x" * 65 + b'"}'),
    ("alarm", b'{"type":"T","severity":"AWFUL"}'),
    ("alarm", b'{"type":"T","message":5}'),
    ("alarm", b'{"type":"T","status":"?"}'),
    ("alarm", b'{"type":"T","message":"' + b"x" * 300_000 + b'"}'),
    ("info", b'{"x":"' + b"x" * 20_000 + b'"}'),
    ("config", b"5"),
    ("status", b"perhaps"),
    ("status", b'{"status":null}'),
    ("status", b"online" * 1_000),
    ("status", b'{"online":' + b"[" * 1_010),
    ("status", b'{"online":' + b"9" * 900 + b"}"),
]


def test_what_is_malformed_is_counted_acknowledged_and_nothing_else(
    installation: Installation, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        unlimited: dict[str, Any] = {"limit_device_requests_per_minute": 0}
        async with bridged(installation, broker, **unlimited) as running:
            for kind, payload in MALFORMED:
                one.say(kind, payload)
            await running.done("malformed", len(MALFORMED))
            assert await one.alerts() == []
            assert await one.rows("SELECT * FROM device_reports WHERE device_id = $1", one.id) == []
            one.say("alarm", {"type": "T", "message": "x" * 5_000, "ts": "yesterday"})
            await running.done("noted", 1)
            assert [len(row["message"]) for row in await one.alerts()] == [1_000]
            one.say("info", b'{"fwVersion":"7","capacityKwh":' + b"9" * 400 + b"}")
            await running.done("noted", 2)
            assert (await one.row("devices"))["fw_version"] == "7"
            assert running.counted("sluice_mqtt_connections_ended_total") == 0
            await running.settled()
            # Foreseen, all of it: nobody is to flood the log with errors.
            assert not [record for record in caplog.records if record.levelname == "ERROR"]

    run(test())


def test_who_is_suspended_unknown_or_no_plant_is_not_listened_to(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        one, plain = await plant(installation, broker), await installation.tenant()
        async with bridged(installation, broker) as running:
            broker.publish(f"cpi/{uuid4()}/alarm", '{"type":"T"}')
            broker.publish("cpi/not-an-id/alarm", '{"type":"T"}')
            broker.publish(f"cpi/{plain.device}/alarm", '{"type":"T"}')
            await running.done("unknown_device", 1)
            await running.done("malformed_topic", 1)
            await running.done("no_plant", 1)
            status = "UPDATE devices SET status = 'suspended' WHERE device_id = $1"
            await installation.execute(one.tenant, status, one.id)
            await asyncio.sleep(1)
            one.say("alarm", {"type": "T"})
            await running.done("suspended", 1)
            assert await one.alerts() == []

    run(test())


def test_retained_alarms_and_answers_are_not_new_and_an_emptied_topic_says_nothing(
    installation: Installation, broker: Broker
) -> None:
    """MQTT 3.1.1 sends what is retained on each subscription, wanted or not."""

    async def test() -> None:
        one = await plant(installation, broker)
        one.say("alarm", {"type": "T"}, "-r")
        one.say("status", "online", "-r")
        try:
            async with bridged(installation, broker, mqtt_version="3.1.1") as running:
                await running.done("retained", 2)
                assert await one.alerts() == []
        finally:
            for kind in ("alarm", "status"):
                broker.forget(f"cpi/{one.id}/{kind}")
        async with bridged(installation, broker) as running:
            broker.forget(f"cpi/{one.id}/alarm")
            await running.done("empty", 1)

    run(test())


def test_over_its_limit_a_device_s_events_wait_and_are_dropped_in_the_end(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        settings: dict[str, Any] = {"limit_device_requests_per_minute": 2, "mqtt_limit_wait_s": 0}
        async with bridged(installation, broker, **settings) as running:
            for number in range(4):
                one.say("alarm", {"type": "T", "message": str(number)})
            await running.done("noted", 2)
            await running.done("rate_limited", 2)
            assert len(await one.alerts()) == 2

    run(test())


def test_a_storm_of_alarms_keeps_no_answer_waiting_and_answers_have_a_limit_too(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        commands = [await one.command() for _ in range(10)]
        settings: dict[str, Any] = {"limit_device_requests_per_minute": 2, "mqtt_limit_wait_s": 3_600}
        async with bridged(installation, broker, **settings) as running:
            topic, alarms = f"cpi/{one.id}/%s", [json.dumps({"type": "T", "message": str(n)}) for n in range(400)]
            answers = [json.dumps({"cmdId": str(command)}) for command in commands]
            broker.publish_lines(topic % "alarm", alarms)
            broker.publish_lines(topic % "ack", answers)

            async def answered() -> list[bool]:
                return [(await one.state(command))["state"] == "ACKNOWLEDGED" for command in commands]

            async def are_two() -> bool:
                return all((await answered())[:2])

            await until(are_two)
            assert running.counted("sluice_mqtt_held_messages") > 300
            assert sum(await answered()) <= 4  # a minute may have begun

    run(test())


# ---------------------------------------------------------------- when the database is away


def test_nothing_is_acknowledged_before_the_database_has_it_and_readings_go_on_meanwhile(
    installation: Installation, broker: Broker
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        command = await one.command()
        url = urlsplit(installation.database.url)
        assert url.port is not None
        async with Proxy(0, url.port) as proxy, installation.open_log() as log:
            assert proxy._server is not None
            port = proxy._server.sockets[0].getsockname()[1]
            through = installation.database.url.replace(f":{url.port}/", f":{port}/")
            settings = {"mqtt_broker": uuid4().hex}
            async with bridge(installation, broker, log, database_url=through, **settings) as running:
                await running.connected()
                one.say("info", {"fwVersion": "1"})
                await running.done("noted", 1)
                await running.settled()
                proxy.refuse = True
                proxy.cut()
                one.say("alarm", {"type": "T"})
                one.say("ack", {"cmdId": str(command), "status": "SUCCESS"})

                async def waits() -> bool:
                    return (
                        running.bridge._intake.trouble is not None
                        and running.counted("sluice_mqtt_in_flight_messages") == 2
                    )

                await until(waits)
                broker.publish(
                    f"v1/readings/{one.tenant.organisation}/{one.id}", json.dumps(measured(("humidity", 4)))
                )
                await running.done("accepted", 1)
                await running.kill()
            # Nothing was acknowledged: whoever has the session next is sent them once more.
            assert (await one.alerts(), (await one.state(command))["state"]) == ([], "SENT")
            proxy.refuse = False
            async with bridge(installation, broker, log, **settings) as running:
                await running.done("noted", 2)
                assert running.counted("sluice_mqtt_repeated_messages_total", family="plant-events") == 2
                await running.settled()
        assert [row["status"] for row in await one.alerts()] == ["ACTIVE"]
        assert (await one.state(command))["state"] == "SUCCESS"

    run(test())


def test_more_than_the_database_takes_in_time_is_kept_a_part_at_a_time(
    installation: Installation, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        slow = "SELECT pg_sleep(0.1 * (SELECT count(*) FROM unnest($1::uuid[])))"
        async with installation.open_log() as log, bridge(installation, broker, log) as running:
            await running.connected()
            ask, patience_s = registry.ask, 1.0

            async def ask_slowly(pool: Any, query: str, *values: Any, timeout_s: float) -> list[Any]:
                began = asyncio.get_running_loop().time()
                await ask(pool, slow, values[0], timeout_s=patience_s)
                took_s = asyncio.get_running_loop().time() - began
                return await ask(pool, query, *values, timeout_s=timeout_s - took_s)

            monkeypatch.setattr(events, "ask", ask_slowly)
            monkeypatch.setattr(events, "_RETRY_S", 0.01)
            alarms = [json.dumps({"type": "T", "message": str(number)}) for number in range(40)]
            broker.publish_lines(f"cpi/{one.id}/alarm", alarms)
            await running.done("noted", 40)
            await running.settled()
        assert len(await one.alerts()) == 40

    run(test())


def test_what_was_kept_and_could_not_be_acknowledged_is_kept_once(
    installation: Installation, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        command = await one.command()
        settings = {"mqtt_broker": uuid4().hex}
        async with installation.open_log() as log:
            async with bridge(installation, broker, log, **settings) as running:
                await running.connected()
                await running.settled()
                running.mute(monkeypatch)
                one.say("alarm", {"type": "T"})
                one.say("ack", {"cmdId": str(command), "status": "SUCCESS"})
                await running.done("noted", 2)
                await running.kill()
            row = await one.state(command)
            async with bridge(installation, broker, log, **settings) as running:
                await running.done("repeated", 2)
                await running.settled()
        assert len(await one.alerts()) == 1
        assert await one.state(command) == row

    run(test())


# ---------------------------------------------------------------- presence


async def presence(one: Plant) -> tuple[bool, bool]:
    """Whether it is there, and whether it was ever heard."""
    row = await one.row("devices")
    return row["online"], row["last_seen_at"] is not None


async def comes(one: Plant, *wanted: bool) -> None:
    async def is_so() -> bool:
        return await presence(one) == wanted

    await until(is_so)


@pytest.mark.parametrize("topic", ["cpi/{device}/status", "v1/gateways/{organisation}/{device}/status",
                                   "opensense/{organisation}/{device}/lwt"])  # fmt: skip
def test_a_device_is_there_while_it_says_so_and_gone_with_its_last_will(
    installation: Installation, broker: Broker, topic: str
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        where = topic.format(organisation=one.tenant.organisation, device=one.id)
        async with bridged(installation, broker, mqtt_presence_flush_s=0.05):
            assert await presence(one) == (False, False)
            broker.publish(where, '{"status":"ONLINE"}')
            await comes(one, True, True)
            since = (await one.row("devices"))["online_changed_at"]
            broker.publish(where, "Offline")
            await comes(one, False, True)
            row = await one.row("devices")
            assert row["online_changed_at"] == row["offline_at"] > since
            broker.publish(where, "true")
            await comes(one, True, True)
            row = await one.row("devices")
            assert (row["offline_at"], row["online_changed_at"] > since) == (None, True)

    run(test())


def test_whatever_a_device_says_tells_that_it_is_there(installation: Installation, broker: Broker) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        async with bridged(installation, broker, mqtt_presence_flush_s=0.05):
            one.say("info", {"fwVersion": "1"})
            await comes(one, True, True)

    run(test())


def test_a_retained_will_that_comes_after_a_reconnect_changes_nothing(
    installation: Installation, broker: Broker
) -> None:
    """Neither told again because a bridge subscribed, nor repeated because one was cut off."""

    async def test() -> None:
        one = await plant(installation, broker)
        one.say("status", "offline", "-r")
        try:
            one_flush = {"mqtt_presence_flush_s": 0.05}
            async with bridged(installation, broker, mqtt_version="3.1.1", **one_flush) as running:
                await running.done("retained", 1)
                one.say("info", {"fwVersion": "1"})
                await comes(one, True, True)
            async with bridged(installation, broker, mqtt_version="3.1.1", **one_flush) as running:
                await running.done("retained", 1)
                one.say("info", {"fwVersion": "2"})
                await running.done("noted", 1)
                assert await presence(one) == (True, True)
        finally:
            broker.forget(f"cpi/{one.id}/status")

    run(test())


def test_a_will_that_the_broker_repeats_is_no_news(
    installation: Installation, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        one = await plant(installation, broker)
        settings: dict[str, Any] = {"mqtt_broker": uuid4().hex, "mqtt_presence_flush_s": 0.05}
        async with installation.open_log() as log:
            async with bridge(installation, broker, log, **settings) as running:
                await running.connected()
                await running.settled()
                running.mute(monkeypatch)
                one.say("status", "offline")
                one.say("status", "online")
                await comes(one, True, True)
                await running.kill()
            async with bridge(installation, broker, log, **settings) as running:
                await running.done("repeated", 2)
                one.say("info", {})
                await running.done("noted", 1)
                assert await presence(one) == (True, True)

    run(test())
