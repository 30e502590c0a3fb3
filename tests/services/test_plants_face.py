"""The Plants face over HTTP, on both databases: everything its document prints, in order, and what it leaves open."""

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import jwt
import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from api.certificates import issuing
from api.http.openapi import kinds_of
from api.plants import examples
from api.registry.organisations import acting_for
from api.registry.plants import open_alert
from runtime.ids import uuid7
from runtime.postgres import connect
from runtime.secrets import KeyRing, Seal, new_ring
from schemas.plants import SECRET_SEAL, TOKEN_AUDIENCE
from schemas.record import PG_EPOCH_US
from tests.certificate_rig import people_with_authority, request_for
from tests.databases import Database
from tests.people_rig import RING, Answer, People
from tests.support import run
from workers.presence import Presence
from workers.settings import PresenceSettings

PATH = "/api/v1/plants"
REASONS = {400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 409: "Conflict"}
NOBODY_S = UUID(int=7)
SYSTEM_CABINET = "01900000-0000-7000-8000-000000000001"
SYSTEM_METER = "01900000-0000-7000-8000-000000000002"


def error(answer: Answer) -> tuple[int, str]:
    """Status and code of an error, whose shape is checked."""
    body = answer.body
    assert set(body) == {"code", "details", "error", "message", "statusCode"}, body
    assert body["statusCode"] == answer.status
    assert body["error"] == REASONS.get(answer.status, body["error"])
    assert isinstance(body["details"], dict)
    assert body["message"]
    return answer.status, body["code"]


def same_fields(found: Any, printed: Any, where: str = "") -> None:
    """Whether an answer has the fields that the document prints, and no others; what is null has none."""
    if isinstance(printed, dict) and printed:
        assert set(found) == set(printed), where
        for name, value in printed.items():
            if found[name] is not None:
                same_fields(found[name], value, f"{where}.{name}")
    elif isinstance(printed, list) and printed != [{}]:
        assert found, where
        for one in found:
            same_fields(one, printed[0], where)


async def made(here: People, serial: str | None = None, method: str = "MTLS", **fields: Any) -> str:
    """The id of a new plant."""
    body = {"name": "Plant", "serialNumber": serial or uuid4().hex, "type": "SENSOR", "authMethod": method} | fields
    answer = await here.ask("POST", PATH, here.key, body)
    assert answer.status == 201, answer.body
    plant: str = answer.body["id"]
    return plant


async def active(here: People, method: str = "MTLS", **fields: Any) -> tuple[str, Any]:
    """The id of a new plant, and its package."""
    plant = await made(here, method=method, **fields)
    answer = await here.ask("POST", f"{PATH}/{plant}/provision", here.key)
    assert answer.status == 200, answer.body
    return plant, answer.body


async def get(here: People, plant: str) -> Any:
    answer = await here.ask("GET", f"{PATH}/{plant}", here.key)
    assert answer.status == 200, answer.body
    return answer.body


async def step(here: People, plant: str, name: str) -> int:
    answer = await here.ask("POST", f"{PATH}/{plant}/{name}", here.key)
    if answer.status != 200:
        assert error(answer) == (400, "BAD_REQUEST")
    return answer.status


async def worker_does(here: People, sql: str, *values: Any) -> Any:
    connection = await connect(here.database.settings, role="sluice_worker", application="test")
    try:
        return await connection.fetchval(sql, *values)
    finally:
        await connection.close()


# ---------------------------------------------------------------- the document


