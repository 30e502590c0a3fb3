"""Idempotency-Key at the door: a repeat that this process can tell gets the first answer; others are marked."""

import asyncio

import pytest

from ingest.http.service import IngestService
from schemas.record import LATE_VERSION
from tests.ingest_rig import Face, Installation, Reply, Tenant, head_of, measured, post_bytes
from tests.landing_rig import until
from tests.support import run

ONE = measured(("temperature", 4.2))
OTHER = measured(("temperature", 4.3))


async def post(face: Face, tenant: Tenant, body: object, key: str) -> Reply:
    return await face.raw(post_bytes(tenant.token, body, Idempotency_Key=key))


def test_a_repeat_gets_the_first_answer_and_adds_nothing(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            first = await post(face, tenant, ONE, "a-1")
            again = await post(face, tenant, ONE, '"a-1"')
            assert (again.status, again.body) == (first.status, first.body) == (202, first.body)
            assert "idempotency-replayed" not in first.headers
            assert again.headers["idempotency-replayed"] == "true"
            assert again.headers["x-request-id"] != first.headers["x-request-id"]
            assert (await post(face, tenant, ONE, "a-2")).body != first.body
            found = await face.records_of(tenant.device)
            assert [record.version for record in found] == [LATE_VERSION, LATE_VERSION]
            names = [record.idempotency for record in found]
            assert names[0] is not None
            assert names[1] is not None
            assert (names[0].scope, names[0].fingerprint) == (names[1].scope, names[1].fingerprint)
            assert names[0].key != names[1].key

    run(test())


def test_another_content_under_the_same_key_is_a_conflict(installation: Installation) -> None:
    async def test() -> None:
        tenant, stranger = await installation.tenant(), await installation.tenant()
        async with installation.face() as face:
            assert (await post(face, tenant, ONE, "k")).status == 202
            conflict = await post(face, tenant, OTHER, "k")
            assert (conflict.status, conflict.code) == (409, "idempotency_conflict")
            assert (await post(face, stranger, OTHER, "k")).status == 202
            assert len(await face.records_of(tenant.device)) == 1

    run(test())


def test_the_same_key_for_another_device_is_another_request(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        other = await installation.add_device(tenant, "cellar")
        async with installation.face() as face:
            for header in ({"X_Device_Id": "fridge"}, {"X_Device_Id": "cellar"}):
                reply = await face.raw(post_bytes(tenant.gateway, ONE, Idempotency_Key="k", **header))
                assert (reply.status, "idempotency-replayed" in reply.headers) == (202, False)
                again = await face.raw(post_bytes(tenant.gateway, ONE, Idempotency_Key="k", **header))
                assert (again.body, "idempotency-replayed" in again.headers) == (reply.body, True)
            for device in ("fridge", "cellar"):
                named = await face.raw(post_bytes(tenant.gateway, OTHER | {"device": device}, Idempotency_Key="n"))
                assert named.status == 202
            assert len(await face.records_of(tenant.device)) == len(await face.records_of(other)) == 2

    run(test())


def test_what_was_refused_does_not_use_up_its_key(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            await installation.execute(tenant, "UPDATE devices SET status = 'suspended'")
            refused = await post(face, tenant, ONE, "k")
            assert (refused.status, refused.code) == (403, "device_suspended")
            await installation.execute(tenant, "UPDATE devices SET status = 'active'")
            await until(lambda: _accepted(face, tenant))
            kept = await face.records_of(tenant.device)
            assert kept[0].idempotency is None
            assert kept[-1].idempotency is not None

    run(test())


async def _accepted(face: Face, tenant: Tenant) -> bool:
    return (await post(face, tenant, ONE, "k")).status == 202


def test_repeats_while_the_first_is_under_way_wait_for_its_answer(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            replies = await asyncio.gather(*(post(face, tenant, ONE, "k") for _ in range(20)))
            assert {(reply.status, reply.body) for reply in replies} == {(202, replies[0].body)}
            assert len(await face.records_of(tenant.device)) == 1

    run(test())


def test_what_was_not_made_durable_may_be_sent_again_under_its_key(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            with monkeypatch.context() as patch:
                patch.setattr(IngestService, "_keep", _fails)
                assert (await post(face, tenant, ONE, "k")).status == 500
            assert (await post(face, tenant, ONE, "k")).status == 202

    run(test())


def _fails(*_: object) -> None:
    raise RuntimeError("the first request breaks")


def test_get_requests_have_keys_too_and_what_is_no_key_is_refused(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face() as face:
            ask = head_of("GET", "/v1/ingest?temp=4.2", tenant.token, Idempotency_Key="k")
            first, again = await face.raw(ask), await face.raw(ask)
            assert (first.status, again.body) == (202, first.body)
            for key in ("", '""', "k" * 256, "ü"):
                raw = post_bytes(tenant.token, ONE, Idempotency_Key=key)
                refused = await face.raw(raw)
                assert (refused.status, refused.code) == (400, "invalid_parameter"), key
            assert len(await face.records_of(tenant.device)) == 1

    run(test())


def test_the_memory_is_bounded_and_landing_has_the_rest(installation: Installation) -> None:
    async def test() -> None:
        tenant = await installation.tenant()
        async with installation.face(idempotency_entries_max=2) as face:
            for key in ("a", "b", "c"):
                assert (await post(face, tenant, ONE, key)).status == 202
            assert (await post(face, tenant, ONE, "a")).status == 202
            names = [record.idempotency for record in await face.records_of(tenant.device)]
            assert len(names) == 4
            assert names[0] == names[3]

    run(test())
