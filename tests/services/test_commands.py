"""Commands on their way to devices: what a real broker is given of them, and what stands in the database."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from api.devices.downlink import CommandDownlink
from runtime.clock import SystemClock
from runtime.sockets import address_of, listen
from schemas.commands import MESSAGE_BYTES_MAX
from schemas.signing import command_parts, is_signed
from tests.bridge_rig import Broker, own_broker
from tests.certificate_rig import people_with_authority
from tests.commands_rig import Sending, command, listening, reaches, sender
from tests.databases import Database
from tests.landing_rig import until
from tests.mosquitto import PROGRAM
from tests.people_rig import RING, People, people
from tests.support import eventually, run

PATH = "/api/v1/plants"


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with own_broker() as started:
        yield started


async def active_plant(here: People, method: str = "TOKEN") -> tuple[str, bytes]:
    """The id of a plant that may be sent commands, and the key that they are signed with."""
    new = {"name": "Plant", "serialNumber": uuid4().hex, "type": "GATEWAY", "authMethod": method}
    plant = str((await here.ask("POST", PATH, here.key, new)).body["id"])
    package = (await here.ask("POST", f"{PATH}/{plant}/provision", here.key)).body
    return plant, bytes.fromhex(package["security"]["hmacSecret"])


async def asked(here: People, plant: str, name: str = "reboot", **more: Any) -> str:
    """The id of a new command."""
    answer = await here.ask("POST", f"{PATH}/{plant}/commands", here.key, {"command": name, **more})
    assert answer.status == 201, answer.body
    assert answer.body["responseStatus"] == "PENDING"
    return str(answer.body["cmdId"])


async def ages(here: People, *commands: str) -> None:
    """Their time is over."""
    sql = "UPDATE commands SET expires_at = now() - interval '1 second' WHERE command_id = ANY ($1::uuid[])"
    await here.superuser(sql, list(commands))


def test_a_command_goes_to_its_plant_signed_and_is_sent_once_the_broker_has_it(
    any_database: Database, broker: Broker
) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant, secret = await active_plant(here)
            async with listening(broker.port, f"cpi/{plant}/#") as device:
                first = await asked(here, plant, payload={"delay": 5, "é": [1.0, None]}, target="PUMP-1")
                async with sender(any_database, broker.url, RING) as sending:
                    await device.hears(1)
                    second = await asked(here, plant, "stop")  # told of: it goes at once
                    await device.hears(2)
                    sent = await reaches(any_database, first, "SENT")
                    await reaches(any_database, second, "SENT")
                    assert sending.counted("sent") == 2
                    assert sending.told("connected") == 1
                (message, _), told = device.heard, device.told()
                assert (str(message.topic), message.qos, message.retain) == (f"cpi/{plant}/command", 1, False)
                assert message.properties is not None
                assert 0 < vars(message.properties)["MessageExpiryInterval"] <= 300
                assert sent["sent_at"] is not None
                assert {name: told[name] for name in ("cmdId", "deviceId", "action", "payload", "target")} == {
                    "cmdId": first, "deviceId": "PUMP-1", "action": "reboot", "payload": {"delay": 5, "é": [1, None]},
                    "target": "PUMP-1",
                }  # fmt: skip
                parts = command_parts("PUMP-1", first, told["ts"], "reboot", told["payload"])
                assert is_signed(secret, told["sig"], *parts)
                told = device.told(1)
                assert (told["deviceId"], told["cmdId"], "target" in told) == (plant, second, False)
                assert is_signed(secret, told["sig"], *command_parts(plant, second, told["ts"], "stop", {}))

    run(test())


def test_an_api_that_ends_after_it_has_answered_loses_none(database: Database, broker: Broker) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            plant, _ = await active_plant(here)
            found = await asked(here, plant)
        async with listening(broker.port, f"cpi/{plant}/command") as device, sender(database, broker.url, RING):
            await device.hears(1)
            await reaches(database, found, "SENT")
            assert device.told()["cmdId"] == found

    run(test())


def test_the_commands_of_a_device_go_in_the_order_in_which_they_were_asked_for(
    database: Database, broker: Broker
) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            plants = [await active_plant(here) for _ in range(2)]
            wanted = {plant: [await asked(here, plant, f"step-{n}") for n in range(20)] for plant, _ in plants}
            async with (
                listening(broker.port, "cpi/+/command") as device,
                sender(database, broker.url, RING),
                sender(database, broker.url, RING),
            ):
                await device.hears(40)
                for plant, commands in wanted.items():
                    heard = [one["cmdId"] for one in map(json.loads, device.payloads) if one["deviceId"] == plant]
                    assert heard == commands
                await reaches(database, wanted[plants[1][0]][-1], "SENT")

    run(test())


class SlowDay:
    """On which everything takes a minute and a half."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0

    def now_us(self) -> int:
        return SystemClock().now_us()

    def monotonic(self) -> float:
        self.elapsed_s += 90
        return self.elapsed_s


