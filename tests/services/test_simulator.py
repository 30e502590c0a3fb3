"""The device simulator against a real API and a real broker: what it sends, what it answers, how it comes back."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from api.certificates.building import Span, key_pem_of, new_key, pem_of, sign_client, sign_server, utc_now
from bench.errors import BenchError
from bench.proxy import Mode, Proxy
from bench.simulator.fleet import Fleet, Options
from bench.simulator.plants import MARK, Api, Broker
from bench.usage import free_port
from deploy.remote import Login, RefusedError, Remote
from runtime.ids import uuid7
from runtime.mqtt import Address, Endpoint, connected
from runtime.tls import client_context
from schemas.plants import AuthMethod
from schemas.signing import command_parts, is_signed, signature, snapshot_parts
from tests import mosquitto
from tests.bridge_rig import own_broker
from tests.certificate_rig import add_authority
from tests.databases import Database
from tests.landing_rig import until
from tests.people_rig import People, people
from tests.support import run


def api_of(here: People, broker: Broker | None) -> Api:
    return Api(Remote(Login(here.url, str(here.organisation), here.key)).ask, here.organisation, broker)


class Listener:
    """Everything under `cpi/`, as it came."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.heard: list[tuple[str, bytes, bool]] = []
        """Topic, payload, and whether it was retained."""

    async def listen(self) -> None:
        await self.client.subscribe("cpi/#", qos=1)
        async for message in self.client.messages:
            self.heard.append((str(message.topic), bytes(message.payload), message.retain))

    def of(self, kind: str, plant: UUID | None = None) -> list[bytes]:
        return [
            payload
            for topic, payload, _ in self.heard
            if topic.endswith(f"/{kind}") and (plant is None or str(plant) in topic)
        ]

    async def until(self, kind: str, count: int) -> list[bytes]:
        async def there() -> bool:
            return len(self.of(kind)) >= count

        await until(there)
        return self.of(kind)


@asynccontextmanager
async def listener(to: Endpoint) -> AsyncIterator[Listener]:
    async with connected(to, uuid7().hex, timeout_s=20, messages_max=10_000) as client:
        made = Listener(client)
        task = asyncio.create_task(made.listen())
        await asyncio.sleep(0)
        try:
            yield made
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def check_signed(fleet: Fleet, payloads: list[bytes]) -> None:
    """Each is signed by one of the fleet's plants, and a nonce is one payload's."""
    secrets = {device.plant.identity.plant: device.plant.identity.secret for device in fleet.devices}
    nonces: dict[str, bytes] = {}
    for payload in payloads:
        said = json.loads(payload)
        assert any(
            is_signed(secret, said["sig"], *snapshot_parts(
                str(plant), said["ts"], said["n"], said["timestamp"], said["devices"]))
            for plant, secret in secrets.items()
        )  # fmt: skip
        assert [device["type"] for device in said["devices"]] == ["METER", "INVERTER", "BATTERY"]
        assert nonces.setdefault(said["n"], payload) == payload


@contextmanager
def mtls_broker(directory: Path, issuing: Any, roots: str, crl: str, watcher: UUID) -> Iterator[mosquitto.Broker]:
    key = new_key()
    certificate = sign_server(issuing, key.public_key(), ["127.0.0.1"], Span.of(utc_now(), 5))
    (directory / "server.crt").write_text(pem_of(certificate) + pem_of(issuing.certificate))
    (directory / "server.key").write_text(key_pem_of(key, None))
    (directory / "roots.pem").write_text(roots)
    (directory / "crl.pem").write_text(crl)
    acl = f"user {watcher}\ntopic readwrite #\npattern readwrite cpi/%u/#\n"
    with mosquitto.broker(directory, acl=acl) as running:
        yield running


