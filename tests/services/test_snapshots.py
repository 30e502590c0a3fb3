"""Plants' snapshots through a real broker, a bridge, the log and landing, on both databases; read back by the API."""

import asyncio
import json
import logging
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID, uuid4

import pytest

from runtime.clock import SystemClock
from schemas.record import Quality
from schemas.signing import signature, snapshot_parts
from tests.bridge_rig import Broker, Running, bridge, own_broker
from tests.certificate_rig import people_with_authority
from tests.databases import Database
from tests.faults.test_landing import process
from tests.ingest_rig import Installation
from tests.landing_rig import Rig, open_rig, sqlite_url, until
from tests.people_rig import RING, People
from tests.services.test_plants_face import PATH, SYSTEM_CABINET, active, get, made, step
from tests.services.test_verify import verify
from tests.support import run

README = Path(__file__).parents[2] / "README.md"
METER = [{"externalId": "M1", "type": "METER", "values": {"power": 230.0, "imported": 12.5}}]
LATE = Quality.LATE.value
CONVERTED = Quality.UNIT_CONVERTED.value
BOOLEAN = Quality.BOOLEAN.value


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with own_broker() as started:
        yield started


@dataclass
class Plant:
    """One that was provisioned, and its secret."""

    id: str
    secret: bytes
    newest_ms: ClassVar[int] = 0
    """No two snapshots are of one millisecond."""

    @property
    def topic(self) -> str:
        return f"cpi/{self.id}/telemetry"

    def snapshot(
        self, devices: Any = None, *, signed: bool = True, secret: bytes | None = None, **fields: Any
    ) -> str:
        Plant.newest_ms = max(Plant.newest_ms + 1, time.time_ns() // 1_000_000)
        made_: dict[str, Any] = {"ts": Plant.newest_ms, "n": uuid4().hex[:16], "devices": devices or METER}
        made_ |= fields
        if signed:
            parts = snapshot_parts(self.id, made_["ts"], made_["n"], made_.get("timestamp"), made_["devices"])
            made_["sig"] = signature(secret or self.secret, *parts)
        return json.dumps(made_)


@dataclass
class Field:
    """An installation in this process: API, broker, bridge, log and a database."""

    here: People
    rig: Rig
    broker: Broker
    running: Running

    async def plant(self, method: str = "TOKEN", **fields: Any) -> Plant:
        plant, package = await active(self.here, method, **fields)
        return Plant(plant, bytes.fromhex(package["security"]["hmacSecret"]))

    def publish(self, plant: Plant, *snapshots: str) -> None:
        for one in snapshots:
            self.broker.publish(plant.topic, one)

    async def seen(self, **counts: int) -> None:
        """Until so many snapshots had these results, and no others have others."""

        async def reached() -> bool:
            return all(self._seen(result) >= count for result, count in counts.items())

        await until(reached)
        assert {result: self._seen(result) for result in counts} == counts

    def _seen(self, result: str) -> float:
        return self.running.counted("sluice_mqtt_snapshots_total", result=result)

    async def land(self) -> None:
        """What was acknowledged lands."""
        await self.running.settled()
        async with self.rig.worker():
            await self.rig.landed()

    async def quarantine(self, plant: Plant) -> list[tuple[str, Any]]:
        rows = await self.rig.fetch(
            "SELECT code, payload FROM quarantine WHERE device_id = $1 ORDER BY position, item", UUID(plant.id)
        )
        return [(code, json.loads(payload)) for code, payload in rows]

    async def values(self) -> list[tuple[str, str, float, int]]:
        return [(metric, label, value, quality) for metric, label, _, value, quality in await self.rig.readings()]

    async def sound(self) -> None:
        """The books add up, and whoever reads log and database finds nothing wrong."""
        await self.rig.ledger()
        assert (await verify(self.rig))[1] == []


@asynccontextmanager
async def field(database: Database, directory: Path, broker: Broker, **settings: Any) -> AsyncIterator[Field]:
    async with (
        people_with_authority(database) as here,
        open_rig(database, sqlite_url(directory), keep_landed_h=1) as rig,
        bridge(Installation(database, rig.log_settings, RING), broker, rig.log, **settings) as running,
    ):
        await running.connected()
        yield Field(here, rig, broker, running)


async def until_told(seconds: float = 1.0) -> None:
    """What was changed in the registry is known everywhere."""
    await asyncio.sleep(seconds)


# ---------------------------------------------------------------- what is said


def test_snapshots_of_all_three_kinds_of_plants_are_series_and_today_s_energy(
    any_database: Database, tmp_path: Path, broker: Broker
) -> None:
    async def test() -> None:
        async with field(any_database, tmp_path, broker) as at:
            mtls, token, password = [await at.plant(method) for method in ("MTLS", "TOKEN", "PASSWORD")]
            await at.here.ask("PATCH", f"{PATH}/{mtls.id}", at.here.key, {"templateId": SYSTEM_CABINET})
            now_ms = time.time_ns() // 1_000_000
            for number, plant in enumerate((mtls, token, password)):
                for step_, (produced, exported) in enumerate(((10.0, 1.0), (14.5, 2.5))):
                    devices = [
                        {"externalId": "C1", "type": "CABINET", "raw": 0b1001},
                        {"externalId": "I1", "type": "INVERTER", "values": {"power": 4000.0, "produced": produced}},
                        {"externalId": "M1", "type": "METER", "values": {"exported": exported, "note": "ok"}},
                    ]
                    sample = now_ms - 2_000 + step_
                    at.publish(plant, plant.snapshot(devices, signed=number > 0, timestamp=sample))
            await at.seen(signed=4, unsigned=2)
            await at.land()
            for plant in (mtls, token, password):
                energy = (await at.here.ask("GET", f"{PATH}/{plant.id}/energy/today", at.here.key)).body
                assert (energy["produced"], energy["exported"], energy["imported"]) == (4.5, 1.5, 0.0)
                assert energy["selfConsumptionPct"] == 66.67
            answer = await at.here.ask("GET", "/api/v1/readings", at.here.key, device_id=mtls.id, limit=100)
            found = {(one["metric"], one["label"], one["value"]) for one in answer.body["data"]}
            assert {
                ("grid_present", "C1", True), ("door_open", "C1", True), ("smoke", "C1", False), ("raw", "C1", 9.0),
                ("energy_produced", "I1", 14500.0), ("power", "I1", 4000.0), ("raw.note", "M1", "ok"),
            } <= found  # fmt: skip
            bits = [row for row in await at.values() if row[0] == "main_breaker_closed"]
            # Of plants without a template for cabinets no bit is guessed at: the mask is kept.
            assert bits == [("main_breaker_closed", "C1", 0.0, BOOLEAN)] * 2
            assert len([row for row in await at.values() if row[0] == "raw"]) == 6
            assert await at.rig.value("SELECT count(*) FROM quarantine") == 0
            await at.sound()

    run(test())


def test_readme_s_example_signs_with_openssl(any_database: Database, tmp_path: Path, broker: Broker) -> None:
    text = README.read_text()
    script = re.search(r"^    ts=.*?\n(?=\n)", text, re.DOTALL | re.MULTILINE)
    assert script is not None

    async def test() -> None:
        async with field(any_database, tmp_path, broker) as at:
            plant = await at.plant("PASSWORD")
            environment = {
                "PLANT": plant.id, "SECRET": plant.secret.hex(), "BROKER": f"-h 127.0.0.1 -p {broker.port}",
                "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            }  # fmt: skip
            shell = partial(subprocess.run, ["bash", "-e"], input=script[0], text=True, env=environment, check=True)
            await asyncio.to_thread(shell, timeout=30)
            await at.seen(signed=1)
            await at.land()
            assert await at.values() == [
                ("energy_exported", "M1", 3500.0, CONVERTED),
                ("energy_imported", "M1", 1_204_250.0, CONVERTED),
                ("power", "M1", -230.0, 0),
            ]

    run(test())


def test_another_template_is_used_within_a_second(any_database: Database, tmp_path: Path, broker: Broker) -> None:
    async def test() -> None:
        async with field(any_database, tmp_path, broker) as at:
            plant = await at.plant("MTLS")
            devices = [
                {"externalId": "C1", "type": "CABINET", "raw": 1},
                {"externalId": "M1", "type": "METER", "values": {"P": 5}},
            ]
            at.publish(plant, plant.snapshot(devices))
            await at.seen(signed=1)
            own = {"name": "Meter 2", "level": "DEVICE", "type": "METER"}
            signals = [{"name": "power", "field": "P", "unit": "kW", "scale": 0.1}]
            made_ = await at.here.ask("POST", "/api/v1/device-templates", at.here.key, own | {"signals": signals})
            assert made_.status == 201
            changed = await at.here.ask("PATCH", f"{PATH}/{plant.id}", at.here.key, {"templateId": SYSTEM_CABINET})
            assert changed.status == 200
            await until_told()
            at.publish(plant, plant.snapshot(devices))
            await at.seen(signed=2)
            await at.land()
            values = {(metric, value) for metric, _, value, _ in await at.values()}
            assert {("raw.p", 5.0), ("power", 500.0), ("grid_present", 1.0)} <= values
            await at.sound()

    run(test())


# ---------------------------------------------------------------- who said it


def test_forged_snapshots_stand_in_quarantine_and_are_counted_with_their_plant(
    any_database: Database, tmp_path: Path, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with field(any_database, tmp_path, broker) as at:
            plant, other = await at.plant("TOKEN"), await at.plant("PASSWORD")
            mtls = await at.plant("MTLS")
            forged = plant.snapshot(secret=other.secret)
            at.publish(plant, plant.snapshot(signed=False), forged, "garbage", plant.snapshot())
            at.publish(mtls, mtls.snapshot(secret=other.secret), mtls.snapshot(signed=False))
            at.publish(other, plant.snapshot())
            await at.seen(bad_signature=4, undecodable=1, signed=1, unsigned=1)
            await at.land()
            held = await at.quarantine(plant)
            assert [code for code, _ in held] == ["bad_signature", "bad_signature", "undecodable"]
            # Kept as text: nothing of it can be replayed as it stands.
            assert held[1][1] == forged
            for one, count in ((plant, 2), (mtls, 1), (other, 1)):

                async def counted(one: Plant = one, count: int = count) -> bool:
                    return bool((await get(at.here, one.id))["authFailureCount"] == count)

                await until(counted)
                assert (await get(at.here, one.id))["lastAuthFailureAt"] is not None
            assert len(await at.values()) == 4
            await at.sound()
            said = "".join(record.getMessage() + str(record.__dict__) for record in caplog.records)
            for secret in (plant.secret, other.secret, mtls.secret):
                assert secret.hex() not in said
                assert repr(secret)[2:-1] not in said
            assert "externalId" not in said

    with caplog.at_level(logging.DEBUG):
        run(test())


def test_after_a_rotation_both_secrets_are_good_for_an_hour(
    any_database: Database, tmp_path: Path, broker: Broker
) -> None:
    async def test() -> None:
        async with field(any_database, tmp_path, broker) as at:
            plant = await at.plant("TOKEN")
            at.publish(plant, plant.snapshot())
            await at.seen(signed=1)
            answer = await at.here.ask("POST", f"{PATH}/{plant.id}/rotate-secret", at.here.key)
            new = bytes.fromhex(answer.body["hmacSecret"])
            await until_told()
            at.publish(plant, plant.snapshot(), plant.snapshot(secret=new))
            await at.seen(signed=3, bad_signature=0)
            await at.here.superuser(
                "UPDATE plants SET former_secret_until = now() + interval '2 s', former_secret = former_secret"
            )
            await until_told(3)
            at.publish(plant, plant.snapshot(), plant.snapshot(secret=new))
            await at.seen(signed=4, bad_signature=1)

    run(test())


def test_a_suspended_plant_is_not_listened_to_and_a_revoked_one_never_again(
    any_database: Database, tmp_path: Path, broker: Broker
) -> None:
    async def test() -> None:
        async with field(any_database, tmp_path, broker) as at:
            plant = await at.plant("PASSWORD")
            for action, accepted, quarantined in (("suspend", 0, 2), ("reactivate", 1, 3), ("revoke", 1, 5)):
                assert await step(at.here, plant.id, action) == 200
                await until_told()
                at.publish(plant, plant.snapshot(), plant.snapshot(secret=bytes(32)))
                await at.running.done("quarantined", quarantined)
                await at.running.done("accepted", accepted)
            await at.land()
            codes = [code for code, _ in await at.quarantine(plant)]
            # Two readings of the one that is the plant's, and whole messages of those that may not be.
            assert codes == [*["device_suspended"] * 3, "bad_signature", *["device_suspended"] * 2]
            # What it signed before it was revoked can be replayed once it is back, reading by reading.
            assert (await at.quarantine(plant))[0][1]["type"] == "power"
            assert (await get(at.here, plant.id))["authFailureCount"] <= 1
            await at.sound()

    run(test())


def test_only_plants_and_only_as_they_are_spelt_have_snapshots(
    any_database: Database, tmp_path: Path, broker: Broker
) -> None:
    async def test() -> None:
        async with field(any_database, tmp_path, broker) as at:
            plant, pending = await at.plant("TOKEN"), await made(at.here, method="TOKEN")
            (device,) = await at.rig.register()
            nobody = Plant(str(uuid4()), bytes(32))
            plain = Plant(str(device.device), bytes(32))
            at.publish(plain, plain.snapshot())
            at.publish(nobody, nobody.snapshot())
            at.publish(Plant(pending, bytes(32)), Plant(pending, bytes(32)).snapshot())
            at.broker.publish(f"cpi/dev_{UUID(plant.id).hex}/telemetry", plant.snapshot())
            await at.seen(unknown_device=1, bad_signature=1)
            await at.running.done("unknown_device", 1)
            await at.running.done("malformed_topic", 1)
            await at.land()
            assert [code for code, _ in await at.quarantine(plain)] == ["unknown_device"]
            assert await at.values() == []
            await at.sound()

    run(test())


# ---------------------------------------------------------------- once


def test_a_snapshot_lands_once_and_its_nonce_is_nobody_else_s(
    any_database: Database, tmp_path: Path, broker: Broker
) -> None:
    async def test() -> None:
        async with field(any_database, tmp_path, broker) as at:
            plant, other = await at.plant("TOKEN"), await at.plant("MTLS")
            nonce = "0a1b2c3d"
            first = plant.snapshot(n=nonce)
            changed = [{"externalId": "M1", "type": "METER", "values": {"power": 9.0}}]
            at.publish(plant, first, first)
            at.publish(other, other.snapshot(changed, signed=False, n=nonce))
            await at.seen(signed=2, unsigned=1)
            await at.land()
            # In a later batch, too; and a third one in the same batch as the second.
            at.publish(plant, first, plant.snapshot(changed, n=nonce), plant.snapshot(changed, n=nonce.upper()))
            await at.seen(signed=5)
            await at.land()
            assert sorted(await at.values()) == [
                ("energy_imported", "M1", 12_500.0, CONVERTED), ("power", "M1", 9.0, 0), ("power", "M1", 230.0, 0),
            ]  # fmt: skip
            held = [(code, shown["value"]) for code, shown in await at.quarantine(plant)]
            assert held == [("nonce_reused", 9.0)] * 2
            assert await at.rig.ledger() == (9, 3, 4, 0, 2)
            await at.sound()
            # Nonces are forgotten before the log is: whoever reads it still finds nothing wrong.
            await at.here.superuser("DELETE FROM idempotency_keys")
            await at.sound()

    run(test())


def test_what_the_broker_sends_again_is_known_again(
    any_database: Database, tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        name = uuid4().hex
        async with field(any_database, tmp_path, broker, mqtt_broker=name) as at:
            plant = await at.plant("TOKEN")
            at.running.mute(monkeypatch)
            half_bad = [*METER, {"externalId": "B1", "type": "BATTERY", "values": {"soc": "full"}}]
            stale = plant.snapshot(ts=time.time_ns() // 1_000_000 - 3_600_000)
            at.publish(plant, plant.snapshot(), plant.snapshot(half_bad), stale, plant.snapshot(secret=bytes(32)))
            await at.seen(signed=2, stale_envelope=1, bad_signature=1)
            await at.running.kill()
            installation = Installation(any_database, at.rig.log_settings, RING)
            async with bridge(installation, broker, at.rig.log, mqtt_broker=name) as second:
                await second.connected()
                again = Field(at.here, at.rig, broker, second)
                await again.seen(signed=2, stale_envelope=1, bad_signature=1)
                await again.land()
                codes = [code for code, _ in await at.quarantine(plant)]
                assert codes == ["invalid_value", "stale_envelope", "stale_envelope", "bad_signature"]
                assert len(await at.values()) == 4
                received, stored, duplicates, conflicts, quarantined = await at.rig.ledger()
                assert (stored, duplicates, conflicts, quarantined) == (4, 4, 0, 4)
                assert received == 12
                await again.sound()
                # Counted where it was first seen, and by nobody who only saw it again.
                assert (await get(at.here, plant.id))["authFailureCount"] <= 1

    run(test())


def test_landing_that_is_killed_takes_each_snapshot_once(
    any_database: Database, tmp_path: Path, broker: Broker
) -> None:
    async def test() -> None:
        async with field(any_database, tmp_path, broker) as at:
            plants = [await at.plant("TOKEN"), await at.plant("MTLS")]
            at.rig.settings = replace(at.rig.settings, landing_batch_records_max=5)
            nonce = uuid4().hex
            changed = [{"externalId": "M1", "type": "METER", "values": {"power": 9.0}}]
            for round_ in range(4):
                for plant in plants:
                    lines = [plant.snapshot(n=nonce), plant.snapshot(changed, n=nonce)]
                    fresh = [plant.snapshot() for _ in range(20)]
                    at.broker.publish_lines(plant.topic, [*lines, *fresh, *fresh[:10]])
                await at.seen(signed=64 * (round_ + 1))
                landed = await _landed(at.rig)
                async with process(at.rig, tmp_path / f"worker-{round_}") as worker:
                    if round_ < 3:

                        async def is_landing(landed: int = landed) -> bool:
                            return await _landed(at.rig) > landed

                        await until(is_landing)
                        worker.kill()
                    else:
                        await at.rig.landed()
            codes = [code for plant in plants for code, _ in await at.quarantine(plant)]
            assert set(codes) == {"nonce_reused"}
            # Of four rounds the first snapshot has the nonce; seven others came under it, of one or two readings.
            assert len(codes) == 2 * (3 * 2 + 4)
            received, stored, duplicates, conflicts, quarantined = await at.rig.ledger()
            assert (stored, duplicates, conflicts) == (2 * 2 * (1 + 80), 2 * 2 * 40, 0)
            assert received == stored + duplicates + quarantined
            await at.sound()

    run(test())


async def _landed(rig: Rig) -> int:
    found: int = await rig.value("SELECT sum(position)::int FROM log_positions")
    return found


# ---------------------------------------------------------------- when


def test_what_is_stale_lands_late_by_its_own_time_or_waits_in_quarantine(
    any_database: Database, tmp_path: Path, broker: Broker
) -> None:
    async def test() -> None:
        async with field(any_database, tmp_path, broker) as at:
            token, mtls = await at.plant("TOKEN"), await at.plant("MTLS")
            now = SystemClock().now_us() // 1_000
            old = now - 86_400_000
            one = [{"externalId": "M1", "type": "METER", "values": {"power": 7}}]
            bit = [{"externalId": "M1", "type": "METER", "values": {"power": 7, "on": True}}]
            for plant, is_signed in ((token, True), (mtls, False)):
                at.publish(
                    plant,
                    plant.snapshot(bit, signed=is_signed, ts=old + 5, timestamp=old),
                    plant.snapshot(one, signed=is_signed, ts=old),
                    plant.snapshot(one, signed=is_signed, ts=now + 400_000, timestamp="long ago"),
                )
            await at.seen(late=2, stale_envelope=4)
            await at.land()
            assert sorted(await at.values()) == sorted(
                [("power", "M1", 7.0, LATE), ("raw.on", "M1", 1.0, LATE | BOOLEAN)] * 2
            )
            held = await at.quarantine(token)
            assert [code for code, _ in held] == ["stale_envelope"] * 2
            # With its publish time, so that somebody who trusts it can have it replayed.
            assert held[0][1] == {"type": "power", "value": 7, "label": "M1", "unit": "W", "ts": old}
            answer = await at.here.ask("GET", "/api/v1/readings", at.here.key, device_id=token.id, metric="power")
            assert [row["flags"] for row in answer.body["data"]] == [["late"]]
            await at.sound()

    run(test())


def test_a_plant_over_its_limit_waits_and_then_stands_in_quarantine_whole(
    any_database: Database, tmp_path: Path, broker: Broker
) -> None:
    async def test() -> None:
        settings = {"limit_device_requests_per_minute": 1, "mqtt_limit_wait_s": 0}
        async with field(any_database, tmp_path, broker, **settings) as at:
            plant = await at.plant("TOKEN")
            at.publish(plant, plant.snapshot(), plant.snapshot(), plant.snapshot(secret=bytes(32)))
            await at.running.done("quarantined", 2)
            await at.land()
            held = await at.quarantine(plant)
            assert [code for code, _ in held] == ["rate_limited"] * 3
            assert [type(shown) for _, shown in held] == [dict, dict, str]
            await at.sound()

    run(test())