def test_a_command_that_waited_behind_others_expires_at_the_broker_when_it_times_out(
    database: Database, broker: Broker
) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            plants = [await active_plant(here) for _ in range(2)]
            for plant, _ in plants:
                await asked(here, plant)
            async with (
                listening(broker.port, "cpi/+/command") as device,
                sender(database, broker.url, RING, SlowDay()),
            ):
                await device.hears(2)
                expires = [getattr(one.properties, "MessageExpiryInterval", 0) for one in device.heard]
                assert 180 < expires[0] <= 210
                assert 90 < expires[1] <= 120

    run(test())


KILLED = """
import asyncio, os, signal, sys
from runtime.clock import SystemClock
from runtime.mqtt import Client, endpoint
from runtime.postgres import PostgresSettings
from runtime.secrets import KeyRing
from workers.commands.metrics import CommandsMetrics
from workers.commands.sender import Commands
from workers.commands.settings import CommandsSettings

send = Client.send

async def send_and_die(self, *arguments, **options):
    await send(self, *arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)

Client.send = send_and_die
commands = Commands(PostgresSettings(database_url=os.environ["SLUICE_DATABASE_URL"]), CommandsSettings(),
                    endpoint(os.environ["SLUICE_MQTT_URL"]), KeyRing.parse(os.environ["SLUICE_SECRET_KEYS"]),
                    SystemClock(), CommandsMetrics())
asyncio.run(commands.run())
"""


def test_a_worker_killed_between_publishing_and_noting_it_is_followed_by_the_same_bytes(
    database: Database, broker: Broker
) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            plant, _ = await active_plant(here)
            found = await asked(here, plant)
            async with listening(broker.port, f"cpi/{plant}/command") as device:
                environment = {"SLUICE_MQTT_URL": broker.url, "SLUICE_SECRET_KEYS": str(RING), **database.environment}
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", KILLED, env=os.environ | environment
                )
                assert await process.wait() == -signal.SIGKILL
                await device.hears(1)
                row = await command(database, found)
                assert (row["state"], row["message"].encode()) == ("PENDING", device.payloads[0])
                # Whoever comes next makes another signature by then, and must not send it.
                answer = await here.ask("POST", f"{PATH}/{plant}/rotate-secret", here.key)
                assert answer.status == 200
                await here.superuser("UPDATE commands SET claimed_until = now()")
                async with sender(database, broker.url, RING):
                    await device.hears(2)
                    await reaches(database, found, "SENT")
                assert device.payloads[0] == device.payloads[1]

    run(test())