def test_plants_with_certificates_publish_signed_snapshots_and_come_back(database: Database, tmp_path: Path) -> None:
    watcher = uuid7()

    async def test() -> None:
        async with people(database, public_url="https://127.0.0.1") as here:
            issuing = await add_authority(database)
            roots, crl = [await _text(here, f"/api/v1/certificates/{name}") for name in ("ca", "crl")]
            with mtls_broker(tmp_path, issuing, roots, crl, watcher) as running:
                address = Address("127.0.0.1", running.port, client_context("TEST", {}))
                api = api_of(here, Broker(address, None))
                fleet = await Fleet.make(api, Options(3, AuthMethod.MTLS, rate=60.0))
                key = new_key()
                shown = sign_client(issuing, key.public_key(), uuid7(), watcher, Span.of(utc_now(), 5))
                own = mosquitto.Client.of(
                    tmp_path, "watcher", pem_of(shown) + pem_of(issuing.certificate), key_pem_of(key, None)
                )
                files = {
                    "cafile": str(tmp_path / "roots.pem"), "certfile": str(own.certificate), "keyfile": str(own.key),
                }  # fmt: skip
                to = Endpoint(address._replace(tls=client_context("TEST", files)), None, None)
                async with listener(to) as watching:
                    async with fleet:
                        assert await fleet.until_connected(60) is not None
                        check_signed(fleet, await watching.until("telemetry", 30))
                    summary = fleet.summary()
                    await watching.until("telemetry", summary.counts.acknowledged)
                assert (summary.connected, summary.waiting, summary.counts.failures) == (3, 0, Counter())
                assert summary.counts.made == summary.counts.published == summary.counts.acknowledged
                # Nobody had certificates for the others' topics.
                assert {
                    len(watching.of("telemetry", device.plant.identity.plant)) > 0 for device in fleet.devices
                } == {True}
                ids = [device.plant.identity for device in fleet.devices]
                again = await Fleet.make(api, Options(4, AuthMethod.MTLS, rate=0))
                assert [device.plant.identity for device in again.devices][:3] == ids

    run(test())


async def _text(here: People, path: str) -> str:
    async with here.session.get(here.url + path) as answer:
        assert answer.status == 200
        return await answer.text()


@asynccontextmanager
async def on_a_plain_broker(
    database: Database, **settings: Any
) -> AsyncIterator[tuple[People, Api, Proxy, Callable[[], Any]]]:
    """A broker that lets everybody in, through a proxy; and what listens there, directly."""
    with own_broker() as running:
        async with people(database, api=settings) as here, Proxy(free_port(), running.port) as proxy:
            api = api_of(here, Broker(Address("127.0.0.1", proxy._port, None), None))
            yield here, api, proxy, lambda: listener(Endpoint(Address("127.0.0.1", running.port, None), None, None))


def test_what_was_not_acknowledged_is_sent_again_with_the_same_bytes(database: Database) -> None:
    async def test() -> None:
        async with on_a_plain_broker(database) as (_, api, proxy, listening), listening() as watching:
            fleet = await Fleet.make(api, Options(1, AuthMethod.PASSWORD, rate=50.0))
            async with fleet:
                assert await fleet.until_connected(60) is not None
                await watching.until("telemetry", 5)
                proxy.set_mode(Mode.MUTE)
                before = len(watching.of("telemetry"))
                await watching.until("telemetry", before + 1)
                proxy.cut()
                proxy.set_mode(Mode.PASS)
                await _count(lambda: fleet.counts.connections == 2)
                await watching.until("telemetry", before + 10)
            summary = fleet.summary()
            counts = summary.counts
            assert (summary.waiting, counts.redelivered) == (0, 1)
            assert counts.made == counts.acknowledged == counts.published - counts.redelivered
            payloads = await watching.until("telemetry", counts.published)
            assert sorted(Counter(payloads).values())[-2:] == [1, 2]
            check_signed(fleet, payloads)
            assert [json.loads(payload)["timestamp"] for payload in dict.fromkeys(payloads)] == sorted(
                json.loads(payload)["timestamp"] for payload in dict.fromkeys(payloads)
            )

    run(test())


async def _count(reached: Callable[[], bool]) -> None:
    async def there() -> bool:
        return reached()

    await until(there)