def test_every_request_and_response_of_the_document_in_order(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            key = here.key
            existing, _ = await active(here, serial="first")
            await here.ask("PATCH", f"{PATH}/{existing}", key, {"templateId": SYSTEM_CABINET})
            listed = await here.ask("GET", PATH, key)
            assert listed.status == 200
            same_fields(listed.body, examples.PLANTS)
            assert listed.body["meta"] == {"limit": 20, "page": 1, "total": 1, "totalPages": 1}

            created = await here.ask("POST", PATH, key, examples.PLANT_TO_CREATE)
            assert created.status == 201
            same_fields(created.body, examples.PLANT)
            plant = created.body["id"]
            assert created.headers["Location"] == f"{PATH}/{plant}"
            told = {name: created.body[name] for name in ("authMethod", "lifecycleStatus", "status", "metadata")}
            assert told == {"authMethod": "MTLS", "lifecycleStatus": "PENDING", "status": "OFFLINE", "metadata": {}}
            assert created.body["organizationId"] == str(here.organisation)

            stats = await here.ask("GET", f"{PATH}/certificate-stats", key)
            assert (stats.status, set(stats.body)) == (200, set(examples.CERTIFICATE_STATS))
            whole = await here.ask("GET", f"{PATH}/{plant}", key)
            assert (whole.status, set(whole.body)) == (200, set(examples.WHOLE_PLANT))
            updated = await here.ask("PATCH", f"{PATH}/{plant}", key, examples.PLANT_TO_UPDATE)
            assert updated.status == 200
            same_fields(updated.body, examples.PLANT)
            deleted = await here.ask("DELETE", f"{PATH}/{plant}", key)
            assert (deleted.status, set(deleted.body)) == (200, set(examples.SAID))
            energy = await here.ask("GET", f"{PATH}/{existing}/energy/today", key)
            assert (energy.status, set(energy.body)) == (200, set(examples.ENERGY))

            token = await made(here, method="TOKEN")
            await step(here, token, "provision")
            answer = await here.ask("POST", f"{PATH}/{token}/mqtt-token", key)
            assert (answer.status, set(answer.body)) == (200, set(examples.MQTT_TOKEN))
            pending = await made(here)
            for method, path in (("POST", "provision"), ("GET", "provision/download")):
                answer = await here.ask(method, f"{PATH}/{pending}/{path}", key)
                assert answer.status == 200
                same_fields(answer.body, examples.PACKAGE)
                assert answer.body["plantId"] == pending
            assert answer.headers["Content-Disposition"] == f'attachment; filename="plant-{pending}.json"'
            for name in ("suspend", "reactivate"):
                answer = await here.ask("POST", f"{PATH}/{pending}/{name}", key)
                assert (answer.status, set(answer.body)) == (200, set(examples.SAID))
            answer = await here.ask("POST", f"{PATH}/{pending}/rotate-secret", key)
            assert (answer.status, set(answer.body)) == (200, set(examples.ROTATED_SECRET))
            assert answer.body["gracePeriodMinutes"] == 60
            answer = await here.ask("POST", f"{PATH}/{pending}/commands", key, examples.COMMAND_TO_SEND)
            assert answer.status == 201
            same_fields(answer.body, examples.COMMAND)
            answer = await here.ask("GET", f"{PATH}/{pending}/commands", key)
            assert answer.status == 200
            same_fields(answer.body, examples.COMMANDS)
            answer = await here.ask("POST", f"{PATH}/{pending}/revoke", key)
            assert (answer.status, set(answer.body)) == (200, set(examples.SAID))

    run(test(), 120)


#: By operation: method, path, a body, and what a malformed id, or what else is wrong with a request, is.
OPERATIONS: list[tuple[str, str, Any, str]] = [
    ("GET", "", None, "VALIDATION_ERROR"),
    ("POST", "", examples.PLANT_TO_CREATE, "VALIDATION_ERROR"),
    ("GET", "/certificate-stats", None, ""),
    ("GET", "/{id}", None, "INVALID_UUID"),
    ("PATCH", "/{id}", {}, "BAD_REQUEST"),
    ("DELETE", "/{id}", None, "INVALID_UUID"),
    ("GET", "/{id}/energy/today", None, "INVALID_UUID"),
    ("POST", "/{id}/mqtt-token", None, "BAD_REQUEST"),
    ("POST", "/{id}/provision", None, "BAD_REQUEST"),
    ("GET", "/{id}/provision/download", None, "BAD_REQUEST"),
    ("POST", "/{id}/reactivate", None, "BAD_REQUEST"),
    ("POST", "/{id}/revoke", None, "BAD_REQUEST"),
    ("POST", "/{id}/rotate-secret", None, "BAD_REQUEST"),
    ("POST", "/{id}/suspend", None, "BAD_REQUEST"),
    ("GET", "/{id}/commands", None, "INVALID_UUID"),
    ("POST", "/{id}/commands", examples.COMMAND_TO_SEND, "BAD_REQUEST"),
]


def test_errors_have_the_documents_codes_operation_by_operation(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant = await made(here)
            _, foreign = await here.tenant()
            scoped = await here.api_key("readings:read")
            viewer = await here.token_as("viewer")
            for method, path, body, malformed in OPERATIONS:
                url = f"{PATH}{path.replace('{id}', plant)}"
                assert error(await here.ask(method, url, None, body)) == (401, "UNAUTHORIZED"), path
                assert error(await here.ask(method, url, "sk_live_no", body)) == (401, "UNAUTHORIZED"), path
                assert error(await here.ask(method, url, scoped, body)) == (403, "FORBIDDEN"), path
                if method != "GET" or "download" in path:
                    assert error(await here.ask(method, url, viewer, body)) == (403, "FORBIDDEN"), path
                if "{id}" in path:
                    for bad in ("string", "123", "%00", "dev_" + "0" * 32):
                        url = f"{PATH}{path.replace('{id}', bad)}"
                        refused = await here.ask(method, url, here.key, body)
                        assert error(refused) == (400, malformed), (path, bad)
                        assert refused.body["message"] == "Invalid plant UUID", (path, bad)
                    for key, whose in ((foreign, plant), (here.key, str(NOBODY_S))):
                        url = f"{PATH}{path.replace('{id}', whose)}"
                        assert error(await here.ask(method, url, key, body)) == (404, "PLANT_NOT_FOUND"), path
                if body:
                    url = f"{PATH}{path.replace('{id}', plant)}"
                    wrongs: list[Any] = [{}, [], {**body, "no": 1}]
                    for wrong in wrongs:
                        assert error(await here.ask(method, url, here.key, wrong)) == (400, malformed), (path, wrong)

    run(test(), 120)


CREATES: list[dict[str, Any]] = [
    {"name": ""},
    {"name": "x" * 101},
    {"serialNumber": ""},
    {"serialNumber": "x" * 51},
    {"type": "TOASTER"},
    {"authMethod": "NONE"},
    {"metadata": []},
    {"metadata": {"big": "x" * 10_000}},
    {"metadata": {"nul": "a\0b"}},
    {"name": None},
    {"lifecycleStatus": "ACTIVE"},
]


def test_what_is_no_plant_is_refused_and_named(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            for wrong in CREATES:
                answer = await here.ask("POST", PATH, here.key, examples.PLANT_TO_CREATE | wrong)
                assert error(answer) == (400, "VALIDATION_ERROR"), wrong
                (field,) = wrong
                assert field in {name.partition(".")[0] for name in answer.body["details"]}, answer.body
            for query in ({"page": 0}, {"limit": 0}, {"limit": 101}, {"authMethod": "NONE"}, {"cursor": "x"}):
                assert error(await here.ask("GET", PATH, here.key, **query)) == (400, "VALIDATION_ERROR"), query
            plant = await made(here)
            for changed in (*CREATES[:10], {"templateId": "x"}, {"externalPlantId": "x" * 121}, {"latitude": 91}):
                answer = await here.ask("PATCH", f"{PATH}/{plant}", here.key, changed)
                assert error(answer) == (400, "BAD_REQUEST"), changed
            for command in ({"command": "x" * 256}, {"command": "x", "target": "lower"}, {"command": ""},
                            {"command": "x", "payload": {"x": "y" * 8_000}}):  # fmt: skip
                answer = await here.ask("POST", f"{PATH}/{plant}/commands", here.key, command)
                assert error(answer) == (400, "BAD_REQUEST"), command
            assert (await here.ask("GET", PATH, here.key)).body["meta"]["total"] == 1

    run(test(), 60)


def test_every_code_of_the_face_is_in_capital_letters(database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            seen = 0
            for operation in here.operations:
                if operation.face.name == "plants":
                    for kind in kinds_of(operation):
                        code = operation.face.kind(operation.own(kind)).code
                        assert code == code.upper(), (operation.name, code)
                        seen += 1
            assert seen > 16 * 5
            assert error(await here.ask("GET", f"{PATH}/{NOBODY_S}/nothing", here.key)) == (404, "NOT_FOUND")
            assert error(await here.ask("PUT", PATH, here.key)) == (405, "METHOD_NOT_ALLOWED")

    run(test())


# ---------------------------------------------------------------- the registry


def test_pages_and_the_filter(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            methods = ["MTLS", "TOKEN", "MTLS", "PASSWORD", "MTLS"]
            made_ = [await made(here, method=method) for method in methods]

            async def page(**query: Any) -> tuple[list[str], Any]:
                answer = await here.ask("GET", PATH, here.key, **query)
                assert answer.status == 200, answer.body
                return [plant["id"] for plant in answer.body["data"]], answer.body["meta"]

            assert (await page())[0] == made_
            found, meta = await page(page=2, limit=2)
            assert (found, meta) == (made_[2:4], {"limit": 2, "page": 2, "total": 5, "totalPages": 3})
            found, meta = await page(authMethod="MTLS", limit=2, page=2)
            assert (found, meta["total"], meta["totalPages"]) == (made_[4:], 3, 2)
            assert await page(page=10**9) == ([], {"limit": 20, "page": 10**9, "total": 5, "totalPages": 1})

    run(test())


def test_a_serial_number_is_one_living_plants_of_an_organisation(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            body = examples.PLANT_TO_CREATE | {"serialNumber": "SN 1"}
            answers = await asyncio.gather(*(here.ask("POST", PATH, here.key, body) for _ in range(4)))
            assert sorted(answer.status for answer in answers) == [201, 409, 409, 409]
            assert {error(answer) for answer in answers if answer.status == 409} == {(409, "PLANT_ALREADY_EXISTS")}
            (first,) = [answer.body["id"] for answer in answers if answer.status == 201]
            _, other = await here.tenant()
            assert (await here.ask("POST", PATH, other, body)).status == 201
            second = await made(here, "SN 2")
            taken = await here.ask("PATCH", f"{PATH}/{second}", here.key, {"serialNumber": "SN 1"})
            assert (error(taken), set(taken.body["details"])) == ((400, "BAD_REQUEST"), {"serialNumber"})
            assert (await here.ask("DELETE", f"{PATH}/{first}", here.key)).status == 200
            assert error(await here.ask("GET", f"{PATH}/{first}", here.key)) == (404, "PLANT_NOT_FOUND")
            changed = await here.ask("PATCH", f"{PATH}/{second}", here.key, {"serialNumber": "SN 1"})
            assert (changed.status, changed.body["serialNumber"]) == (200, "SN 1")
            # A plant is a device: whoever deletes that one deletes the plant.
            device = await here.ask("GET", f"/v1/devices/{second}", here.key)
            assert (device.status, device.body["ingest_url_kind"]) == (200, "mqtt")
            assert (await here.ask("DELETE", f"/v1/devices/{second}", here.key)).status == 204
            assert error(await here.ask("GET", f"{PATH}/{second}", here.key)) == (404, "PLANT_NOT_FOUND")
            assert (await here.ask("POST", PATH, here.key, body)).status == 201

    run(test())


def test_what_is_changed_and_what_stays(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant = await made(here, metadata={"a": 1})
            url = f"{PATH}/{plant}"
            before = await here.ask("GET", url, here.key)
            more = {
                "description": "On the roof", "tag": "roof", "latitude": 50.1, "longitude": 14.4, "capacityKwh": 10.5,
                "fvePeakPowerKwp": 9.9, "plantWithLoad": True, "configEnabled": False,
            }  # fmt: skip
            change = {
                "name": "Other", "type": "GATEWAY", "authMethod": "TOKEN", "metadata": {"b": [1.5, None, {"c": "ž"}]},
                "externalPlantId": "VELVARY-MAIN", "templateId": SYSTEM_CABINET, "serialNumber": "SN",
            }  # fmt: skip
            headers = {"If-Match": before.headers["ETag"]}
            answer = await here.ask("PATCH", url, here.key, change | more, headers=headers)
            assert answer.status == 200, answer.body
            assert error(await here.ask("PATCH", url, here.key, {}, headers=headers)) == (412, "PRECONDITION_FAILED")
            found = await get(here, plant)
            assert {name: found[name] for name in change | more} == change | more
            assert found["template"]["isSystem"] is True
            assert found["template"]["signals"][0] == {"name": "grid_present", "bit": 0}
            assert found["updatedAt"] > found["createdAt"]
            unlinked = await here.ask(
                "PATCH", url, here.key, {"externalPlantId": None, "templateId": None, "tag": None}
            )
            assert (unlinked.body["templateId"], unlinked.body["template"]) == (None, None)
            found = await get(here, plant)
            assert (found["externalPlantId"], found["tag"], found["name"]) == (None, None, "Other")

            for template, expected in (
                (SYSTEM_METER, (400, "BAD_REQUEST")),
                (str(uuid4()), (404, "PLANT_NOT_FOUND")),
            ):
                assert error(await here.ask("PATCH", url, here.key, {"templateId": template})) == expected
            await step(here, plant, "provision")
            assert error(await here.ask("PATCH", url, here.key, {"authMethod": "MTLS"})) == (400, "BAD_REQUEST")
            assert (await here.ask("PATCH", url, here.key, {"authMethod": "TOKEN", "name": "Third"})).status == 200
            entries = [action for action, _ in await here.audited(here.organisation) if action.startswith("plant.")]
            assert entries == [
                "plant.created",
                "plant.changed",
                "plant.changed",
                "plant.provisioned",
                "plant.changed",
            ]

    run(test())


def test_own_templates(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            _, other = await here.tenant()
            path = "/api/v1/device-templates"
            signals = [{"name": "door_open", "bit": 3}, {"name": "power", "field": "p", "unit": "kW", "scale": 0.1}]
            body = {"name": "Ours", "level": "PLANT", "type": "CABINET", "signals": signals}
            answer = await here.ask("POST", path, here.key, body)
            assert answer.status == 201, answer.body
            template = answer.body["id"]
            assert (answer.body["signals"], answer.body["isSystem"], answer.body["actions"]) == (signals, False, [])
            assert (await here.ask("POST", path, here.key, body)).code == (409, "device_template_name_taken")
            for wrong in ({"name": "x", "bit": 32}, {"name": "x"}, {"name": "x", "bit": 1, "field": "y"}, {"bit": 1}):
                answer = await here.ask("POST", path, here.key, body | {"name": "New", "signals": [wrong]})
                assert answer.code == (422, "invalid"), wrong
            assert (await here.ask("GET", f"{path}/{template}", here.key)).body["name"] == "Ours"
            assert (await here.ask("GET", f"{path}/{template}", other)).code == (404, "device_template_not_found")
            assert (await here.ask("GET", f"{path}/{SYSTEM_METER}", other)).body["level"] == "DEVICE"
            listed = await here.ask("GET", path, here.key, level="PLANT", limit=1)
            (first,) = listed.body["data"]
            assert first["id"] == SYSTEM_CABINET
            rest = await here.ask("GET", path, here.key, level="PLANT", cursor=listed.body["next_cursor"])
            assert [one["id"] for one in rest.body["data"]] == [template]
            plant = await made(here)
            answer = await here.ask("PATCH", f"{PATH}/{plant}", here.key, {"templateId": template})
            assert (answer.body["templateId"], answer.body["template"]["name"]) == (template, "Ours")
            theirs = await here.ask("POST", PATH, other, examples.PLANT_TO_CREATE)
            answer = await here.ask("PATCH", f"{PATH}/{theirs.body['id']}", other, {"templateId": template})
            assert error(answer) == (404, "PLANT_NOT_FOUND")

    run(test())


def test_alerts_and_groups_of_a_plant(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant = await made(here)
            group = await here.ask("POST", "/api/v1/device-groups", here.key, {"name": "Roof", "description": "All"})
            assert group.body["description"] == "All"
            await here.ask("PUT", f"/api/v1/device-groups/{group.body['group_id']}/devices/{plant}", here.key)
            connection = await connect(here.database.settings, role="sluice_worker", application="test")
            opened = [
                await open_alert(connection, UUID(plant), "THRESHOLD_EXCEEDED", "WARNING", text) for text in "aab"
            ]
            assert opened[0] == opened[1] != opened[2]
            await connection.execute("UPDATE plant_alerts SET status = 'RESOLVED' WHERE alert_id = $1", opened[0])
            again = await open_alert(connection, UUID(plant), "THRESHOLD_EXCEEDED", "CRITICAL", "a")
            assert again not in opened
            assert await open_alert(connection, uuid7(), "X", "INFO", "nobody's") is None
            await connection.close()
            found = await get(here, plant)
            same_fields(found["alerts"], examples.WHOLE_PLANT["alerts"])
            same_fields(found["plantGroups"], examples.WHOLE_PLANT["plantGroups"])
            assert [(alert["id"], alert["status"]) for alert in found["alerts"]] == [
                (str(again), "ACTIVE"), (str(opened[2]), "ACTIVE"), (str(opened[0]), "RESOLVED"),
            ]  # fmt: skip
            assert (found["plantGroups"][0]["name"], found["plantGroups"][0]["description"]) == ("Roof", "All")

    run(test())


def test_online_and_the_numbers_that_others_count(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant = await made(here)
            await here.superuser(
                "UPDATE devices SET online = true, last_seen_at = now(), online_until = now() + interval '1 minute'"
                " WHERE device_id = $1", UUID(plant),
            )  # fmt: skip
            await worker_does(
                here, "UPDATE plants SET auth_failures = 3, last_auth_failure_at = now() WHERE device_id = $1",
                UUID(plant),
            )  # fmt: skip
            found = await get(here, plant)
            assert (found["status"], found["authFailureCount"]) == ("ONLINE", 3)
            assert None not in (found["lastSeenAt"], found["lastAuthFailureAt"])

    run(test())


# ---------------------------------------------------------------- lifecycle

#: Which steps each state allows, and what it is after them.
STEPS: Mapping[str, Mapping[str, str]] = {
    "PENDING": {"provision": "ACTIVE", "revoke": "DECOMMISSIONED"},
    "ACTIVE": {"suspend": "SUSPENDED", "revoke": "DECOMMISSIONED", "rotate-secret": "ACTIVE", "mqtt-token": "ACTIVE"},
    "SUSPENDED": {"reactivate": "ACTIVE", "revoke": "DECOMMISSIONED"},
    "DECOMMISSIONED": {},
}
ALL_STEPS = ("provision", "suspend", "reactivate", "revoke", "rotate-secret", "mqtt-token")
WAYS = {
    "PENDING": (), "ACTIVE": ("provision",), "SUSPENDED": ("provision", "suspend"),
    "DECOMMISSIONED": ("provision", "revoke"),
}  # fmt: skip


def test_every_step_from_every_state(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            for state, allowed in STEPS.items():
                for name in ALL_STEPS:
                    plant = await made(here, method="TOKEN")
                    for way in WAYS[state]:
                        assert await step(here, plant, way) == 200
                    assert (await get(here, plant))["lifecycleStatus"] == state
                    assert await step(here, plant, name) == (200 if name in allowed else 400), (state, name)
                    assert (await get(here, plant))["lifecycleStatus"] == allowed.get(name, state), (state, name)
                    command = await here.ask("POST", f"{PATH}/{plant}/commands", here.key, {"command": "x"})
                    expected = 201 if allowed.get(name, state) == "ACTIVE" else 400
                    assert command.status == expected, (state, name)

    run(test(), 120)


def test_steps_at_once_are_judged_one_after_the_other(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant = await made(here)
            for name in ("provision", "suspend", "reactivate", "revoke"):
                found = await asyncio.gather(*(step(here, plant, name) for _ in range(5)))
                assert sorted(found) == [200, 400, 400, 400, 400], name
            assert len(await here.superuser("SELECT FROM plants WHERE lifecycle = 'DECOMMISSIONED'")) == 1

    run(test(), 60)


def test_a_suspended_plants_device_is_suspended_and_a_revoked_one_has_nothing_left(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant, _ = await active(here, "PASSWORD")
            await here.ask("POST", f"/v1/devices/{plant}/rotate-token", here.key)
            await here.ask("POST", f"{PATH}/{plant}/commands", here.key, {"command": "x"})
            await step(here, plant, "rotate-secret")

            async def row() -> Any:
                sql = """SELECT d.status, p.secret, p.former_secret, p.broker_password,
                         (SELECT count(*) FROM credentials c WHERE c.device_id = d.device_id AND revoked_at IS NULL),
                         (SELECT count(*) FROM plant_packages k WHERE k.device_id = d.device_id),
                         (SELECT state FROM commands c WHERE c.device_id = d.device_id)
                         FROM devices d JOIN plants p USING (device_id) WHERE d.device_id = $1"""
                return tuple((await here.superuser(sql, UUID(plant)))[0])

            status, secret, former, password, *left = await row()
            assert (status, *left) == ("active", 1, 1, "PENDING")
            assert None not in (secret, former, password)
            await step(here, plant, "suspend")
            assert (await row())[0] == "suspended"
            assert error(await here.ask("GET", f"{PATH}/{plant}/provision/download", here.key))[0] == 400
            await step(here, plant, "reactivate")
            assert (await row())[0] == "active"
            await step(here, plant, "revoke")
            assert await row() == ("suspended", None, None, None, 0, 0, "FAILED")

    run(test())


def test_a_plant_that_is_cut_off_is_offline_with_that_step(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            worker = Presence(here.database.settings, PresenceSettings(presence_steady_s=0))

            async def heard(plant: str) -> str:
                now_us = int(datetime.now(UTC).timestamp() * 1e6) - PG_EPOCH_US
                worker.hear({UUID(plant).bytes: now_us})
                await worker.keep()
                status: str = (await get(here, plant))["status"]
                return status

            async def standing(plant: str) -> tuple[bool, bool]:
                sql = "SELECT online, online_changed_at = updated_at FROM devices WHERE device_id = $1"
                return tuple((await here.superuser(sql, UUID(plant)))[0])

            plant, _ = await active(here)
            assert await heard(plant) == "ONLINE"
            assert await step(here, plant, "suspend") == 200
            assert await standing(plant) == (False, True)
            assert await heard(plant) == "OFFLINE"
            assert await step(here, plant, "reactivate") == 200
            assert await heard(plant) == "ONLINE"
            assert await step(here, plant, "revoke") == 200
            assert await standing(plant) == (False, True)
            assert await heard(plant) == "OFFLINE"

            plant, _ = await active(here)
            assert await heard(plant) == "ONLINE"
            assert (await here.ask("DELETE", f"{PATH}/{plant}", here.key)).status in (200, 204)
            assert await standing(plant) == (False, True)

    run(test())


# ---------------------------------------------------------------- what is secret


def test_a_package_by_each_method_and_what_is_kept_of_it(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            for method, more in (
                ("MTLS", {"clientCert", "clientKey"}), ("TOKEN", {"username"}),
                ("PASSWORD", {"username", "password"}),
            ):  # fmt: skip
                plant, package = await active(here, method)
                security = package["security"]
                assert set(security) == more | {"hmacSecret", "caCert"}
                authorities = await here.superuser("SELECT certificate FROM certificate_authorities")
                assert authorities
                assert all(row[0] in security["caCert"] for row in authorities)
                assert package["mqtt"] == {
                    "broker": "sluice.example", "port": 8883,
                    "topics": {
                        "ack": f"cpi/{plant}/ack", "commands": f"cpi/{plant}/command",
                        "status": f"cpi/{plant}/status", "telemetry": f"cpi/{plant}/telemetry",
                    },
                }  # fmt: skip
                assert package["protocol"]["signature"]["required"] is (method != "MTLS")
                kept = ""
                for table in ("plants", "plant_packages", "audit_log", "repeats"):
                    kept += str(await here.superuser(f"SELECT to_jsonb(t)::text FROM {table} t"))
                for name in ("hmacSecret", "clientKey", "password"):
                    assert security.get(name, "nothing") not in kept, name
                ((sealed,),) = await here.superuser("SELECT secret FROM plants WHERE device_id = $1", UUID(plant))
                assert Seal(RING, SECRET_SEAL).open(sealed).hex() == security["hmacSecret"]
                assert len(security["hmacSecret"]) == 64
                download = await here.ask("GET", f"{PATH}/{plant}/provision/download", here.key)
                assert download.body == package
                found = await get(here, plant)
                assert (found["certificateFingerprint"] is None) is (method != "MTLS")
                if method == "MTLS":
                    certificate = x509.load_pem_x509_certificate(security["clientCert"].encode())
                    (subject,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
                    assert subject.value == plant
                    assert int(found["certificateSerialNumber"], 16) == certificate.serial_number

    run(test())


def test_where_the_broker_is_comes_from_the_settings(database: Database) -> None:
    async def test() -> None:
        settings = {"mqtt_public_url": "mqtts://broker.example:8000", "mqtt_token_port": 8001}
        async with people_with_authority(database, api=settings) as here:
            found = {method: (await active(here, method))[1]["mqtt"] for method in ("MTLS", "TOKEN", "PASSWORD")}
            assert {mqtt["broker"] for mqtt in found.values()} == {"broker.example"}
            ports = {method: mqtt["port"] for method, mqtt in found.items()}
            assert ports == {"MTLS": 8000, "TOKEN": 8001, "PASSWORD": 8000}

    run(test())


def test_the_secret_is_rotated_and_the_package_with_it(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant, package = await active(here, "TOKEN")
            answer = await here.ask("POST", f"{PATH}/{plant}/rotate-secret", here.key)
            new = answer.body["hmacSecret"]
            assert new != package["security"]["hmacSecret"]
            ((secret, former, grace),) = await here.superuser(
                "SELECT secret, former_secret, former_secret_until - now() FROM plants WHERE device_id = $1",
                UUID(plant),
            )
            seal = Seal(RING, SECRET_SEAL)
            assert (seal.open(secret).hex(), seal.open(former).hex()) == (new, package["security"]["hmacSecret"])
            assert timedelta(minutes=59) < grace <= timedelta(minutes=60)
            download = await here.ask("GET", f"{PATH}/{plant}/provision/download", here.key)
            assert download.body["security"]["hmacSecret"] == new
            assert (await get(here, plant))["secretRotatedAt"] is not None

    run(test())


def test_upkeep_drops_packages_after_a_day_and_old_secrets_after_an_hour(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            old, _ = await active(here)
            new, _ = await active(here)
            for plant in (old, new):
                await step(here, plant, "rotate-secret")
            await here.superuser("UPDATE plant_packages SET expires_at = now() WHERE device_id = $1", UUID(old))
            answer = await here.ask("GET", f"{PATH}/{old}/provision/download", here.key)
            assert error(answer) == (400, "BAD_REQUEST")
            await here.superuser("UPDATE plants SET former_secret_until = now() WHERE device_id = $1", UUID(old))
            await Presence(here.database.settings, PresenceSettings()).keep()
            left = await here.superuser("SELECT device_id FROM plant_packages")
            assert [str(row[0]) for row in left] == [new]
            rows = await here.superuser("SELECT device_id FROM plants WHERE former_secret IS NOT NULL")
            assert [str(row[0]) for row in rows] == [new]

    run(test())


def test_a_package_sealed_under_a_key_that_is_gone_is_gone(database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            plant, _ = await active(here)
            # The ring of the other has none of the keys; its API key is good, as hashes are of the former.
            other: KeyRing = new_ring()
            await here.superuser(
                "UPDATE plant_packages SET sealed = $1", Seal(other, "plant package").seal(json.dumps({}).encode())
            )
            answer = await here.ask("GET", f"{PATH}/{plant}/provision/download", here.key)
            assert error(answer) == (400, "BAD_REQUEST")

    run(test())


def test_a_plants_token_is_signed_for_the_broker_and_one_lives_at_a_time(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant, _ = await active(here, "TOKEN")
            found = []
            for _ in range(2):
                answer = await here.ask("POST", f"{PATH}/{plant}/mqtt-token", here.key)
                assert answer.status == 200
                token = answer.body["token"]
                keys = (await here.ask("GET", "/.well-known/jwks.json")).body
                header = jwt.get_unverified_header(token)
                (key,) = [one for one in keys["keys"] if one["kid"] == header["kid"]]
                claims = jwt.decode(
                    token, jwt.PyJWK(key).key, algorithms=["RS256"], audience=TOKEN_AUDIENCE,
                )  # fmt: skip
                assert (claims["sub"], header["typ"]) == (plant, "mqtt+jwt")
                assert datetime.fromtimestamp(claims["exp"], UTC) == datetime.fromisoformat(answer.body["expiresAt"])
                assert 3_500 < claims["exp"] - claims["iat"] <= 3_601
                ((token_id, until),) = await here.superuser(
                    "SELECT token_id, broker_password_until FROM plants WHERE device_id = $1", UUID(plant)
                )
                assert (str(token_id), until) == (claims["jti"], datetime.fromisoformat(answer.body["expiresAt"]))
                found.append(claims["jti"])
            assert found[0] != found[1]
            for method in ("MTLS", "PASSWORD"):
                other, _ = await active(here, method)
                assert await step(here, other, "mqtt-token") == 400

    run(test())


# ---------------------------------------------------------------- commands


def test_commands_go_their_way_and_no_other(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant, _ = await active(here)
            url = f"{PATH}/{plant}/commands"
            body = {"command": "set", "payload": {"on": True}, "target": "METER_1"}
            ids = [(await here.ask("POST", url, here.key, body)).body["id"] for _ in range(3)]
            listed = await here.ask("GET", url, here.key, limit=2)
            assert [one["id"] for one in listed.body["data"]] == ids[:0:-1]
            assert listed.body["meta"] == {"limit": 2, "page": 1, "total": 3, "totalPages": 2}
            assert listed.body["data"][0]["payload"] == {"on": True}

            device, (first, second, third) = UUID(plant), map(UUID, ids)
            stranger = uuid7()
            for sql, values, expected in (
                ("command_sent($1)", (first,), True),
                ("command_sent($1)", (first,), True),
                ("command_acknowledged($1, $2)", (stranger, first), False),
                ("command_acknowledged($1, $2)", (device, first), True),
                ("command_acknowledged($1, $2)", (device, first), False),
                ("command_sent($1)", (first,), False),
                ("command_finished($1, $2, 'SUCCESS', '{\"ok\": 1}')", (stranger, first), False),
                ("command_finished($1, $2, 'DONE', '{}')", (device, first), False),
                ("command_finished($1, $2, 'SUCCESS', '{\"ok\": 1}')", (device, first), True),
                ("command_finished($1, $2, 'FAILED', '{}')", (device, first), False),
                ("command_finished($1, $2, 'FAILED', NULL)", (device, second), True),
                ("commands_timed_out(10)", (), 0),
            ):  # fmt: skip
                assert await worker_does(here, f"SELECT {sql}", *values) == expected, sql
            await here.superuser("UPDATE commands SET expires_at = now() WHERE command_id = $1", third)
            assert await worker_does(here, "SELECT commands_timed_out(10)") == 1
            assert await worker_does(here, "SELECT command_acknowledged($1, $2)", device, third) is False
            found = (await here.ask("GET", url, here.key)).body["data"][::-1]
            assert [one["responseStatus"] for one in found] == ["SUCCESS", "FAILED", "TIMEOUT"]
            assert [one["response"] for one in found] == [{"ok": 1}, None, None]
            assert [one["ackedAt"] is None for one in found] == [False, False, True]

    run(test())


def test_only_so_many_commands_wait_and_each_is_told(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database, api={"commands_open_max": 2}) as here:
            plant, _ = await active(here)
            heard: list[str] = []
            connection = await connect(here.database.settings, role="sluice_worker", application="test")
            await connection.add_listener("sluice_commands", lambda *told: heard.append(told[3]))
            url = f"{PATH}/{plant}/commands"
            answers = await asyncio.gather(*(here.ask("POST", url, here.key, {"command": "x"}) for _ in range(4)))
            assert sorted(answer.status for answer in answers) == [201, 201, 429, 429]
            assert {error(answer) for answer in answers if answer.status == 429} == {(429, "RATE_LIMITED")}
            await connection.execute("SELECT 1")
            assert set(heard) == {answer.body["cmdId"] for answer in answers if answer.status == 201}
            await connection.close()

    run(test())


# ---------------------------------------------------------------- energy and certificates


async def _series(here: People, plant: str, metric: str, label: str = "") -> int:
    found: int = await worker_does(
        here,
        "INSERT INTO series (organisation_id, device_id, metric, label, unit) VALUES ($1, $2, $3, $4, 'Wh')"
        " RETURNING series_id", here.organisation, UUID(plant), metric, label,
    )  # fmt: skip
    return found


async def _store(here: People, series: int, *readings: tuple[datetime, float]) -> None:
    for ts, value in readings:
        await worker_does(here, "SELECT ensure_week($1)", ts)
        await worker_does(here, "INSERT INTO readings VALUES ($1, 0, $2, $3)", series, ts, value)


def test_energy_of_today_from_counters_with_resets(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant = await made(here)
            other = await made(here)
            day = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
            before, at = day - timedelta(hours=1), [day + timedelta(seconds=number) for number in range(4)]
            produced = await _series(here, plant, "energy_produced")
            # From yesterday's 100 to 400, to 1,000, then a reset to 500.
            await _store(here, produced, (before, 100.0), (at[0], 400.0), (at[1], 1_000.0), (at[2], 500.0))
            for label, rise in (("a", 100.0), ("b", 250.0)):
                exported = await _series(here, plant, "energy_exported", label)
                await _store(here, exported, (at[0], 5.0), (at[3], 5.0 + rise))
            await _store(here, await _series(here, plant, "energy"), (at[0], 0.0), (at[1], 9_999.0))
            await _store(here, await _series(here, other, "energy_imported"), (at[0], 0.0), (at[1], 9_999.0))
            found = (await here.ask("GET", f"{PATH}/{plant}/energy/today", here.key)).body
            assert found == {
                "date": day.date().isoformat(), "produced": 1.4, "imported": 0.0, "exported": 0.35,
                "selfConsumptionPct": 75.0,
            }  # fmt: skip
            found = (await here.ask("GET", f"{PATH}/{other}/energy/today", here.key)).body
            assert (found["imported"], found["produced"], found["selfConsumptionPct"]) == (9.999, 0.0, None)

    run(test())


def test_certificate_stats(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            url = f"{PATH}/certificate-stats"
            assert (await here.ask("GET", url, here.key)).body == {
                "active": 0, "atRiskPlants": [], "expired": 0, "expiringSoon": 0, "nextRenewalAt": None, "revoked": 0,
            }  # fmt: skip
            good, soon, over, revoked = [(await active(here))[0] for _ in range(4)]
            await active(here, "TOKEN")
            await step(here, revoked, "revoke")
            for plant, days in ((soon, 10), (over, -1)):
                await here.superuser(
                    "UPDATE plants SET certificate_expires_at = now() + $2 * interval '1 day' WHERE device_id = $1",
                    UUID(plant), days,
                )  # fmt: skip
            found = (await here.ask("GET", url, here.key)).body
            counts = {name: found[name] for name in ("active", "expired", "expiringSoon", "revoked")}
            assert counts == {"active": 1, "expired": 1, "expiringSoon": 1, "revoked": 1}
            assert [plant["id"] for plant in found["atRiskPlants"]] == [over, soon]
            same_fields(found["atRiskPlants"], examples.CERTIFICATE_STATS["atRiskPlants"])
            assert datetime.fromisoformat(found["nextRenewalAt"]) < datetime.now(UTC)
            assert good not in json.dumps(found)

    run(test())


def test_a_plant_tells_of_its_newest_certificate_whoever_issued_or_revoked_it(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            plant, _ = await active(here)
            first = (await get(here, plant))["certificateFingerprint"]
            await here.superuser("UPDATE plants SET certificate_expires_at = now() + interval '1 day'")

            async def by_request(device: str) -> Any:
                body = {"deviceId": device}
                answer = await here.ask("POST", "/api/v1/devices/registration/tokens", here.key, body)
                body = {"token": answer.body["token"], "csr": request_for()}
                answer = await here.ask("POST", "/api/v1/devices/provision", None, body)
                assert answer.status == 201, answer.body
                return answer.body

            async def is_told(device: str, issued: Any) -> bool:
                found, names = await get(here, device), ("Fingerprint", "SerialNumber", "ExpiresAt")
                return [found[f"certificate{name}"] for name in names] == [
                    issued[f"certificate{name}"] for name in names
                ]

            async def standing() -> dict[str, int]:
                found = (await here.ask("GET", f"{PATH}/certificate-stats", here.key)).body
                return {name: found[name] for name in ("active", "expiringSoon", "revoked") if found[name]}

            assert await standing() == {"expiringSoon": 1}
            renewed = await by_request(plant)
            assert renewed["certificateFingerprint"] != first
            assert await is_told(plant, renewed)
            assert await standing() == {"active": 1}  # the former one ends with the overlap, and counts no more
            assert await step(here, plant, "suspend") == await step(here, plant, "reactivate") == 200
            assert await standing() == {"active": 1}

            # As `sluice ca revoke` does.
            connection = await connect(here.database.settings, role=None, application="test")
            async with acting_for(connection, here.organisation):
                assert await issuing.revoke(connection, here.organisation, UUID(plant), "keyCompromise") == 1
            await connection.close()
            assert await standing() == {"revoked": 1}
            assert await is_told(plant, await by_request(plant))
            assert await standing() == {"active": 1}

            # One that comes with a key of its own before it is provisioned keeps that certificate.
            other = await made(here, method="TOKEN")
            issued = await by_request(other)
            assert await step(here, other, "provision") == 200
            assert await is_told(other, issued)

    run(test())


@pytest.mark.parametrize("path", ["", "/{id}/commands", "/{id}/provision"])
def test_a_request_with_a_name_is_done_once(database: Database, path: str) -> None:
    async def test() -> None:
        async with people_with_authority(database) as here:
            plant = await made(here) if "provision" in path else (await active(here))[0]
            body = {"": examples.PLANT_TO_CREATE, "/{id}/commands": {"command": "x"}}.get(path)
            url, headers = f"{PATH}{path.replace('{id}', plant)}", {"Idempotency-Key": "one"}
            answers = [await here.ask("POST", url, here.key, body, headers=headers) for _ in range(2)]
            assert answers[0].status in (200, 201)
            assert answers[0].body == answers[1].body

    run(test())
