"""Limits at the ingest face: what a refusal tells, whose limit it is, and what is refused before any work is done."""

import asyncio
import time
from typing import Any

import asyncpg
import pytest

from api.registry.limits import set_limits
from runtime.clock import ManualClock
from runtime.postgres import connect
from runtime.secrets import DEVICE_PREFIX, make_token
from tests.databases import Database
from tests.ingest_rig import Face, Installation, Reply, Tenant, head_of, measured, post_bytes
from tests.landing_rig import until
from tests.support import run

ONE = measured(("temperature", 21.5))
LIMIT = {"name", "scope", "value", "used", "window_s", "resets_in_s"}


def still() -> ManualClock:
    """A clock that stands still: no window ends while a test counts."""
    return ManualClock(time.time_ns() // 1000)


async def statuses(face: Face, token: str | None, times: int, **headers: str) -> list[int]:
    return [(await face.raw(post_bytes(token, ONE, **headers))).status for _ in range(times)]


def limit_of(reply: Reply) -> dict[str, Any]:
    assert (reply.status, reply.code) == (429, "rate_limited")
    limit: dict[str, Any] = reply.json()["error"]["limit"]
    assert set(limit) == LIMIT
    return limit


async def override(installation: Installation, tenant: Tenant, values: dict[str, int | None], **whose: Any) -> None:
    async with installation.acting_for(tenant.organisation) as connection:
        await set_limits(connection, tenant.organisation, values, **whose)


# ---------------------------------------------------------------- what a refusal tells


def test_a_refusal_says_which_limit_its_use_and_when_it_begins_anew(installation: Installation) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), still()
        async with installation.face(clock=clock, limit_device_requests_per_minute=3) as face:
            assert await statuses(face, tenant.token, 3) == [202] * 3
            reply = await face.post(tenant.token, ONE)
            limit = limit_of(reply)
            resets = limit["resets_in_s"]
            assert limit | {"resets_in_s": 0} == {
                "name": "requests_per_minute", "scope": "device", "value": 3, "used": 3, "window_s": 60,
                "resets_in_s": 0,
            }  # fmt: skip
            assert reply.headers["ratelimit-policy"] == '"device-requests_per_minute";q=3;w=60'
            assert reply.headers["ratelimit"] == f'"device-requests_per_minute";r=0;t={resets}'
            assert reply.headers["retry-after"] == str(resets)
            assert "3 requests a minute" in reply.json()["error"]["message"]
            assert len(await face.records_of(tenant.device)) == 3
            clock.advance(resets)
            assert await statuses(face, tenant.token, 1) == [202]
            await until(lambda: _counted(face, 1, limit="requests_per_minute", scope="device"))

    run(test())


async def _counted(face: Face, times: int, **labels: str) -> bool:
    return face.counted("sluice_ingest_limited_requests_total", **labels) == times