def test_commands_are_answered_once_they_are_known_to_be_ours(database: Database) -> None:
    async def test() -> None:
        async with on_a_plain_broker(database) as (_, api, _proxy, listening), listening() as watching:
            fleet = await Fleet.make(api, Options(1, AuthMethod.PASSWORD, rate=0))
            (device,) = fleet.devices
            who = device.plant.identity

            def command(name: str, secret: bytes) -> bytes:
                whom, ts, payload = str(who.plant), 1_700_000_000_000, {"on": True}
                signed = signature(secret, *command_parts(whom, name, ts, "switch", payload))
                told = {
                    "deviceId": whom,
                    "cmdId": name,
                    "ts": ts,
                    "action": "switch",
                    "payload": payload,
                    "sig": signed,
                }
                return json.dumps(told).encode()

            async with fleet:
                assert await fleet.until_connected(60) is not None
                for payload in (b"no JSON", b"[]", command("forged", b"x" * 32), command("ours", who.secret)):
                    await watching.client.publish(who.topic("command"), payload, qos=1)
                await watching.until("ack", 2)
                await watching.client.publish(who.topic("command"), command("ours", who.secret), qos=1)
                answered = [json.loads(one) for one in await watching.until("ack", 4)]
            assert [(one["cmdId"], one["status"]) for one in answered] == [
                ("ours", "ACKNOWLEDGED"),
                ("ours", "SUCCESS"),
            ] * 2
            assert answered[1]["response"] == {"action": "switch", "payload": {"on": True}}
            assert fleet.counts.commands == 1
            assert fleet.counts.failures == Counter(
                {"a command was refused: no command": 2, "a command was refused: the signature is not right": 1}
            )

    run(test())


def test_a_will_tells_who_was_cut_off_and_a_good_bye_who_ended(database: Database) -> None:
    async def test() -> None:
        async with on_a_plain_broker(database) as (_, api, proxy, listening), listening() as watching:
            fleet = await Fleet.make(api, Options(1, AuthMethod.PASSWORD, rate=0))
            async with fleet:
                assert await fleet.until_connected(60) is not None
                await watching.until("status", 1)
                proxy.cut()
                await watching.until("status", 3)
            told = [json.loads(one)["status"] for one in await watching.until("status", 4)]
            assert told == ["online", "offline", "online", "offline"]

    run(test())


def test_a_token_is_renewed_before_it_ends_and_nothing_is_lost_by_it(database: Database) -> None:
    async def test() -> None:
        async with (
            on_a_plain_broker(database, plant_token_s=60) as (_, api, _proxy, listening),
            listening() as watching,
        ):
            fleet = await Fleet.make(api, Options(1, AuthMethod.TOKEN, rate=20.0))
            (device,) = fleet.devices
            async with fleet:
                assert await fleet.until_connected(60) is not None
                first, ends_s = device.plant.password, device.plant.token_ends_s
                assert ends_s - 2 * 60.0 <= device._renewed_at_s < ends_s - 10.0
                device._renewed_at_s = 0.0  # as if its time had come
                await _count(lambda: fleet.counts.connections >= 2)
                assert device.plant.password != first
                await watching.until("telemetry", 20)
            summary = fleet.summary()
            assert (summary.waiting, summary.counts.failures, summary.counts.renewed_tokens) == (0, Counter(), 2)
            assert summary.counts.made == summary.counts.published == summary.counts.acknowledged

    run(test())


def test_plants_of_others_are_left_alone_and_lost_ones_are_made_anew(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            api = api_of(here, Broker(Address("127.0.0.1", 1, None), None))
            (device,) = (await Fleet.make(api, Options(1, AuthMethod.PASSWORD, rate=0))).devices
            plant = str(device.plant.identity.plant)
            path = f"/api/v1/plants/{plant}"
            assert (await here.ask("GET", path, here.key)).body["metadata"] == MARK
            assert (await here.ask("POST", f"{path}/suspend", here.key)).status == 200
            with pytest.raises(BenchError, match="reactivate"):
                await Fleet.make(api, Options(1, AuthMethod.PASSWORD, rate=0))
            assert (await here.ask("POST", f"{path}/revoke", here.key)).status == 200
            (other,) = (await Fleet.make(api, Options(1, AuthMethod.PASSWORD, rate=0))).devices
            assert other.plant.identity.plant != device.plant.identity.plant
            assert (await here.ask("GET", path, here.key)).status == 404
            own = {"name": "Ours", "serialNumber": "SIM-TOKEN-1", "type": "GATEWAY", "authMethod": "TOKEN"}
            assert (await here.ask("POST", "/api/v1/plants", here.key, own)).status == 201
            with pytest.raises(RefusedError, match="PLANT_ALREADY_EXISTS"):
                await Fleet.make(api, Options(1, AuthMethod.TOKEN, rate=0))

    run(test())