def test_of_two_workers_that_both_mean_to_send_one_fixes_what_is_sent(database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            plant, _ = await active_plant(here)
            found = await asked(here, plant)
            fix = "SELECT fixed_message FROM fix_command($1, 'cpi/x/command', $2)"
            messages = [(await here.superuser(fix, found, made))[0][0] for made in ("one", "other")]
            assert messages == ["one", "one"]

    run(test())


def test_while_the_broker_is_away_commands_wait_and_those_whose_time_ends_time_out(database: Database) -> None:
    async def test() -> None:
        with own_broker() as own:
            async with people_with_authority(database) as here, sender(database, own.url, RING) as sending:
                await connected(sending)
                own.kill()
                plant, _ = await active_plant(here)
                late, found = await asked(here, plant, "late"), await asked(here, plant)

                async def says_so() -> bool:
                    return sending.commands.trouble is not None and sending.told("waiting") == 2

                await until(says_so)
                await ages(here, late)
                row = await reaches(database, late, "TIMEOUT")
                assert (row["sent_at"], row["finished_at"] is None) == (None, False)
                assert (await command(database, found))["state"] == "PENDING"
                assert sending.counted("timed_out") == 1
                own.start()
                await reaches(database, found, "SENT")
                assert sending.commands.trouble is None

    run(test())


def nothing_waits(sending: Sending) -> Callable[[], Awaitable[bool]]:
    async def is_so() -> bool:
        return sending.told("waiting") == 0

    return is_so


async def connected(sending: Sending) -> None:
    async def is_so() -> bool:
        return sending.told("connected") == 1

    await until(is_so)


def test_without_a_broker_commands_time_out(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here, sender(any_database, None, None) as sending:
            plant, _ = await active_plant(here)
            found = await asked(here, plant)
            await ages(here, found)
            await reaches(any_database, found, "TIMEOUT")
            assert sending.commands.trouble is None

    run(test())


def test_what_was_sent_and_is_not_answered_in_time_has_timed_out(database: Database, broker: Broker) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here, sender(database, broker.url, RING):
            plant, _ = await active_plant(here)
            found = await asked(here, plant)
            await reaches(database, found, "SENT")
            await ages(here, found)
            await reaches(database, found, "TIMEOUT")

    run(test())


def test_a_suspended_plant_is_sent_nothing_until_it_is_back_and_a_deleted_one_never(
    database: Database, broker: Broker
) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            suspended, _ = await active_plant(here)
            deleted, _ = await active_plant(here)
            waits, never = await asked(here, suspended), await asked(here, deleted)
            assert (await here.ask("POST", f"{PATH}/{suspended}/suspend", here.key)).status == 200
            assert (await here.ask("DELETE", f"{PATH}/{deleted}", here.key)).status == 200
            other, _ = await active_plant(here)
            async with (
                listening(broker.port, "cpi/+/command") as device,
                sender(database, broker.url, RING) as sending,
            ):
                await reaches(database, await asked(here, other), "SENT")
                assert (await command(database, waits))["state"] == "PENDING"
                row = await command(database, never)
                assert (row["state"], json.loads(row["response"])) == ("FAILED", {"reason": "the device was deleted"})
                await until(nothing_waits(sending))
                assert (await here.ask("POST", f"{PATH}/{suspended}/reactivate", here.key)).status == 200
                await reaches(database, waits, "SENT")
                assert [one["deviceId"] for one in map(json.loads, device.payloads)] == [other, suspended]

    run(test())


def test_a_command_that_cannot_be_signed_fails_and_says_why(database: Database, broker: Broker) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            plant, _ = await active_plant(here)
            found = await asked(here, plant)
            async with sender(database, broker.url, None) as sending:
                row = await reaches(database, found, "FAILED")
                assert "SLUICE_SECRET_KEYS" in json.loads(row["response"])["reason"]
                assert sending.counted("unsendable") == 1

    run(test())


def test_what_fills_more_than_a_message_may_have_is_refused_when_it_is_asked_for(
    database: Database, broker: Broker
) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            plant, _ = await active_plant(here)
            path = f"{PATH}/{plant}/commands"
            bodies: list[Any] = [
                {"command": "\u0001" * 200, "payload": {"x": "y" * 7_900}},
                {"command": "x", "payload": {"n": 2**60}},
            ]
            for body in bodies:
                answer = await here.ask("POST", path, here.key, body)
                assert (answer.code, list(answer.body["details"])) == ((400, "BAD_REQUEST"), ["payload"])
            largest = await asked(here, plant, "x", payload={"x": "y" * 7_900})
            async with sender(database, broker.url, RING):
                row = await reaches(database, largest, "SENT")
                assert 7_900 < len(row["message"]) <= MESSAGE_BYTES_MAX

    run(test())


# ---------------------------------------------------------------- the platform face, and identify


async def made_device(here: People, model: str = "diy_esp32") -> str:
    """The id of a device that is no plant."""
    new = {"local_id": f"box-{uuid4().hex[:12]}", "name": "Device", "model": model}
    answer = await here.ask("POST", "/v1/devices", here.key, new)
    assert answer.status == 201
    return str(UUID(answer.body["id"].removeprefix("dev_")))


def test_a_device_of_the_platform_is_sent_a_command_on_its_own_topic(any_database: Database, broker: Broker) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            device = await made_device(here)
            path = f"/api/v1/devices/{device}/commands"
            where = f"v1/gateways/{here.organisation}/{device}/commands"
            async with listening(broker.port, where) as box, sender(any_database, broker.url, RING):
                answer = await here.ask("POST", path, here.key, {"command": "restart", "payload": {"delay": 1}})
                assert (answer.status, answer.body["state"]) == (201, "PENDING")
                assert answer.headers["Location"] == f"{path}/{answer.body['command_id']}"
                await box.hears(1)
                told = box.told()
                assert (told["cmdId"], told["payload"], "sig" in told) == (
                    answer.body["command_id"],
                    {"delay": 1},
                    False,
                )
                await reaches(any_database, told["cmdId"], "SENT")
            one = await here.ask("GET", f"{path}/{told['cmdId']}", here.key)
            assert (one.status, one.body["state"], one.body["sent_at"] is not None) == (200, "SENT", True)
            later = (await here.ask("POST", path, here.key, {"command": "later"})).body["command_id"]
            first = await here.ask("GET", path, here.key, limit=1)
            assert [row["command_id"] for row in first.body["data"]] == [later]
            rest = await here.ask("GET", path, here.key, cursor=first.body["next_cursor"])
            assert ([row["command_id"] for row in rest.body["data"]], rest.body["next_cursor"]) == (
                [told["cmdId"]],
                None,
            )
            assert (await here.ask("GET", f"{path}/{uuid4()}", here.key)).code == (404, "command_not_found")

    run(test())


def test_a_plant_is_sent_what_the_platform_asks_for_as_a_plant(database: Database, broker: Broker) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            plant, secret = await active_plant(here)
            path = f"/api/v1/devices/{plant}/commands"
            async with listening(broker.port, f"cpi/{plant}/command") as device, sender(database, broker.url, RING):
                found = (await here.ask("POST", path, here.key, {"command": "reboot"})).body["command_id"]
                await device.hears(1)
                told = device.told()
                assert is_signed(secret, told["sig"], *command_parts(plant, found, told["ts"], "reboot", {}))
            assert (await here.ask("POST", f"{PATH}/{plant}/suspend", here.key)).status == 200
            assert (await here.ask("POST", path, here.key, {"command": "reboot"})).code == (409, "device_inactive")

    run(test())


def test_as_many_commands_wait_for_a_device_as_may(database: Database) -> None:
    async def test() -> None:
        async with people(database, api={"commands_open_max": 2}) as here:
            path = f"/api/v1/devices/{await made_device(here)}/commands"
            for status in (201, 201, 429):
                assert (await here.ask("POST", path, here.key, {"command": "x"})).status == status

    run(test())


def test_a_model_that_listens_is_told_to_show_itself_and_others_are_not(database: Database, broker: Broker) -> None:
    async def test() -> None:
        async with people(database, downlink=CommandDownlink(100)) as here:
            device = await made_device(here)
            topic = f"opensense/{here.organisation}/{device}/cmd/identify"
            async with listening(broker.port, topic) as lamp, sender(database, broker.url, RING):
                answer = await here.ask("POST", f"/v1/devices/dev_{UUID(device).hex}/identify", here.key)
                assert (answer.status, answer.body["status"]) == (202, "sent")
                await lamp.hears(1)
                assert (lamp.told()["action"], lamp.told()["payload"]) == ("identify", {"seconds": 30})
            for model in ("shelly-plus-plug-s", "generic_mqtt", "shelly-h-t"):
                other = UUID(await made_device(here, model)).hex
                answer = await here.ask("POST", f"/v1/devices/dev_{other}/identify", here.key)
                assert answer.status == 409, model
        async with people(database) as here:
            device = UUID(await made_device(here)).hex
            assert (await here.ask("POST", f"/v1/devices/dev_{device}/identify", here.key)).status == 409

    run(test())


def test_what_a_device_said_of_itself_and_since_when_it_is_there_is_told(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            device = await made_device(here)
            path = f"/api/v1/devices/{device}/health"
            silent = (await here.ask("GET", path, here.key)).body
            assert silent == {"device_id": device, "online": False} | dict.fromkeys(
                ("online_changed_at", "last_seen_at", "fw_version", "health", "info", "config")
            )
            microseconds = "(extract(epoch FROM now() - timestamptz '2000-01-01Z') * 1e6)::bigint"
            await here.superuser(f"SELECT devices_heard(ARRAY[$1::uuid], ARRAY[{microseconds}])", device)
            said = '{"report": {"cpu": 1}, "told": {"fw_version": "3"}}'
            await here.superuser("SELECT device_said(gen_random_uuid(), $1, 'health', $2::text::jsonb)", device, said)
            told = (await here.ask("GET", path, here.key)).body
            assert (told["online"], told["fw_version"], told["health"]["report"]) == (True, "3", {"cpu": 1})
            assert told["online_changed_at"] == told["last_seen_at"]
            whole = (await here.ask("GET", f"/v1/devices/dev_{UUID(device).hex}", here.key)).body
            assert (whole["online"], whole["online_changed_at"]) == (True, told["online_changed_at"])
            await here.superuser(f"SELECT devices_gone(ARRAY[$1::uuid], ARRAY[{microseconds}])", device)
            told = (await here.ask("GET", path, here.key)).body
            assert (told["online"], told["online_changed_at"] > told["last_seen_at"]) == (False, True)

    run(test())


@contextmanager
def silencing_broker(directory: Path) -> Iterator[str]:
    """A Mosquitto whose ACL lets nobody publish: its URL."""
    with listen("TEST", "127.0.0.1:0") as free:
        port = address_of(free).port
    (directory / "acl").write_text("topic read #\n")
    (directory / "acl").chmod(0o600)
    config = directory / "mosquitto.conf"
    acl = directory / "acl"
    config.write_text(
        f"user root\nallow_anonymous true\nlistener {port} 127.0.0.1\nacl_file {acl}\nlog_dest stderr\n"
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "-c", str(config)], stdout=log, stderr=log)
    try:
        eventually("the broker runs", lambda: b" running" in (directory / "log").read_bytes())
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def test_a_command_that_the_broker_refuses_is_not_sent(database: Database, tmp_path: Path) -> None:
    """It answers with a PUBACK that says so."""

    async def test() -> None:
        with silencing_broker(tmp_path) as url:
            async with people_with_authority(database) as here, sender(database, url, RING) as sending:
                plant, _ = await active_plant(here)
                found = await asked(here, plant)

                async def says_so() -> bool:
                    return sending.counted("refused") > 0 and "authorized" in (sending.commands.trouble or "")

                await until(says_so)
                assert (await command(database, found))["state"] == "PENDING"
                assert sending.counted("sent") == 0

    run(test())