def test_a_request_over_its_limit_is_refused_before_its_body_has_come(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(clock=still(), limit_device_requests_per_minute=1) as face:
            assert await statuses(face, tenant.token, 1) == [202]
            announced = head_of("POST", "/v1/ingest", tenant.token, Content_Length="1000")
            assert limit_of(await face.raw(announced))["scope"] == "device"

    run(test())


def test_readings_over_the_limit_are_refused_as_a_whole(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(clock=still(), limit_device_readings_per_minute=10) as face:
            for count, expected in ((6, 202), (5, 429), (4, 202), (1, 429)):
                reply = await face.post(tenant.token, measured(*[("temperature", float(n)) for n in range(count)]))
                assert reply.status == expected
            assert limit_of(reply)["used"] == 10
            assert reply.headers["ratelimit-policy"] == '"device-readings_per_minute";q=10;w=60;qu="readings"'
            larger = await face.post(tenant.token, measured(*[("temperature", float(n)) for n in range(11)]))
            assert "split it" in larger.json()["error"]["message"]
            assert limit_of(larger)["value"] == 10
            assert sum(record.accepted for record in await face.records_of(tenant.device)) == 10

    run(test())


def test_bytes_are_counted_unpacked_and_over_a_day(installation: Installation) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), still()
        body = b'{"measurements":[{"type":"temperature","value":1}]}' + b" " * 200
        async with installation.face(clock=clock, limit_device_bytes_per_day=2 * len(body)) as face:
            assert (await face.post(tenant.token, body)).status == 202
            assert (await face.post(tenant.token, body)).status == 202
            reply = await face.post(tenant.token, body)
            limit = limit_of(reply)
            assert (limit["name"], limit["used"], limit["window_s"]) == ("bytes_per_day", 2 * len(body), 86_400)
            assert reply.headers["ratelimit-policy"].endswith(';w=86400;qu="content-bytes"')
            clock.advance(limit["resets_in_s"])
            assert clock.now_us() % 86_400_000_000 < 1_000_000
            assert (await face.post(tenant.token, body)).status == 202

    run(test())


def test_queries_and_receipts_are_requests_too(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(clock=still(), limit_device_requests_per_minute=3) as face:
            receipt = (await face.get("/v1/ingest?temp=4.2", tenant.token)).json()["receipt"]
            assert (await face.get(f"/v1/receipts/{receipt}", tenant.token)).status == 200
            assert (await face.get(f"/v1/ingest/shelly/{tenant.token}?temp=4.2")).status == 202
            assert limit_of(await face.get(f"/v1/receipts/{receipt}", tenant.token))["used"] == 3
            assert (await face.get(f"/v1/receipts/{receipt}", tenant.api_key)).status == 200

    run(test())


# ---------------------------------------------------------------- whose limit it is


def test_an_organisation_s_limit_holds_over_its_devices_and_gateways(installation: Installation) -> None:
    async def test() -> None:
        tenant, other = await installation.tenant(), await installation.tenant()
        async with installation.face(clock=still(), limit_organisation_requests_per_minute=4) as face:
            assert await statuses(face, tenant.token, 2) == [202] * 2
            assert await statuses(face, tenant.gateway, 3, X_Device_Id="fridge") == [202, 202, 429]
            assert limit_of(await face.post(tenant.token, ONE))["scope"] == "organisation"
            assert await statuses(face, other.token, 1) == [202]

    run(test())


def test_a_gateway_has_a_limit_of_its_own(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        limits: dict[str, Any] = {"limit_gateway_requests_per_minute": 2, "limit_device_requests_per_minute": 1}
        async with installation.face(clock=still(), **limits) as face:
            assert await statuses(face, tenant.gateway, 3, X_Device_Id="fridge") == [202, 202, 429]
            assert limit_of(await face.post(tenant.gateway, ONE))["scope"] == "gateway"
            assert await statuses(face, tenant.token, 2) == [202, 429]

    run(test())


def test_two_processes_share_their_counts(installation: Installation) -> None:
    async def test() -> None:
        tenant, clock = await installation.tenant(), still()
        limits: dict[str, Any] = {"limit_device_requests_per_minute": 10}
        async with installation.face(clock=clock, **limits) as one, installation.face(clock=clock, **limits) as two:
            passed = [await statuses(face, tenant.token, 4) for face in (one, two, one, two)]
            assert sum(some.count(202) for some in passed) == 10
        async with installation.face(clock=clock, **limits) as later:
            assert await statuses(later, tenant.token, 1) == [429]

    run(test())


def test_an_override_is_felt_by_a_running_process(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()

        async def passes(token: str) -> bool:
            return (await statuses(face, token, 1))[0] == 202

        async with installation.face(clock=still(), limit_device_requests_per_minute=2) as face:
            assert await statuses(face, tenant.token, 3) == [202, 202, 429]
            await override(installation, tenant, {"requests_per_minute": 0}, device=tenant.device)
            await until(lambda: passes(tenant.token))
            assert await statuses(face, tenant.token, 20) == [202] * 20
            assert await statuses(face, tenant.gateway, 1, X_Device_Id="fridge") == [202]
            await override(installation, tenant, {"requests_per_minute": 1})
            await until(lambda: _refused_for(face, tenant, "organisation"))
            await override(installation, tenant, {"requests_per_minute": None})
            await until(lambda: passes(tenant.token))
            await override(installation, tenant, {"requests_per_minute": None}, device=tenant.device)
            await until(lambda: _refused_for(face, tenant, "device"))
        assert (
            await installation.superuser(
                "SELECT FROM limit_overrides WHERE organisation_id = $1", tenant.organisation
            )
            == []
        )

    run(test())


async def _refused_for(face: Face, tenant: Tenant, scope: str) -> bool:
    reply = await face.post(tenant.token, ONE)
    return reply.status == 429 and bool(limit_of(reply)["scope"] == scope)


def test_a_gateway_s_override_is_its_site_s(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(clock=still()) as face:
            assert await statuses(face, tenant.gateway, 1, X_Device_Id="fridge") == [202]
            await override(installation, tenant, {"requests_per_minute": 1}, site=tenant.site)
            await until(lambda: _gateway_refused(face, tenant))
            assert await statuses(face, tenant.token, 3) == [202] * 3

    run(test())


async def _gateway_refused(face: Face, tenant: Tenant) -> bool:
    return await statuses(face, tenant.gateway, 1, X_Device_Id="fridge") == [429]


def test_an_organisation_overrides_limits_of_nobody_else_s_devices(
    any_database: Database, database: Database
) -> None:
    async def test() -> None:
        installation = Installation(any_database, None)  # type: ignore[arg-type]
        ours, theirs = await installation.tenant(), await installation.tenant()
        for whose in ({"device": theirs.device}, {"site": theirs.site}):
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
                await override(installation, ours, {"requests_per_minute": 0}, **whose)
        await override(installation, theirs, {"requests_per_minute": 5}, device=theirs.device)
        async with installation.acting_for(ours.organisation) as connection:
            assert await connection.fetchval("SELECT count(*) FROM limit_overrides") == 0
            assert await connection.execute("DELETE FROM limit_overrides") == "DELETE 0"
        reader = await connect(any_database.settings, role="sluice_worker", application="test")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await reader.fetch("SELECT organisation_changed($1)", ours.organisation)
        await reader.close()

    run(test())


# ---------------------------------------------------------------- unknown callers


def test_an_unknown_caller_is_limited_by_address_and_a_known_one_beside_it_is_not(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(clock=still(), limit_unknown_requests_per_minute=4) as face:
            assert await statuses(face, tenant.token, 1) == [202]
            for token in (None, "junk", "", "ds_live_mistyped"):
                assert await statuses(face, token, 1) == [401]
            for token in (None, "junk", ""):
                assert limit_of(await face.raw(post_bytes(token, ONE)))["scope"] == "address"
            # What may be a token is counted apart: a device whose token nobody asked about yet is not locked out.
            other = await installation.tenant()
            assert await statuses(face, other.token, 1) == [202]
            for _ in range(4):
                assert await statuses(face, make_token(DEVICE_PREFIX), 1) == [401]
            asked = face.counted("sluice_ingest_credential_lookups_total", result="asked")
            assert limit_of(await face.raw(post_bytes(make_token(DEVICE_PREFIX), ONE)))["used"] == 4
            assert face.counted("sluice_ingest_credential_lookups_total", result="asked") == asked
            assert await statuses(face, tenant.token, 3) == [202] * 3
            spoofed = await face.raw(post_bytes(None, ONE, X_Forwarded_For="203.0.113.9"))
            assert limit_of(spoofed)["scope"] == "address"

    run(test())


def test_a_device_that_goes_on_with_a_dead_token_locks_nobody_out(installation: Installation) -> None:
    async def test() -> None:
        limits: dict[str, Any] = {"limit_unknown_requests_per_minute": 4, "trusted_proxies": ("127.0.0.0/8",)}
        async with installation.face(clock=still(), **limits) as face:
            dead, behind = make_token(DEVICE_PREFIX), "203.0.113.77"
            assert await statuses(face, dead, 8, X_Forwarded_For=behind) == [401] * 5 + [429] * 3
            for _ in range(5):
                other = await installation.tenant()
                assert await statuses(face, other.token, 1, X_Forwarded_For=behind) == [202]

    run(test())


def test_behind_a_trusted_proxy_each_client_is_counted_for_itself(installation: Installation) -> None:
    async def test() -> None:
        limits: dict[str, Any] = {"limit_unknown_requests_per_minute": 2, "trusted_proxies": ("127.0.0.0/8",)}
        async with installation.face(clock=still(), **limits) as face:
            assert await statuses(face, None, 3, X_Forwarded_For="203.0.113.1") == [401, 401, 429]
            assert await statuses(face, None, 3, X_Forwarded_For="9.9.9.9, 203.0.113.2, 127.0.0.9") == [401, 401, 429]
            assert await statuses(face, None, 3, Forwarded='for="[2001:db8::1]:99"') == [401, 401, 429]
            assert await statuses(face, None, 1, Forwarded='for="[2001:db8::2]"') == [429]

    run(test())


# ---------------------------------------------------------------- overload


def test_a_process_that_is_behind_says_so_and_recovers(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()

        async def answered(status: int) -> bool:
            reply = await face.post(tenant.token, ONE)
            if reply.status == 503:
                assert reply.code == "overloaded"
                assert 1 <= int(reply.headers["retry-after"]) <= 5
                assert reply.headers["connection"] == "close"
            return reply.status == status

        async def hog() -> None:
            while True:
                # Not so long that the face takes the database to be away.
                time.sleep(0.08)  # noqa: ASYNC251 - the point of it
                await asyncio.sleep(0)

        async with installation.face(overload_lag_ms=40) as face:
            assert await answered(202)
            hogging = asyncio.create_task(hog())
            await until(lambda: answered(503))
            hogging.cancel()
            await asyncio.gather(hogging, return_exceptions=True)
            await until(lambda: answered(202))
            assert face.counted("sluice_ingest_loop_lag_seconds_count") > 0

    run(test())
