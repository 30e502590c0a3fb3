"""The first certificate of a device that keeps its key, and what brokers fetch, over HTTP.

Left out: what a certificate says, and revoking (`test_certificates`).
"""

import asyncio
from typing import Any
from uuid import UUID

from cryptography import x509

from api.certificates.building import new_key
from api.certificates.issuing import revoke
from api.registry import devices
from api.registry.organisations import acting_for
from runtime.ids import uuid7
from runtime.postgres import connect
from runtime.secrets import REGISTRATION_PREFIX, make_token
from tests.certificate_rig import add_authority, request_for
from tests.databases import Database
from tests.people_rig import API_URL, Answer, People, people
from tests.support import run

TOKENS = "/api/v1/devices/registration/tokens"
PROVISION = "/api/v1/devices/provision"
CRL = "/api/v1/certificates/crl"
CA = "/api/v1/certificates/ca"
NAME = "warehouse-gateway-01"


async def registered(here: People, **body: Any) -> Any:
    answer = await here.ask("POST", TOKENS, here.key, body or {"deviceName": NAME})
    assert answer.status == 201, answer.body
    return answer.body


async def provisioned(here: People, token: str, request: str | None = None, **more: Any) -> Answer:
    return await here.ask("POST", PROVISION, None, {"token": token, "csr": request or request_for()}, **more)


async def text(here: People, path: str, **headers: str) -> tuple[int, str, Any]:
    async with here.session.get(f"{here.url}{path}", headers=headers) as answer:
        return answer.status, await answer.text(), answer.headers


async def with_device(here: People, what: Any, device: UUID, *values: Any) -> None:
    connection = await connect(here.database.settings, role=None, application="test")
    async with acting_for(connection, here.organisation):
        await what(connection, *values, device)
    await connection.close()


def test_a_token_is_exchanged_for_a_certificate_of_the_device_s_own_key(any_database: Database) -> None:
    async def test() -> None:
        await add_authority(any_database)
        async with people(any_database) as here:
            made = await registered(here)
            assert made.keys() == {"token", "deviceId", "deviceName", "provisionEndpoint", "expiresAt"}
            assert (made["deviceName"], made["provisionEndpoint"]) == (NAME, f"{API_URL}{PROVISION}")
            assert made["token"].split(".")[1] == made["deviceId"]
            key = new_key()
            answer = await provisioned(here, made["token"], request_for(key))
            assert answer.status == 201, answer.body
            told = answer.body
            certificate = x509.load_pem_x509_certificate(told["certificate"].encode())
            issuing, root = x509.load_pem_x509_certificates(told["caChain"].encode())
            certificate.verify_directly_issued_by(issuing)
            issuing.verify_directly_issued_by(root)
            assert certificate.public_key() == key.public_key()
            assert certificate.subject.rfc4514_string() == f"CN={made['deviceId']},O={here.organisation}"
            assert told["certificateSerialNumber"] == f"{certificate.serial_number:x}"
            place = f"{here.organisation}/{made['deviceId']}"
            assert told["mqtt"] == {
                "broker": "sluice.example",
                "port": 8883,
                "topics": {
                    "readings": f"v1/readings/{place}",
                    "health": f"v1/gateways/{place}/health",
                    "status": f"v1/gateways/{place}/status",
                    "configReported": f"v1/gateways/{place}/config/reported",
                    "commands": f"v1/gateways/{place}/commands",
                    "commandsResponse": f"v1/gateways/{place}/commands/response",
                },
            }
            found = await here.ask("GET", f"/v1/devices/dev_{UUID(made['deviceId']).hex}", here.key)
            assert (found.body["name"], found.body["local_id"]) == (NAME, NAME)
            actions = [action for action, _ in await here.audited(here.organisation)]
            assert actions == [
                "organisation.created", "device.created", "device.registration_issued", "certificate.issued",
            ]  # fmt: skip

    run(test())


def test_a_token_is_good_once_however_many_come_at_once(any_database: Database) -> None:
    async def test() -> None:
        await add_authority(any_database)
        async with people(any_database) as here:
            token = (await registered(here))["token"]
            answers = await asyncio.gather(*(provisioned(here, token) for _ in range(20)))
            assert sorted(answer.status for answer in answers) == [201] + [401] * 19
            assert {answer.body["code"] for answer in answers if answer.status == 401} == {"token_invalid"}
            assert (await here.superuser("SELECT count(*) FROM certificates"))[0][0] == 1
            assert (await provisioned(here, token)).code == (401, "token_invalid")

    run(test())


def test_a_refused_request_leaves_the_token_as_it_was(database: Database) -> None:
    async def test() -> None:
        await add_authority(database)
        async with people(database) as here:
            token = (await registered(here))["token"]
            refused = await provisioned(here, token, "no request")
            assert refused.code == (422, "invalid")
            assert refused.body["errors"][0]["field"] == "csr"
            assert (await provisioned(here, token)).status == 201

    run(test())


def test_tokens_end_with_time_with_the_next_one_and_with_their_device(database: Database) -> None:
    async def test() -> None:
        await add_authority(database)
        async with people(database) as here:
            first = await registered(here)
            device = UUID(first["deviceId"])
            second = await registered(here, deviceId=str(device))
            assert (second["deviceId"], second["deviceName"]) == (str(device), NAME)
            assert (await provisioned(here, first["token"])).code == (401, "token_invalid")
            await here.superuser("UPDATE device_registrations SET expires_at = now()")
            assert (await provisioned(here, second["token"])).code == (401, "token_invalid")
            third = (await registered(here, deviceId=str(device)))["token"]
            await here.superuser("UPDATE devices SET status = 'suspended'")
            assert (await provisioned(here, third)).code == (403, "device_suspended")
            await here.superuser("UPDATE devices SET status = 'active'")
            assert (await provisioned(here, third)).status == 201
            fourth = (await registered(here, deviceId=str(device)))["token"]
            await with_device(here, lambda connection, one: devices.remove(connection, one, None), device)
            assert (await provisioned(here, fourth)).code == (401, "token_invalid")
            gone = await here.ask("POST", TOKENS, here.key, {"deviceId": str(device)})
            assert gone.code == (404, "device_not_found")

    run(test())


