"""`Prefer: respond-async` at the ingest face: what is paced, what the answer and the receipt say, what goes live."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID
from zlib import crc32

import pytest

from api.registry.limits import set_limits
from ingest.http import pacing
from ingest.paced import lane
from runtime.clock import ManualClock
from schemas.record import PG_EPOCH_US, Record
from schemas.topics import partition_of
from tests.ingest_rig import PARTITIONS, Face, Installation, Reply, Tenant, measured, post_bytes
from tests.landing_rig import until
from tests.services.test_ingest_limits import limit_of, still
from tests.support import run

ASKS = {"Prefer": "respond-async"}
ONE = measured(("temperature", 21.5))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "POLL_S", 0.01)
    monkeypatch.setattr(lane, "TICK_S", 0.05)


def begin_minute(clock: ManualClock, whose: UUID) -> None:
    """Its minute, which begins at a second of its own."""
    now = clock.now_us() + crc32(whose.bytes) % 60_000_000
    clock.advance((60_000_000 - now % 60_000_000) / 1e6)


def paced(reply: Reply) -> Any:
    assert reply.status == 202, reply.body
    answer = reply.json()
    assert (answer["paced"], answer["durable"]) == (True, "spool")
    assert reply.headers["preference-applied"] == "respond-async"
    return answer


def live(reply: Reply) -> Any:
    assert reply.status == 202, reply.body
    assert "preference-applied" not in reply.headers
    answer = reply.json()
    assert "paced" not in answer
    return answer


async def send(face: Face, tenant: Tenant, value: float, **headers: str) -> Reply:
    return await face.post(tenant.token, measured(("temperature", value)), **headers)


def values(found: list[Record]) -> list[float]:
    return [float(value) for one in found for channel in one.channels for value in channel.unpack_values()]


def stands(face: Face, device: UUID, count: int) -> Callable[[], Any]:
    async def look() -> bool:
        return len(await face.records_of(device)) >= count

    return look


async def override(installation: Installation, tenant: Tenant, **values: int | None) -> None:
    names = ("requests_per_minute", "readings_per_minute", "bytes_per_day")
    async with installation.acting_for(tenant.organisation) as connection:
        await set_limits(
            connection, tenant.organisation, {name: values.get(name) for name in names}, device=tenant.device
        )


def test_what_is_over_the_limit_is_taken_and_comes_in_at_the_permitted_rate(
    installation: Installation, tmp_path: Path
) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), still()
        begin_minute(clock, tenant.device)
        async with installation.face(clock=clock, lane=tmp_path, limit_device_requests_per_minute=10) as face:
            for number in range(10):
                live(await send(face, tenant, number, **ASKS))
            limit_of(await send(face, tenant, -1))
            received_us = clock.now_us()
            answers = [paced(await send(face, tenant, number, **ASKS)) for number in range(10, 28)]
            assert answers[0]["accepted"] == 1
            until_s = datetime.fromisoformat(answers[-1]["paced_until"]).timestamp()
            assert datetime.fromisoformat(answers[-1]["paced_until"]).tzinfo == UTC
            assert until_s == pytest.approx(clock.now_us() / 1e6 + 18 / 9 * 60, abs=2)
            asked = await face.get(f"/v1/receipts/{answers[0]['receipt']}", tenant.api_key)
            assert asked.json() == {"receipt": answers[0]["receipt"], "state": "pending", "accepted": 1}
            limit_of(await send(face, tenant, -1))  # and those that do not ask are live or refused, as ever
            assert len(await face.records_of(tenant.device)) == 10
            clock.advance(60)
            live(await send(face, tenant, 100))
            for seconds, count in ((20, 11 + 2), (39.9, 11 + 8), (20.1, 11 + 11), (39, 11 + 17), (2, 11 + 18)):
                clock.advance(seconds)
                await until(stands(face, tenant.device, count))
            found = await face.records_of(tenant.device)
            assert values(found) == [*range(10), 100, *range(10, 28)]
            assert {one.received_at + PG_EPOCH_US - received_us for one in found[11:]} <= set(range(100))
            assert [one.origin is not None for one in found] == [False] * 11 + [True] * 18
            ((spool, slot),) = {(one.origin.spool, one.origin.partition) for one in found if one.origin}
            assert slot % PARTITIONS == partition_of(tenant.device.bytes, PARTITIONS)
            # As landing tells of it.
            await installation.superuser("INSERT INTO spool_positions VALUES ($1, $2, 18)", UUID(bytes=spool), slot)
            asked = await face.get(f"/v1/receipts/{answers[0]['receipt']}", tenant.api_key)
            assert asked.json()["stored"] == 1
            await until(lambda: _counted(face, 18))

    run(test())


async def _counted(face: Face, count: int) -> bool:
    return all(
        face.counted("sluice_ingest_paced_records_total", outcome=outcome) == count
        for outcome in ("accepted", "drained")
    )


def test_who_has_a_backlog_there_and_asks_again_stands_behind_it(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), still()
        begin_minute(clock, tenant.device)
        async with installation.face(clock=clock, lane=tmp_path, limit_device_requests_per_minute=1) as face:
            live(await send(face, tenant, 0))
            paced(await send(face, tenant, 1, **ASKS))
            clock.advance(60)
            paced(await send(face, tenant, 2, **ASKS))
            live(await send(face, tenant, 3))
            await override(installation, tenant, requests_per_minute=0)
            await until(stands(face, tenant.device, 4))
            await until(lambda: _drained(face))
            assert values(await face.records_of(tenant.device)) == [0, 3, 1, 2]
            live(await send(face, tenant, 4, **ASKS))

    run(test())


async def _drained(face: Face) -> bool:
    return face.counted("sluice_ingest_paced_senders") == 0


def test_readings_bytes_and_whole_requests_beyond_any_limit_are_paced_too(
    installation: Installation, tmp_path: Path
) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), still()
        begin_minute(clock, tenant.device)
        many = measured(*[("temperature", float(number)) for number in range(25)])
        async with installation.face(clock=clock, lane=tmp_path, limit_device_readings_per_minute=10) as face:
            assert "split it" in (await face.post(tenant.token, many)).json()["error"]["message"]
            assert paced(await face.post(tenant.token, many, **ASKS))["accepted"] == 25
            for count in (0, 0, 1):
                clock.advance(59)
                await asyncio.sleep(0.1)
                await until(stands(face, tenant.device, count))
                assert len(await face.records_of(tenant.device)) == count
                clock.advance(1)
        bytes_a_day: dict[str, Any] = {"limit_device_bytes_per_day": 100}
        async with installation.face(clock=clock, lane=tmp_path, paced_age_max_s=2e6, **bytes_a_day) as face:
            first = paced(await face.post(tenant.token, many, **ASKS))
            assert first["paced_until"] > datetime.fromtimestamp(clock.now_us() / 1e6 + 86_400, UTC).isoformat()

    run(test())


def test_a_gateway_s_request_is_paced_by_its_site_s_limits(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), still()
        begin_minute(clock, tenant.site)
        other = await installation.add_device(tenant, "oven")
        both = [measured(("co2", 1), device="fridge"), measured(("co2", 2), ("co2", 3), device="oven")]
        both += [measured(("co2", 4), device="nobody")]
        async with installation.face(clock=clock, lane=tmp_path, limit_gateway_requests_per_minute=2) as face:
            for _ in range(2):
                live(await face.post(tenant.gateway, both))
            for _ in range(4):
                answer = paced(await face.post(tenant.gateway, both, **ASKS))
                assert (answer["accepted"], [one["code"] for one in answer["rejected"]]) == (3, ["device_mismatch"])
            live(await send(face, tenant, 5))

            async def paced_records() -> int:
                found = [*await face.records_of(other), *await face.records_of(tenant.device)]
                return sum(one.origin is not None for one in found)

            for seconds, requests in ((0, 0), (60, 0), (59, 2), (60, 4)):
                clock.advance(seconds)

                async def are_in(count: int = 2 * requests) -> bool:
                    return await paced_records() >= count

                await until(are_in)
                await asyncio.sleep(0.1)
                # Devices wait apart, and of a request's two records one stands for it: each in its turn.
                assert await paced_records() <= 2 * requests + 1
            assert values([one for one in await face.records_of(other) if one.origin]) == [2, 3] * 4

    run(test())


def test_a_named_request_is_answered_again_and_keeps_its_name(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), still()
        async with installation.face(clock=clock, lane=tmp_path, limit_device_requests_per_minute=1) as face:
            live(await send(face, tenant, 0))
            named = {"Idempotency_Key": "a", **ASKS}
            first = paced(await send(face, tenant, 1, **named))
            again = await send(face, tenant, 1, **named)
            assert (again.json(), again.headers["idempotency-replayed"]) == (first, "true")
            assert (await send(face, tenant, 2, **named)).code == "idempotency_conflict"
            await override(installation, tenant, requests_per_minute=0)
            await until(stands(face, tenant.device, 2))
            found = await face.records_of(tenant.device)
            assert values(found) == [0, 1]
            assert found[1].idempotency is not None

    run(test())


def test_a_full_lane_says_so_beside_the_limit(installation: Installation, tmp_path: Path) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), still()
        begin_minute(clock, tenant.device)
        bound: dict[str, Any] = {"limit_device_requests_per_minute": 10, "paced_age_max_s": 60.0}
        async with installation.face(clock=clock, lane=tmp_path, **bound) as face:
            for number in range(10):
                live(await send(face, tenant, number))
            for number in range(9):
                paced(await send(face, tenant, number, **ASKS))
            reply = await send(face, tenant, 20, **ASKS)
            assert limit_of(reply)["name"] == "requests_per_minute"
            assert "; the paced lane is full for this device: at the" in reply.json()["error"]["message"]
            assert "preference-applied" not in reply.headers

    run(test())


def test_without_a_lane_a_preference_is_only_that(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(clock=still(), limit_device_requests_per_minute=1) as face:
            live(await send(face, tenant, 0, **ASKS))
            limit_of(await send(face, tenant, 0, **ASKS))

    run(test())


@pytest.mark.parametrize(
    ("prefer", "is_paced"),
    [
        ("respond-async", True),
        ("Respond-Async, wait=10", True),
        ("wait=stored, respond-async", True),
        ("return=minimal", False),
        ('x="respond-async-not"', False),
    ],
)
def test_the_preference_is_one_of_a_list(
    installation: Installation, tmp_path: Path, prefer: str, is_paced: bool
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(clock=still(), lane=tmp_path, limit_device_requests_per_minute=1) as face:
            live(await send(face, tenant, 0))
            reply = await send(face, tenant, 0, Prefer=prefer)
            assert (reply.status == 202) is is_paced

    run(test())


def test_vain_requests_are_not_free(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), still()
        begin_minute(clock, UUID(int=0))
        monkeypatch.setattr(pacing, "_VAIN_MAX", 3)
        async with installation.face(clock=clock, lane=tmp_path, limit_device_requests_per_minute=1) as face:
            live(await send(face, tenant, 0))
            for _ in range(5):
                paced(await send(face, tenant, 0, **ASKS))
            for _ in range(3):
                assert (await face.raw(post_bytes(tenant.token, b"{", **ASKS))).status == 400
            reply = await send(face, tenant, 0, **ASKS)
            assert "could not be used" in reply.json()["error"]["message"]
            clock.advance(60)
            paced(await send(face, tenant, 0, **ASKS))

    run(test())
