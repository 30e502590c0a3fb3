"""Who sends, and for which device: tokens, gateways, and changes that every process feels."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from api.access.signing import Signer
from api.registry.credentials import Credentials as TokenMaker
from api.registry.gateways import Gateways
from api.registry.sites import add_site
from runtime.clock import ManualClock
from runtime.ids import uuid7
from runtime.secrets import JWT_CHARACTERS_MAX, make_token, new_ring
from tests.ingest_rig import Face, Installation, Reply, Tenant, head_of, measured, post_bytes
from tests.landing_rig import until
from tests.support import run

ONE = measured(("temperature", 21.5))
FELT_WITHIN_S = 1.0


def still() -> ManualClock:
    """A clock that stands still: no minute ends while a test counts."""
    return ManualClock(time.time_ns() // 1000)


async def device_of(face: Face, reply: Reply) -> bytes:
    """Whose record an acknowledged request became."""
    assert reply.status == 202, reply.body
    (device,) = [one.device for one in await face.records() if one.request_id == reply.headers["x-request-id"]]
    return device


async def felt(ask: Callable[[], Awaitable[Reply]], status: int) -> float:
    """Seconds until the last request was sent that got another answer: how long answers take is the machine's."""
    began = last = time.monotonic()

    async def answered() -> bool:
        nonlocal last
        sent = time.monotonic()
        is_felt = (await ask()).status == status
        last = last if is_felt else sent
        return is_felt

    await until(answered)
    return last - began


# ---------------------------------------------------------------- tokens


