"""Receipts: what they say before and after a real worker has landed the readings, and to whom."""

import asyncio
import time
from typing import Any

from ingest.receipts import Place, Receipt
from runtime.clock import SystemClock
from runtime.secrets import new_ring
from schemas.topics import partition_of
from tests.ingest_rig import Face, Installation, Tenant, measured
from tests.landing_rig import Rig
from tests.support import run

WAIT = {"Prefer": "wait=stored"}


def landing(installation: Installation, face: Face) -> Rig:
    """What lands the readings of `face`."""
    return Rig(installation.database, face.log, installation.log_settings)


async def land(installation: Installation, face: Face) -> None:
    rig = landing(installation, face)
    async with rig.worker():
        await rig.landed()


async def ask(face: Face, tenant: Tenant, receipt: str) -> Any:
    reply = await face.get(f"/v1/receipts/{receipt}", tenant.token)
    assert reply.status == 200
    content = reply.json()
    assert content.pop("receipt") == receipt
    return content


def test_a_receipt_is_pending_and_then_tells_what_became_of_each_reading(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        now = time.time()
        async with installation.face() as face:
            first = measured(("co2", 1), ("co2", 2), ("door", "open")) | {"ts": now}
            first["measurements"][1]["ts"] = now - 1
            receipt = (await face.post(tenant.token, first)).json()["receipt"]
            assert await ask(face, tenant, receipt) == {"state": "pending", "accepted": 3}
            await land(installation, face)
            told = {"state": "landed", "accepted": 3, "stored": 3, "duplicates": 0, "conflicts": 0, "quarantined": 0}
            assert await ask(face, tenant, receipt) == told
            again = {
                "ts": now,
                "measurements": [
                    {"type": "co2", "value": 1},  # the same: a duplicate
                    {"type": "co2", "value": 7, "ts": now - 1},  # another value: a conflict
                    {"type": "co2", "value": 3, "ts": now - 2},
                    {"type": "wind", "value": 1, "unit": "bft"},
                    {"type": "wind", "value": 1, "unit": "m/s", "ts": now - 3},  # not the unit first reported
                    {"type": "co2", "value": "much"},  # refused at the door: not among the accepted
                ],
            }
            receipt = (await face.post(tenant.token, again)).json()["receipt"]
            await land(installation, face)
            told = {"state": "landed", "accepted": 5, "stored": 2, "duplicates": 1, "conflicts": 1, "quarantined": 1}
            assert await ask(face, tenant, receipt) == told

    run(test())


def test_a_receipt_outlives_the_process_that_made_it(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            receipt = (await face.post(tenant.token, measured(("co2", 1)))).json()["receipt"]
        async with installation.face() as face:
            await land(installation, face)
            assert (await ask(face, tenant, receipt))["stored"] == 1

    run(test())


def test_only_its_organisation_may_ask(installation: Installation) -> None:
    async def test() -> None:
        tenant, stranger = await installation.tenant(), await installation.tenant()
        async with installation.face() as face:
            receipt = (await face.post(tenant.token, measured(("co2", 1)))).json()["receipt"]
            for token in (tenant.token, tenant.gateway, tenant.api_key):
                assert (await face.get(f"/v1/receipts/{receipt}", token)).status == 200
            for token in (stranger.token, stranger.gateway, stranger.api_key):
                reply = await face.get(f"/v1/receipts/{receipt}", token)
                assert (reply.status, reply.code) == (404, "receipt_not_found")
            assert (await face.get(f"/v1/receipts/{receipt}")).code == "auth_required"

    run(test())


def test_what_is_no_receipt_is_404(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        other = Installation(installation.database, installation.log_settings, new_ring())
        async with installation.face() as face:
            receipt = (await face.post(tenant.token, measured(("co2", 1)))).json()["receipt"]
            flipped = receipt[:40] + ("A" if receipt[40] != "A" else "B") + receipt[41:]
            for text in ("", "x", flipped, receipt[:-1], receipt + "A", receipt + "/", "%00", "%ff", "é", "=" * 2000):
                reply = await face.get(f"/v1/receipts/{text}", tenant.token)
                assert (reply.status, reply.code) in [(404, "receipt_not_found"), (400, "bad_request")], text
        async with other.face() as face:
            assert (await face.get(f"/v1/receipts/{receipt}", tenant.token)).status == 401

    run(test())


class Ahead(SystemClock):
    """A clock that can be set forward."""

    ahead_us = 0

    def now_us(self) -> int:
        return super().now_us() + self.ahead_us


def test_a_receipt_expires(installation: Installation) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), Ahead()
        async with installation.face(clock=clock, receipt_ttl_s=100.0) as face:
            receipt = (await face.post(tenant.token, measured(("co2", 1)))).json()["receipt"]
            clock.ahead_us = 98_000_000
            assert (await face.get(f"/v1/receipts/{receipt}", tenant.token)).status == 200
            clock.ahead_us = 101_000_000
            assert (await face.get(f"/v1/receipts/{receipt}", tenant.token)).status == 404

    run(test())


def test_the_receipt_of_the_largest_batch_can_be_asked_about(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.acting_for(tenant.organisation) as connection:
            await connection.execute(
                "INSERT INTO devices (device_id, organisation_id, name, local_id)"
                " SELECT gen_random_uuid(), $1, 'test', 'd' || n FROM generate_series(0, 399) n",
                tenant.organisation,
            )
            await connection.execute(
                "INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from)"
                " SELECT device_id, $1, $2, now() FROM devices WHERE name = 'test' AND local_id ~ '^d[0-9]+$'",
                tenant.organisation,
                tenant.site,
            )
        async with installation.face() as face:
            batch = [measured(("co2", number), device=f"d{number}") for number in range(400)]
            reply = await face.post(tenant.gateway, batch)
            assert (reply.status, reply.json()["accepted"]) == (202, 400)
            receipt = reply.json()["receipt"]
            assert (await ask(face, tenant, receipt))["state"] == "pending"
            await land(installation, face)
            assert (await ask(face, tenant, receipt))["stored"] == 400

    run(test())


def test_a_record_that_nobody_can_read_is_not_told_as_stored(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            partition = partition_of(tenant.device.bytes, face.log.partitions)
            position = await face.log.append(partition, b"junk")
            (good,) = ((await face.post(tenant.token, measured(("co2", 1)))).json()["receipt"],)
            places = [Place(partition, position, 3), Place(partition, position + 1, 1)]
            made = Receipt(face.log.source.bytes, tenant.organisation.bytes, places)
            receipt = face.service._receipts.make(made)
            await land(installation, face)
            told = {"state": "landed", "accepted": 4, "stored": 1, "duplicates": 0, "conflicts": 0, "quarantined": 3}
            assert await ask(face, tenant, receipt) == told
            assert (await ask(face, tenant, good))["stored"] == 1

    run(test())


# ---------------------------------------------------------------- waiting


def test_who_prefers_to_wait_is_told_what_was_stored(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face, landing(installation, face).worker():
            now = time.time()
            one = measured(("co2", 1), ("temperature", "warm"), ts=now)
            for duplicates, prefer in ((0, "wait=stored"), (1, "respond-async, wait = stored")):
                reply = await face.post(tenant.token, one, Prefer=prefer)
                assert (reply.status, reply.headers["preference-applied"]) == (200, "wait=stored")
                content = reply.json()
                assert (await ask(face, tenant, content.pop("receipt")))["state"] == "landed"
                assert [one["index"] for one in content.pop("rejected")] == [1]
                counts = {"stored": 1 - duplicates, "duplicates": duplicates, "conflicts": 0, "quarantined": 0}
                assert content == {"accepted": 1, "durable": "log"} | counts
            replies = await asyncio.gather(
                *(face.post(tenant.token, measured(("co2", 1), ts=now - number), **WAIT) for number in range(1, 51))
            )
            assert {(reply.status, reply.json()["stored"]) for reply in replies} == {(200, 1)}

    run(test())


def test_who_waits_too_long_gets_the_receipt(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(wait_stored_s=0.2) as face:
            began = time.monotonic()
            reply = await face.post(tenant.token, measured(("co2", 1)), **WAIT)
            assert time.monotonic() - began >= 0.2
            assert (reply.status, "preference-applied" in reply.headers) == (202, False)
            assert set(reply.json()) == {"accepted", "rejected", "receipt", "durable"}

    run(test())


def test_another_preference_is_passed_over(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            for prefer in ("", "wait", "wait=5", "return=minimal"):
                assert (await face.post(tenant.token, measured(("co2", 1)), Prefer=prefer)).status == 202

    run(test())


def test_nobody_waits_for_readings_that_were_all_refused(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            reply = await face.post(tenant.token, measured(("co2", None)), **WAIT)
            assert (reply.status, reply.code) == (422, "all_refused")

    run(test())
