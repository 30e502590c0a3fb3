"""A real Mosquitto, as it is delivered, that lets in and throws out whom the registry says: on each listener."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiomqtt
import asyncpg
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from api.registry.credentials import Credentials
from api.registry.devices import add_device
from api.registry.organisations import acting_for
from runtime.postgres import connect
from runtime.secrets import TokenHasher
from tests.broker_rig import (
    BRIDGE_PASSWORD,
    LISTENERS,
    MTLS,
    OURS,
    PASSWORD,
    SITES,
    Kept,
    certify,
    configured,
    ended,
    is_let_in,
    is_taken,
    keeping,
    secured,
    seed,
    until,
)
from tests.certificate_rig import people_with_authority
from tests.commands_rig import sender
from tests.databases import Database
from tests.people_rig import RING, People
from tests.services.test_plants_face import PATH, active, step
from tests.support import run

SITE = {"name": "Kitchen", "slug": "kitchen", "timezone": "Europe/Prague"}
METHODS = sorted(LISTENERS)
PENDING = {"name": "Plant", "serialNumber": "pending", "type": "SENSOR", "authMethod": "PASSWORD"}
COMMAND = {"command": "reboot"}
#: What is promised of cutting off.
CUT_OFF_S = 5.0


@asynccontextmanager
async def stage(directory: Path, database: Database, **more: str) -> AsyncIterator[tuple[People, Kept]]:
    async with people_with_authority(database) as here, secured(directory, database, **more) as kept:
        yield here, kept


async def token_of(here: People, plant: str) -> str:
    answer = await here.ask("POST", f"{PATH}/{plant}/mqtt-token", here.key)
    assert answer.status == 200, answer.body
    token: str = answer.body["token"]
    return token


async def equipped(here: People, method: str) -> tuple[str, Any]:
    """A plant, and what it shows: its package, token or password."""
    plant, package = await active(here, method)
    if method == "TOKEN":
        return plant, await token_of(here, plant)
    return plant, package if method == "MTLS" else package["security"]["password"]


def client(kept: Kept, method: str, plant: str, shown: Any, client_id: str = "any") -> aiomqtt.Client:
    if method == "MTLS":
        return kept.broker.certified(shown, client_id)
    return kept.broker.client(LISTENERS[method], plant, shown, client_id)


async def let_in(kept: Kept, method: str, plant: str, shown: Any) -> None:
    """Once it is known; a certificate is at once."""
    await until("it is let in", lambda: is_let_in(client(kept, method, plant, shown)))


# ---------------------------------------------------------------- who may say what


@pytest.mark.parametrize("method", METHODS)
def test_a_plant_says_and_hears_what_is_its_own(database: Database, tmp_path: Path, method: str) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            plant, shown = await equipped(here, method)
            await let_in(kept, method, plant, shown)
            for name in ("telemetry", "ack", "alarm", "status", "info", "config"):
                assert await is_taken(client(kept, method, plant, shown), f"cpi/{plant}/{name}"), name
            for topic in (
                f"cpi/{uuid4()}/telemetry", f"cpi/{plant}/command", "cpi", f"v1/readings/a/{uuid4()}",
                "$CONTROL/dynamic-security/v1", f"cpi/{plant}/telemetry/more",
            ):  # fmt: skip
                assert not await is_taken(client(kept, method, plant, shown), topic), topic
            assert await is_taken(client(kept, method, plant, shown), f"v1/readings/any/{plant}")
            # Whoever asks for everything hears what is its own, and nothing else.
            async with client(kept, method, plant, shown) as listening:
                await listening.subscribe("#", qos=1)
                await listening.subscribe("$CONTROL/#", qos=1)
                async with kept.broker.client(OURS, "sluice-commands", "commands-password") as sender:
                    for topic in (f"cpi/{uuid4()}/command", f"cpi/{plant}/command"):
                        await sender.publish(topic, b"1", qos=1)
                heard = await anext(listening.messages)
                assert heard.topic.value == f"cpi/{plant}/command"

    run(test())


def test_each_of_our_own_may_do_no_more_than_it_needs(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (_, kept):
            broker, plant = kept.broker, uuid4()

            def ours(name: str) -> aiomqtt.Client:
                return broker.client(OURS, f"sluice-{name}", f"{name}-password")

            control, command = "$CONTROL/dynamic-security/v1", f"cpi/{plant}/command"
            assert await is_taken(ours("commands"), command)
            assert not await is_taken(ours("commands"), f"cpi/{plant}/telemetry")
            for name, topics in (
                ("commands", [control]), ("bridge", [control, command, f"cpi/{plant}/telemetry"]),
            ):  # fmt: skip
                for topic in topics:
                    assert not await is_taken(ours(name), topic), (name, topic)
            assert not await is_let_in(broker.client(OURS, None, None))
            assert not await is_let_in(broker.client(OURS, "sluice-bridge", "commands-password"))
            async with broker.bridge() as bridge:
                await bridge.subscribe("$CONTROL/#", qos=1)
                await bridge.subscribe("cpi/#", qos=1)
                async with ours("commands") as sender:
                    await sender.publish(command, b"1", qos=1)
                assert (await anext(bridge.messages)).topic.value == command

    run(test())


def test_commands_sent_as_the_bridge_s_user_wait_and_it_is_said_why(database: Database, tmp_path: Path) -> None:
    """This broker ends the connection after it has refused something."""

    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            plant, _ = await active(here, "PASSWORD")
            url = f"mqtt://sluice-bridge:{BRIDGE_PASSWORD}@127.0.0.1:{kept.broker.ports[OURS]}"
            async with sender(database, url, RING) as sending:
                assert (await here.ask("POST", f"{PATH}/{plant}/commands", here.key, COMMAND)).status == 201
                said: set[str | None] = set()

                def goes_on() -> bool:
                    if sending.counted("refused") > 1:
                        said.add(sending.commands.trouble)
                    return sending.counted("refused") > 5

                await until("it is refused again and again", goes_on)
                assert said == {"the broker refuses a command: Not authorized"}

    run(test())


@pytest.mark.parametrize("method", METHODS)
def test_no_plant_takes_another_s_session(database: Database, tmp_path: Path, method: str) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            first, theirs = await equipped(here, method)
            second, ours = await equipped(here, method)
            await let_in(kept, method, first, theirs)
            await let_in(kept, method, second, ours)
            async with client(kept, method, first, theirs) as connected:
                assert await is_let_in(client(kept, method, second, ours, client_id=first))
                await connected.publish(f"cpi/{first}/telemetry", b"1", qos=1)

    run(test())


# ---------------------------------------------------------------- who is let in


def test_a_token_is_one_plant_s_the_newest_and_until_its_end(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            first, shown = await equipped(here, "TOKEN")
            second, others = await equipped(here, "TOKEN")
            await let_in(kept, "TOKEN", first, shown)
            await let_in(kept, "TOKEN", second, others)
            assert not await is_let_in(client(kept, "TOKEN", first, others))
            assert not await is_let_in(client(kept, "TOKEN", second, shown))
            async with client(kept, "TOKEN", first, shown) as connected:
                newer = await token_of(here, first)
                await ended(connected)
            await let_in(kept, "TOKEN", first, newer)
            assert not await is_let_in(client(kept, "TOKEN", first, shown))
            async with client(kept, "TOKEN", first, newer) as connected:
                # Nobody says anything when it has come.
                await here.superuser(
                    "UPDATE plants SET broker_password_until = now() + interval '1 second' WHERE device_id = $1",
                    UUID(first),
                )
                await ended(connected)
            assert not await is_let_in(client(kept, "TOKEN", first, newer))
            assert await is_let_in(client(kept, "TOKEN", second, others))

    run(test())


def test_a_device_s_token_is_its_password_and_the_one_before_is_none(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            connection = await connect(database.settings, role=None, application="test")

            async def token_for(device: UUID) -> str:
                async with acting_for(connection, here.organisation):
                    tokens = Credentials(connection, TokenHasher(RING))
                    return await tokens.add_device_token(here.organisation, device)

            async with acting_for(connection, here.organisation):
                device = await add_device(connection, here.organisation, None, "Device", "device")
            name, token = str(device), await token_for(device)
            await until("it is let in", lambda: is_let_in(kept.broker.client(PASSWORD, name, token)))
            for topic in (f"v1/readings/{here.organisation}/{device}", f"opensense/a/{device}/lwt"):
                assert await is_taken(kept.broker.client(PASSWORD, name, token), topic)
            async with kept.broker.client(PASSWORD, name, token) as connected:
                newer = await token_for(device)
                await ended(connected)
            await until("the newer", lambda: is_let_in(kept.broker.client(PASSWORD, name, newer)))
            assert not await is_let_in(kept.broker.client(PASSWORD, name, token))
            async with kept.broker.client(PASSWORD, name, newer) as connected:
                async with acting_for(connection, here.organisation):
                    await connection.execute("UPDATE credentials SET revoked_at = now() WHERE device_id = $1", device)
                await ended(connected)
            await connection.close()
            assert not await is_let_in(kept.broker.client(PASSWORD, name, newer))

    run(test())


def test_a_certificate_of_somebody_else_s_is_none(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            plant, package = await equipped(here, "MTLS")
            other, theirs = await equipped(here, "PASSWORD")
            await let_in(kept, "PASSWORD", other, theirs)
            # Nor is a password asked for on that listener, or a name without one let in on the others.
            assert not await is_let_in(kept.broker.client(MTLS, other, theirs))
            assert not await is_let_in(kept.broker.client(PASSWORD, plant, None))
            assert not await is_let_in(kept.broker.client(PASSWORD, plant, ""))
            assert await is_let_in(client(kept, "MTLS", plant, package))

    run(test())


# ---------------------------------------------------------------- cut off


@pytest.mark.parametrize("method", METHODS)
def test_who_is_suspended_is_cut_off_and_back_when_reactivated(
    database: Database, tmp_path: Path, method: str
) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            plant, shown = await equipped(here, method)
            other, theirs = await equipped(here, method)
            await let_in(kept, method, plant, shown)
            await let_in(kept, method, other, theirs)
            async with client(kept, method, plant, shown) as connected, client(kept, method, other, theirs) as stays:
                assert await step(here, plant, "suspend") == 200
                async with asyncio.timeout(CUT_OFF_S):
                    await ended(connected)
                for _ in range(3):
                    assert not await is_let_in(client(kept, method, plant, shown))
                assert await step(here, plant, "reactivate") == 200
                await let_in(kept, method, plant, shown)
                await stays.publish(f"cpi/{other}/telemetry", b"1", qos=1)

    run(test())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["revoked", "deleted"])
def test_who_is_revoked_or_deleted_is_cut_off_for_good(
    database: Database, tmp_path: Path, method: str, how: str
) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            plant, shown = await equipped(here, method)
            await let_in(kept, method, plant, shown)
            async with client(kept, method, plant, shown) as connected:
                if how == "revoked":
                    assert await step(here, plant, "revoke") == 200
                else:
                    assert (await here.ask("DELETE", f"{PATH}/{plant}", here.key)).status == 200
                async with asyncio.timeout(CUT_OFF_S):
                    await ended(connected)
            for _ in range(3):
                assert not await is_let_in(client(kept, method, plant, shown))

    run(test())


# ---------------------------------------------------------------- what is away


def test_a_broker_that_starts_again_knows_everybody(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            known = [(method, *await equipped(here, method)) for method in METHODS]
            barred = [(method, *await equipped(here, method)) for method in METHODS]
            for one in (*known, *barred):
                await let_in(kept, *one)
            for _, plant, _ in barred:
                await step(here, plant, "suspend")
            await until("they are out", lambda: none_of(kept, barred))
            kept.broker.stop()
            kept.broker.start()
            for one in known:
                await let_in(kept, *one)
            assert await none_of(kept, barred)
            late = await equipped(here, "PASSWORD")
            await let_in(kept, "PASSWORD", *late)

    run(test())


@asynccontextmanager
async def all_connected(kept: Kept, plants: list[tuple[str, str, Any]]) -> AsyncIterator[list[aiomqtt.Client]]:
    """What is ended meanwhile is."""
    connections = [client(kept, *one) for one in plants]
    for one in connections:
        await one.__aenter__()
    try:
        yield connections
    finally:
        for one in connections:
            with suppress(aiomqtt.MqttError):
                await one.__aexit__(None, None, None)


async def none_of(kept: Kept, plants: list[tuple[str, str, Any]]) -> bool:
    return not any([await is_let_in(client(kept, *one)) for one in plants])


def test_what_changes_while_nobody_keeps_it_is_brought_later(database: Database, tmp_path: Path) -> None:
    """Also into a broker that was begun from a file written meanwhile."""

    async def test() -> None:
        async with people_with_authority(database) as here:
            with configured(tmp_path) as broker:
                await certify(broker, database)
                plants = [(method, *await equipped(here, method)) for method in METHODS]
                await seed(broker, database)
                # What is in the file needs nothing from whoever keeps it later.
                await here.superuser("DELETE FROM broker_handovers")
                broker.start()
                kept = Kept(broker, None, None)  # type: ignore[arg-type]
                for one in plants:
                    assert await is_let_in(client(kept, *one))
                async with all_connected(kept, plants) as connected:
                    for _, plant, _ in plants:
                        assert await step(here, plant, "suspend") == 200
                    async with keeping(broker, database) as kept:
                        await asyncio.gather(*map(ended, connected))
                        await kept.agreed()
                        assert await none_of(kept, plants)
                for _, plant, _ in plants:
                    assert await step(here, plant, "reactivate") == 200
                async with keeping(broker, database) as kept:
                    for one in plants:
                        await let_in(kept, *one)

    run(test())


def test_a_database_that_is_away_throws_nobody_out(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            plants = [(method, *await equipped(here, method)) for method in METHODS]
            for one in plants:
                await let_in(kept, *one)
            superuser: Any = await asyncpg.connect(database.superuser_url)
            refuse = f'ALTER DATABASE "{database.name}" CONNECTION LIMIT %d'
            ends = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = $1 AND application_name LIKE 'sluice broker%'"
            )
            async with all_connected(kept, plants) as connected:
                await superuser.execute(refuse % 0)
                await superuser.execute(ends, database.name)
                await until("it is missed", lambda: "database" in (kept.keeper.trouble or ""))
                for connection, one in zip(connected, plants, strict=True):
                    await connection.publish(f"cpi/{one[1]}/telemetry", b"1", qos=1)
            for one in plants:
                assert await is_let_in(client(kept, *one))
            await superuser.execute(refuse % -1)
            await superuser.close()
            assert await step(here, plants[0][1], "suspend") == 200
            await until("it is back", lambda: none_of(kept, plants[:1]))

    run(test())


def test_one_keeps_it_and_another_stands_by(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sluice.broker")

    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept), keeping(kept.broker, database) as second:
            await until("it stands by", lambda: "SLUICE_BROKER_KEEPS" in (second.keeper.trouble or ""))
            assert "those of devices" in (second.keeper.trouble or "")
            assert second.counted("sluice_broker_failures_total", part="database") == 0
            plant = await equipped(here, "PASSWORD")
            await let_in(kept, "PASSWORD", *plant)
            assert kept.counted("sluice_broker_changes_total", kind="created") == 1
            assert second.counted("sluice_broker_changes_total", kind="created") == 0
        kept_again = [one for one in caplog.records if one.getMessage() == "the broker's identities are kept"]
        assert len(kept_again) == 1, "the one that keeps them, and not at every look"

    run(test())


# ---------------------------------------------------------------- what is kept


def test_a_password_is_on_its_way_until_the_broker_has_it(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            plant, password = await equipped(here, "PASSWORD")
            await let_in(kept, "PASSWORD", plant, password)

            async def is_gone() -> bool:
                return not await here.superuser("SELECT FROM broker_handovers")

            await until("nothing is on its way", is_gone)
            assert password not in kept.broker.clients_file.read_text()
            # One that changes while it cannot be brought: the old one is good for nothing, and it is told.
            await here.superuser(
                "UPDATE plants SET broker_password = '$7$101$AAAA$AAAA' WHERE device_id = $1", UUID(plant)
            )
            await until("the old one is out", lambda: none_of(kept, [("PASSWORD", plant, password)]))
            await until("it is told", lambda: kept.counted("sluice_broker_clients", state="waiting") == 1)

    run(test())


def test_entries_that_are_not_ours_stay_and_there_are_not_too_many(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            with configured(tmp_path) as broker:
                await certify(broker, database)
                await seed(broker, database)
                content = json.loads(broker.clients_file.read_text())
                content["clients"].append({"username": "somebody", "roles": []})
                ours = {"username": str(uuid4()), "textname": "sluice gone", "roles": []}
                content["clients"].append(ours)
                broker.clients_file.write_text(json.dumps(content))
                broker.start()
                async with keeping(broker, database, SLUICE_BROKER_CLIENTS_MAX="4") as kept:
                    await kept.agreed()
                    first = await equipped(here, "PASSWORD")
                    await let_in(kept, "PASSWORD", *first)
                    second = await equipped(here, "PASSWORD")
                    await until("it is told", lambda: kept.counted("sluice_broker_clients", state="beyond") == 1)
                    assert not await is_let_in(client(kept, "PASSWORD", *second))
                names = {one["username"] for one in json.loads(broker.clients_file.read_text())["clients"]}
                assert names == {"somebody", "sluice-broker", "sluice-bridge", "sluice-commands", first[0]}

    run(test())


def test_without_a_list_of_revoked_certificates_passwords_are_kept_all_the_same(
    database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            held = await equipped(here, "MTLS")
            plant, password = await equipped(here, "PASSWORD")
            await let_in(kept, "PASSWORD", plant, password)
            pid_file = tmp_path / "mosquitto.pid"
            pid = pid_file.read_text()
            pid_file.write_text("1")
            async with client(kept, "MTLS", *held) as connected:
                assert await step(here, held[0], "suspend") == 200
                await until("it is told", lambda: kept.counted("sluice_broker_failures_total", part="list") > 1)
                assert await step(here, plant, "suspend") == 200
                await until("it is out", lambda: none_of(kept, [("PASSWORD", plant, password)]))
                await connected.publish(f"cpi/{held[0]}/telemetry", b"1", qos=1)
                pid_file.write_text(pid)
                await ended(connected)
            assert not await is_let_in(client(kept, "MTLS", *held))

    run(test())


def test_devices_of_a_site_share_its_password_at_a_broker_of_their_own(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            sites = f"/api/organisations/{here.organisation}/sites"
            made = await here.ask("POST", sites, here.key, SITE)
            path = f"{sites}/{made.body['id']}/mqtt"
            plant, password = await equipped(here, "PASSWORD")
            first = (await here.ask("POST", f"{path}/password", here.key)).body
            prefix = first["prefix"]
            with configured(tmp_path, "sites.conf") as broker:
                only_sites = dict.fromkeys(("SLUICE_BROKER_CRL_FILE", "SLUICE_BROKER_PID_FILE"), "")
                only_sites["SLUICE_BROKER_KEEPS"] = "sites"
                await certify(broker, database)
                await seed(broker, database, **only_sites)
                broker.start()
                async with keeping(broker, database, **only_sites) as kept:
                    await kept.agreed()

                    def site(shown: str, client_id: str) -> aiomqtt.Client:
                        return broker.client(SITES, prefix, shown, client_id)

                    async with site(first["password"], "fridge01") as one, site(first["password"], "fridge02") as two:
                        for connected in (one, two):
                            await connected.publish(f"shellies/{prefix}/fridge01/online", b"true", qos=1)
                    shown = first["password"]
                    assert await is_taken(site(shown, "plug"), f"tele/{prefix}/plug/SENSOR")
                    for topic in ("shellies/abcdefgh/fridge01/online", f"cpi/{plant}/telemetry"):
                        assert not await is_taken(site(shown, "plug"), topic), topic
                    assert not await is_let_in(broker.client(SITES, plant, password))
                    second = (await here.ask("POST", f"{path}/password", here.key)).body["password"]
                    await until("the new one is known", lambda: is_let_in(site(second, "plug")))
                    assert not await is_let_in(site(shown, "plug"))
                    assert not await here.superuser("SELECT FROM broker_handovers WHERE site_id IS NOT NULL")
                    async with site(second, "plug") as connected:
                        assert (await here.ask("DELETE", f"{path}/password", here.key)).status == 204
                        await ended(connected)
                    assert not await is_let_in(site(second, "plug"))

    run(test())


def test_the_registry_says_whom_the_broker_is_to_know(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plants = {method: await equipped(here, method) for method in METHODS}
            names = {UUID(plant): method for method, (plant, _) in plants.items()}
            await here.ask("POST", PATH, here.key, PENDING)

            async def known() -> dict[str, tuple[bool, bool, bool]]:
                """Of each whether it is enabled, ends, and had a certificate revoked."""
                reader: Any = await connect(any_database.settings, role="sluice_worker", application="test")
                rows = await reader.fetch("SELECT * FROM broker_clients")
                await reader.close()
                assert all(row["user_name"] == str(row["subject_id"]) for row in rows)
                assert all(row["kind"] == names[row["subject_id"]] for row in rows)
                return {
                    row["kind"]: (row["enabled"], row["until"] is not None, row["revoked"] is not None)
                    for row in rows
                }

            assert await known() == {"PASSWORD": (True, False, False), "TOKEN": (True, True, False)}
            for plant, _ in plants.values():
                assert await step(here, plant, "suspend") == 200
            suspended = {
                "MTLS": (False, False, True),
                "PASSWORD": (False, False, False),
                "TOKEN": (False, True, False),
            }
            assert await known() == suspended
            for plant, _ in plants.values():
                assert await step(here, plant, "reactivate") == 200
            assert await known() == {"PASSWORD": (True, False, False), "TOKEN": (True, True, False)}
            await here.superuser("UPDATE plants SET broker_password_until = now() WHERE auth_method = 'TOKEN'")
            assert (await known())["TOKEN"] == (False, True, False)
            for plant, _ in plants.values():
                assert await step(here, plant, "revoke") == 200
            assert await known() == {"MTLS": (False, False, True)}

    run(test())


# ---------------------------------------------------------------- nothing is dropped


def test_a_flood_that_no_bridge_takes_is_kept_whole(database: Database, tmp_path: Path) -> None:
    """Ten times as many messages as Mosquitto keeps by itself; the broker is ended in order in between."""
    count = 12_000

    async def test() -> None:
        async with stage(tmp_path, database) as (here, kept):
            plant, password = await equipped(here, "PASSWORD")
            await let_in(kept, "PASSWORD", plant, password)
            kept_for_an_hour: Any = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            kept_for_an_hour.SessionExpiryInterval = 3_600
            session = {"clean_start": False, "properties": kept_for_an_hour}
            async with kept.broker.bridge("slow", **session) as bridge:
                await bridge.subscribe("cpi/+/telemetry", qos=1)
            options: dict[str, Any] = {"max_queued_outgoing_messages": count, "max_inflight_messages": 1_000}
            async with kept.broker.client(PASSWORD, plant, password, **options) as sender:
                topic = f"cpi/{plant}/telemetry"
                for first in range(0, count, 1_000):
                    numbers = range(first, first + 1_000)
                    await asyncio.gather(*(sender.publish(topic, str(n), qos=1, timeout=60) for n in numbers))
            kept.broker.stop()
            kept.broker.start()
            found: list[int] = []
            async with kept.broker.bridge("slow", **session, max_queued_incoming_messages=count + 1) as bridge:
                async for message in bridge.messages:
                    found.append(int(bytes(message.payload)))
                    if len(found) == count:
                        break
            assert sorted(found) == list(range(count))

    run(test())