def test_a_token_may_stand_in_the_header_the_query_or_the_path(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            for reply in (
                await face.post(tenant.token, ONE),
                await face.raw(post_bytes(None, ONE, Authorization=f"bearer   {tenant.token} ")),
                await face.get("/v1/ingest?temp=1", tenant.token),
                await face.get(f"/v1/ingest?temp=1&token={tenant.token}"),
                await face.get(f"/v1/ingest/shelly/{tenant.token}?temp=1"),
            ):
                assert await device_of(face, reply) == tenant.device.bytes

    run(test())


def test_without_a_token_it_is_401_auth_required(installation: Installation) -> None:
    said = ("", "Bearer", "Bearer ", "Basic ZHNfbGl2ZV94Og==", "ds_live_0123", "Token x")

    async def test() -> None:
        async with installation.face() as face, face.connect() as wire:
            for headers in ({}, *({"Authorization": text} for text in said)):
                for raw in (post_bytes(None, ONE, **headers), head_of("GET", "/v1/ingest?temp=1", **headers)):
                    reply = await wire.ask(raw)
                    assert (reply.status, reply.code) == (401, "auth_required"), headers
                    assert reply.headers["www-authenticate"] == 'Bearer realm="sluice"'

    run(test())


def junk_tokens() -> list[str]:
    good = make_token("ds_live_")
    return [
        good,  # well-formed, of nobody
        make_token("gw_live_"),
        make_token("sk_live_"),
        good[:-1],
        good[:-1] + "!",
        good.upper(),
        "ds_live_" + "0" * 36,
        "x" * 5000,
        "é",
        "' OR 1=1 --",
        "\\x00",
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.c2ln",  # a JWT of nobody
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.",
        "eyJ" + "a" * 2_100 + ".a.a",
    ]


def test_a_token_that_is_none_of_ours_is_401(installation: Installation) -> None:
    async def test() -> None:
        async with installation.face() as face, face.connect() as wire:
            for token in junk_tokens():
                reply = await wire.ask(post_bytes(token, ONE))
                assert (reply.status, reply.code) == (401, "token_invalid")
                assert token not in reply.body.decode()

    run(test())


def test_a_token_of_another_installation_is_401(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        other = Installation(installation.database, installation.log_settings, new_ring())
        async with other.face() as face:
            assert (await face.post(tenant.token, ONE)).code == "token_invalid"

    run(test())


def test_a_token_made_before_a_key_was_rotated_goes_on(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        rotated = Installation(installation.database, installation.log_settings, installation.ring.rotated())
        async with rotated.face() as face, face.connect() as wire:
            for _ in range(3):
                assert (await wire.ask(post_bytes(tenant.token, ONE))).status == 202

    run(test())


def test_an_api_key_reads_and_does_not_write(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            for _ in range(2):
                reply = await face.post(tenant.api_key, ONE)
                assert (reply.status, reply.code) == (403, "forbidden")
            receipt = (await face.post(tenant.token, ONE)).json()["receipt"]
            assert (await face.get(f"/v1/receipts/{receipt}", tenant.api_key)).status == 200

    run(test())


def test_a_token_ends_when_it_expires(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            async with installation.acting_for(tenant.organisation) as connection:
                ends = datetime.now(UTC) + timedelta(seconds=3)
                token = await TokenMaker(connection, installation.hasher).add_device_token(
                    tenant.organisation, tenant.device, expires_at=ends
                )
            assert (await face.post(token, ONE)).status == 202
            assert await felt(lambda: face.post(token, ONE), 401) < 3 + FELT_WITHIN_S
            assert datetime.now(UTC) >= ends

    run(test())


# ---------------------------------------------------------------- the token's device


def test_a_device_may_name_itself_and_nobody_else(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        await installation.add_device(tenant, "other")
        stranger = await installation.tenant()
        async with installation.face() as face, face.connect() as wire:
            names: list[object] = ["fridge", str(tenant.device), f"dev_{tenant.device}", None]
            for name in names:
                assert (await wire.ask(post_bytes(tenant.token, ONE | {"device": name}))).status == 202
            for name in ("other", str(stranger.device), "", "Fridge", 7, True, [], {"fridge": 1}, "x" * 100):
                reply = await wire.ask(post_bytes(tenant.token, ONE | {"device": name}))
                assert (reply.status, reply.code) == (403, "device_mismatch")
            for query, status in (("device=fridge", 202), ("device=", 202), ("device=other", 403)):
                reply = await wire.ask(head_of("GET", f"/v1/ingest?token={tenant.token}&{query}&temp=1"))
                assert reply.status == status

    run(test())


def test_x_device_id_overrides_the_bodys_device(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            reply = await face.post(tenant.token, ONE | {"device": "other"}, X_Device_Id="fridge")
            assert await device_of(face, reply) == tenant.device.bytes
            reply = await face.post(tenant.token, ONE | {"device": "fridge"}, X_Device_Id="other")
            assert (reply.status, reply.code) == (403, "device_mismatch")
            reply = await face.post(tenant.gateway, ONE | {"device": "other"}, X_Device_Id="fridge")
            assert await device_of(face, reply) == tenant.device.bytes
            raw = head_of("GET", "/v1/ingest?temp=1&device=other", tenant.token, X_Device_Id="fridge")
            assert (await face.raw(raw)).status == 202

    run(test())


def test_readings_of_another_device_in_a_devices_backlog_are_refused_alone(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            backlog = [ONE, ONE | {"device": "other"}, ONE | {"device": "fridge"}]
            reply = await face.post(tenant.token, backlog)
            assert (reply.status, reply.json()["accepted"]) == (202, 2)
            assert [(one["index"], one["code"]) for one in reply.json()["rejected"]] == [(1, "device_mismatch")]

    run(test())


# ---------------------------------------------------------------- gateways


def test_a_gateway_names_devices_of_its_site(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        second = await installation.add_device(tenant, "d2")
        async with installation.face() as face:
            for name, device in (
                ("fridge", tenant.device),
                ("d2", second),
                (f"dev_{second}", second),
                (str(second), second),
            ):
                reply = await face.post(tenant.gateway, ONE | {"device": name})
                assert await device_of(face, reply) == device.bytes
            reply = await face.get("/v1/ingest?temp=1&device=d2", tenant.gateway)
            assert await device_of(face, reply) == second.bytes

    run(test())


def test_a_local_id_that_is_spelt_like_an_id_gives_way_to_the_device_whose_id_it_is(
    installation: Installation,
) -> None:
    """No such local id is taken any more; those from before may stand."""

    async def test() -> None:
        tenant = await installation.tenant()
        named = await installation.add_device(tenant, str(tenant.device))
        lonely = await installation.add_device(tenant, str(uuid4()))
        async with installation.acting_for(tenant.organisation) as connection:
            name = await connection.fetchval("SELECT local_id FROM devices WHERE device_id = $1", lonely)
        async with installation.face() as face:
            for device, sent in ((tenant.device, str(tenant.device)), (named, f"dev_{named.hex}"), (lonely, name)):
                reply = await face.post(tenant.gateway, ONE | {"device": sent})
                assert await device_of(face, reply) == device.bytes

    run(test())


async def elsewhere(installation: Installation, tenant: Tenant) -> list[str]:
    """Names that are no device of the tenant's site: of another site, of none, of another tenant, moved, deleted."""
    stranger = await installation.tenant()
    async with installation.acting_for(tenant.organisation) as connection:
        site = await add_site(connection, tenant.organisation, "elsewhere")
    other = await installation.add_device(tenant, "other-site", site)
    moved = await installation.add_device(tenant, "moved")
    await move(installation, tenant, moved, site)
    gone = await installation.add_device(tenant, "gone")
    await installation.execute(tenant, "UPDATE devices SET status = 'deleted' WHERE device_id = $1", gone)
    homeless = await installation.add_device(tenant, "no-site")
    await move(installation, tenant, homeless, None)
    return [
        "other-site",
        str(other),
        "moved",
        "gone",
        str(gone),
        "no-site",
        str(stranger.device),
        "nobody",
        str(uuid7()),
    ]


async def move(installation: Installation, tenant: Tenant, device: UUID, site: UUID | None) -> None:
    await installation.execute(
        tenant,
        "INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from)"
        " VALUES ($1, $2, $3, clock_timestamp())",
        device,
        tenant.organisation,
        site,
    )


def test_a_gateway_reaches_no_other_device(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        names = await elsewhere(installation, tenant)
        async with installation.face() as face, face.connect() as wire:
            for name in (*names, None, "", 7, "x" * 65):
                reply = await wire.ask(post_bytes(tenant.gateway, ONE | {"device": name}))
                assert (reply.status, reply.code) == (403, "device_mismatch"), name
            submissions = [ONE | {"device": name} for name in (*names, "fridge")]
            reply = await wire.ask(post_bytes(tenant.gateway, submissions))
            assert (reply.status, reply.json()["accepted"]) == (202, 1)
            assert {one["code"] for one in reply.json()["rejected"]} == {"device_mismatch"}
            assert [one["index"] for one in reply.json()["rejected"]] == list(range(len(names)))

    run(test())


def test_a_gateways_batch_becomes_one_record_a_device(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        devices = [await installation.add_device(tenant, f"d{number}") for number in range(5)]
        async with installation.face() as face:
            batch = [measured(("co2", number), device=f"d{number % 5}") for number in range(15)]
            reply = await face.post(tenant.gateway, batch)
            assert (reply.status, reply.json()["accepted"]) == (202, 15)
            for number, device in enumerate(devices):
                (record,) = await face.records_of(device)
                assert record.channels[0].unpack_values() == (number, number + 5.0, number + 10.0)

    run(test())


def test_a_batch_of_more_devices_than_a_receipt_can_name_is_413_before_any_is_looked_up(
    installation: Installation,
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            batch = [measured(("co2", 1), device=f"d{number}") for number in range(401)]
            reply = await face.post(tenant.gateway, batch)
            assert (reply.status, reply.code) == (413, "too_many_readings")
            # Of one device there may be as many submissions as readings.
            reply = await face.post(tenant.gateway, [measured(("co2", 1), device="fridge")] * 1_000)
            assert (reply.status, reply.json()["accepted"]) == (202, 1_000)
            assert (await face.post(tenant.gateway, batch, X_Device_Id="fridge")).status == 202

    run(test())


async def register(installation: Installation, tenant: Tenant, kind: str) -> str:
    """A token as the site's server or an edge device gets it."""
    async with installation.acting_for(tenant.organisation) as connection:
        tokens = TokenMaker(connection, installation.hasher)
        machines = Gateways(connection, tenant.organisation, tokens, Signer(installation.ring, issuer="test"))
        if kind == "server":
            return await machines.register_server(tenant.site, "hardware", "server.local", "1")
        return (await machines.register_edge(tenant.site, "edge", "hardware", "1", edges_max=1))[0]


def test_a_sites_server_and_its_edge_devices_are_its_gateways(installation: Installation) -> None:
    """Their tokens are JWTs; who registers again gets another one, and the one before ends."""

    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            for kind in ("server", "edge"):
                old = await register(installation, tenant, kind)
                assert len(old) < JWT_CHARACTERS_MAX / 2
                for reply in (
                    await face.post(old, ONE | {"device": "fridge"}),
                    await face.get("/v1/ingest?temp=1&device=fridge", old),
                    await face.get(f"/v1/ingest?temp=1&device=fridge&token={old}"),
                ):
                    assert await device_of(face, reply) == tenant.device.bytes
                assert (await face.post(old, ONE | {"device": "nobody"})).code == "device_mismatch"
                new = await register(installation, tenant, kind)
                assert await felt(lambda token=old: face.post(token, ONE | {"device": "fridge"}), 401) < FELT_WITHIN_S  # type: ignore[misc]
                assert (await face.post(new, ONE | {"device": "fridge"})).status == 202
            await installation.execute(tenant, "SELECT begin_site_erasure($1)", tenant.site)
            assert await felt(lambda: face.post(new, ONE | {"device": "fridge"}), 401) < FELT_WITHIN_S
            assert await felt(lambda: face.post(tenant.gateway, ONE | {"device": "fridge"}), 401) < FELT_WITHIN_S

    run(test())


# ---------------------------------------------------------------- changes


def test_a_change_is_felt_in_every_process_within_a_second(installation: Installation) -> None:
    """Two services that share nothing but the database stand for two processes."""

    async def test() -> None:
        tenant = await installation.tenant()
        async with AsyncExitStack() as stack:
            faces = [await stack.enter_async_context(installation.face()) for _ in range(2)]

            async def both(token: str, status: int, **body: object) -> None:
                within = [felt(lambda face=face: face.post(token, ONE | body), status) for face in faces]  # type: ignore[misc]
                assert max(await asyncio.gather(*within)) < FELT_WITHIN_S

            unknown = make_token("ds_live_")
            await both(unknown, 401)  # remembered as unknown from here on
            for token in (tenant.token, tenant.gateway):
                await both(token, 202, device="fridge")
            await installation.execute(
                tenant,
                "INSERT INTO credentials (credential_id, organisation_id, kind, device_id, token_hash)"
                " VALUES ($1, $2, 'device', $3, $4)",
                uuid7(), tenant.organisation, tenant.device, installation.hasher.digest(unknown),
            )  # fmt: skip
            await both(unknown, 202)
            await set_status(installation, tenant, "suspended")
            for token in (tenant.token, unknown, tenant.gateway):
                await both(token, 403, device="fridge")
            await set_status(installation, tenant, "active")
            for token in (tenant.token, unknown, tenant.gateway):
                await both(token, 202, device="fridge")
            await installation.execute(tenant, "UPDATE credentials SET revoked_at = now() WHERE kind = 'device'")
            await both(tenant.token, 401)
            await both(unknown, 401)
            await both(tenant.gateway, 202, device="fridge")
            await move(installation, tenant, tenant.device, None)
            await both(tenant.gateway, 403, device="fridge")
            await installation.execute(tenant, "DELETE FROM credentials WHERE kind = 'gateway'")
            await both(tenant.gateway, 401)

    run(test())


class Deaf:
    """A session whose notifications never arrive."""

    async def listen(self, channel: str, callback: Callable[..., None]) -> None:
        await asyncio.Event().wait()


def test_a_change_is_felt_within_a_second_by_who_hears_no_notification(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(listener=Deaf()) as face:
            assert (await face.post(tenant.token, ONE)).status == 202
            await installation.execute(tenant, "UPDATE credentials SET revoked_at = now()")
            assert await felt(lambda: face.post(tenant.token, ONE), 401) < FELT_WITHIN_S

    run(test())


async def set_status(installation: Installation, tenant: Tenant, status: str) -> None:
    await installation.execute(tenant, "UPDATE devices SET status = $2 WHERE device_id = $1", tenant.device, status)


def test_a_suspended_device_is_403_by_its_token_and_by_its_gateway(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        await installation.add_device(tenant, "d2")
        await set_status(installation, tenant, "suspended")
        async with installation.face() as face:
            reply = await face.post(tenant.token, ONE)
            assert (reply.status, reply.code) == (403, "device_suspended")
            reply = await face.post(tenant.gateway, ONE | {"device": "fridge"})
            assert (reply.status, reply.code) == (403, "device_suspended")
            reply = await face.post(tenant.gateway, [ONE | {"device": "fridge"}, ONE | {"device": "d2"}])
            assert (reply.status, reply.json()["rejected"][0]["code"]) == (202, "device_suspended")

    run(test())


def test_what_a_gateway_sends_for_a_suspended_device_is_kept_for_the_quarantine(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        other = await installation.add_device(tenant, "d2")
        await set_status(installation, tenant, "suspended")
        now = time.time()
        theirs = ONE | {"device": "fridge", "ts": now}
        async with installation.face() as face:
            assert (await face.post(tenant.gateway, theirs)).code == "device_suspended"
            mixed = [ONE | {"device": "d2"}, theirs, ONE | {"device": "nobody"}]
            reply = await face.post(tenant.gateway, mixed)
            assert (reply.status, reply.json()["accepted"]) == (202, 1)
            assert [(one["index"], one["code"]) for one in reply.json()["rejected"]] == [
                (1, "device_suspended"),
                (2, "device_mismatch"),
            ]
            reply = await face.post(tenant.gateway, [theirs, ONE | {"device": "nobody"}])
            assert (reply.status, reply.code) == (403, "device_suspended")
            kept = await face.records_of(tenant.device)
            assert [(record.channels, [one.index for one in record.refused]) for record in kept] == [
                ([], [0]),
                ([], [1]),
                ([], [0]),
            ]
            for record in kept:
                (refused,) = record.refused
                assert (refused.code, json.loads(refused.payload)["ts"]) == ("device_suspended", now)
            assert [record.accepted for record in await face.records_of(other)] == [1]

    run(test())


async def kept_of(face: Face, tenant: Tenant) -> list[list[tuple[int, str, object]]]:
    """Of each record of the device, which has no readings: index, code and payload of what is refused."""
    found = await face.records_of(tenant.device)
    assert all(not record.channels for record in found)
    return [[(one.index, one.code, json.loads(one.payload)) for one in record.refused] for record in found]


def test_what_a_suspended_device_sends_is_kept_for_the_quarantine(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        await set_status(installation, tenant, "suspended")
        one, two = {"type": "co2", "value": 1, "extra": 7}, {"type": "warp", "value": None}
        async with installation.face() as face:
            for reply in (
                await face.post(tenant.token, {"ts": 5, "measurements": [one, two]}),
                await face.post(tenant.token, [{"measurements": [one]}, {"device": "fridge", "measurements": [two]}]),
                await face.get(f"/v1/ingest/shelly/{tenant.token}?temp=4&warp=1"),
            ):
                assert (reply.status, reply.code) == (403, "device_suspended")
            code = "device_suspended"
            assert await kept_of(face, tenant) == [
                [(0, code, one | {"ts": 5}), (1, code, two | {"ts": 5})],
                [(0, code, one), (1, code, two)],
                [
                    (0, code, {"type": "temperature", "value": 4.0}),
                    (1, "unknown_parameter", {"parameter": "warp", "value": "1"}),
                ],
            ]
            face.service._publish()
            assert face.counted("sluice_ingest_readings_total", outcome="refused", reason=code) == 5

    run(test())


def test_of_a_suspended_device_nothing_is_kept_that_is_no_reading_of_its_own(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            receipt = (await face.post(tenant.token, ONE)).json()["receipt"]
            await set_status(installation, tenant, "suspended")
            await felt(lambda: face.get(f"/v1/receipts/{receipt}", tenant.token), 403)
            for body, status, code in (
                (b'{"measurements":[', 400, "bad_json"),
                ({"measurements": []}, 422, "no_readings"),
                (ONE | {"device": "another"}, 403, "device_mismatch"),
            ):
                reply = await face.post(tenant.token, body)
                assert (reply.status, reply.code) == (status, code)
            assert (await face.get(f"/v1/receipts/{receipt}", tenant.token)).code == "device_suspended"
            assert len(await face.records_of(tenant.device)) == 1

    run(test())


def test_a_suspended_device_has_its_limits_and_uses_up_no_names(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        await set_status(installation, tenant, "suspended")
        async with installation.face(limit_device_requests_per_minute=2, clock=still()) as face:
            for _ in range(2):
                assert (await face.post(tenant.token, ONE, Idempotency_Key="a")).code == "device_suspended"
            reply = await face.post(tenant.token, ONE)
            assert (reply.status, reply.json()["error"]["limit"]["scope"]) == (429, "device")
            for record in await face.records_of(tenant.device):
                assert (record.idempotency, len(record.refused)) == (None, 1)

    run(test())


def test_readings_older_than_the_organisation_keeps_are_refused(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        await installation.execute(tenant, "UPDATE organisations SET raw_retention_days = 10")
        async with installation.face() as face:
            for days, status in ((9.9, 202), (10.1, 422)):
                reply = await face.post(tenant.token, measured(("co2", 1), ts=time.time() - days * 86_400))
                assert reply.status == status
            assert reply.json()["error"]["rejected"][0]["code"] == "too_old"

    run(test())