def test_of_a_token_a_hash_is_kept(database: Database) -> None:
    async def test() -> None:
        await add_authority(database)
        async with people(database) as here:
            token = (await registered(here))["token"]
            secret = token.rpartition(".")[2]
            assert secret.startswith(REGISTRATION_PREFIX)
            rows = await here.superuser("SELECT r::text AS row FROM device_registrations r")
            rows += await here.superuser("SELECT r::text AS row FROM audit_log r")
            assert all(secret not in row["row"] for row in rows)
            # What holds another's ids, or another secret, is another token.
            parts = token.split(".")
            for other in (
                ".".join([parts[0], str(uuid7()), parts[2]]),
                ".".join([*parts[:2], make_token(REGISTRATION_PREFIX)]),
                secret,
            ):
                assert (await provisioned(here, other)).code == (401, "token_invalid")
            assert (await provisioned(here, token)).status == 201

    run(test())


def test_who_guesses_tokens_is_told_to_wait_and_others_are_not(database: Database) -> None:
    async def test() -> None:
        await add_authority(database)
        async with people(database, auth_guesses_per_minute=3) as here:
            token = (await registered(here))["token"]
            guesses = ("", f"x.y.{make_token(REGISTRATION_PREFIX)}", "eyJ0.e30.x")
            for guess in guesses:
                assert (await provisioned(here, guess)).code == (401, "token_invalid")
            waits = await provisioned(here, token)
            assert waits.code == (429, "rate_limited")
            assert int(waits.headers["Retry-After"]) > 0
            assert (await provisioned(here, token, address="198.51.100.9")).status == 201

    run(test())


def test_only_admins_and_keys_for_it_give_out_tokens_and_for_devices_of_their_own(database: Database) -> None:
    async def test() -> None:
        await add_authority(database)
        async with people(database) as here:
            body = {"deviceName": NAME}
            assert (await here.ask("POST", TOKENS, await here.token_as("admin"), body)).status == 201
            assert (await here.ask("POST", TOKENS, await here.token_as("member"), body)).code == (403, "forbidden")
            reader = await here.api_key("devices:read")
            assert (await here.ask("POST", TOKENS, reader, body)).code == (403, "scope_missing")
            device = (await registered(here))["deviceId"]
            _, other = await here.tenant()
            theirs = await here.ask("POST", TOKENS, other, {"deviceId": device})
            assert theirs.code == (404, "device_not_found")
            for wrong in ({}, {"deviceName": NAME, "deviceId": device}):
                assert (await here.ask("POST", TOKENS, here.key, wrong)).code == (422, "invalid")

    run(test())


def test_so_many_tokens_wait_and_no_more(database: Database) -> None:
    async def test() -> None:
        await add_authority(database)
        async with people(database) as here:
            device = (await registered(here))["deviceId"]
            await here.superuser(
                "INSERT INTO device_registrations SELECT gen_random_uuid(), organisation_id, device_id,"
                " sha256(i::text::bytea), now(), expires_at FROM device_registrations, generate_series(1, 999) i"
            )
            answer = await here.ask("POST", TOKENS, here.key, {"deviceName": "one more"})
            assert answer.code == (409, "registration_limit")
            assert (await here.superuser("SELECT count(*) FROM devices"))[0][0] == 1
            # Those of the device make room for its next one.
            assert (await registered(here, deviceId=device))["deviceId"] == device

    run(test())


def test_without_an_authority_nobody_is_registered_and_there_is_nothing_to_fetch(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            answer = await here.ask("POST", TOKENS, here.key, {"deviceName": NAME})
            assert answer.code == (409, "authority_missing")
            assert "sluice ca init" in answer.body["detail"]
            assert (await here.superuser("SELECT count(*) FROM devices"))[0][0] == 0
            for path in (CA, CRL):
                assert (await here.ask("GET", path)).code == (404, "not_found")

    run(test())


def test_anybody_fetches_the_authorities_and_the_lists_and_once_while_they_stay(any_database: Database) -> None:
    async def test() -> None:
        issuing = await add_authority(any_database)
        async with people(any_database) as here:
            status, pem, headers = await text(here, CA)
            assert (status, headers["Content-Type"]) == (200, "application/x-pem-file")
            assert issuing.certificate in x509.load_pem_x509_certificates(pem.encode())
            assert pem.count("BEGIN CERTIFICATE") == 2
            made = await registered(here)
            told = (await provisioned(here, made["token"])).body
            status, pem, headers = await text(here, CRL)
            assert (status, len(x509.load_pem_x509_crl(pem.encode()))) == (200, 0)
            tag = headers["ETag"]
            assert (await text(here, CRL, **{"If-None-Match": tag}))[0] == 304
            await with_device(
                here,
                lambda connection, device: revoke(connection, here.organisation, device, "keyCompromise"),
                UUID(made["deviceId"]),
            )
            status, pem, headers = await text(here, CRL, **{"If-None-Match": tag})
            (one,) = x509.load_pem_x509_crl(pem.encode())
            assert (status, f"{one.serial_number:x}") == (200, told["certificateSerialNumber"])
            assert headers["ETag"] != tag

    run(test())
