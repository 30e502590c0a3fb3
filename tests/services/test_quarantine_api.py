"""The quarantine over HTTP, on both databases: found, shown, mended, replayed, discarded, and by whom."""

from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from api.registry.organisations import acting_for
from runtime.postgres import connect
from runtime.secrets import API_KEY_PREFIX, DEVICE_PREFIX, make_token
from tests.databases import Database
from tests.quarantine_rig import BAD_UNIT, RECEIVED, Quarantine
from tests.services.test_api_readings import World, tenant, world
from tests.support import run

PATH = "/api/v1/admin/quarantine"
MENDED = {"type": "temperature", "value": 21.5, "unit": "°C", "ts": "2026-11-02T00:00:00Z"}


async def ask(
    here: World,
    method: str,
    path: str = "",
    *,
    key: str = "",
    body: Any = None,
    raw: bytes | None = None,
    **query: Any,
) -> tuple[int, Any]:
    sent = {name.rstrip("_"): str(value) for name, value in query.items()}
    headers = {"Authorization": f"Bearer {key or here.key}"}
    url = f"{here.url}{PATH}{path}"
    async with here.session.request(method, url, params=sent, headers=headers, json=body, data=raw) as answer:
        return answer.status, await answer.json()


async def code(here: World, method: str, path: str = "", **more: Any) -> tuple[int, str]:
    """Status and code of an error, which has the shape of all errors here."""
    status, found = await ask(here, method, path, **more)
    assert {"type", "title", "status", "detail", "code", "request_id"} <= set(found)
    return status, found["code"]


async def listed(here: World, **query: Any) -> list[UUID]:
    status, found = await ask(here, "GET", **query)
    assert status == 200, found
    return [UUID(row["quarantine_id"]) for row in found["data"]]


def test_a_row_tells_everything_about_what_was_refused(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            quarantine = Quarantine(any_database)
            row = await quarantine.hold(here.organisation, here.device)
            (found,) = (await ask(here, "GET"))[1]["data"]
            status, one = await ask(here, "GET", f"/{row}")
            assert status == 200
            assert one.pop("original_payload") is None
            assert one == found
            assert one.pop("quarantined_at")
            assert one.pop("payload_bytes") > 50
            assert one == {
                "quarantine_id": str(row),
                "device_id": str(here.device),
                "state": "held",
                "code": "unknown_unit",
                "message": "temperature takes °C",
                "request_id": "request-1",
                "received_at": RECEIVED.isoformat().replace("+00:00", "Z"),
                "changed_at": None,
                "replay_requested_at": None,
                "attempts": 1,
                "note": None,
                "edited": False,
                "payload": BAD_UNIT,
            }

    run(test())


def test_payloads_that_are_no_json_come_as_base64_and_large_ones_alone(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            quarantine = Quarantine(database)
            cut = await quarantine.hold(here.organisation, here.device, b'{"type":"temp')
            large = await quarantine.hold(here.organisation, here.device, {"type": "x" * 60_000})
            for row, more in ((cut, {"payload_base64": "eyJ0eXBlIjoidGVtcA=="}), (large, {})):
                found = (await ask(here, "GET", f"/{row}"))[1]
                assert {name: value for name, value in found.items() if "base64" in name} == more
            by_id = {row["quarantine_id"]: row for row in (await ask(here, "GET"))[1]["data"]}
            assert by_id[str(large)]["payload"] is None
            assert by_id[str(large)]["payload_bytes"] > 60_000
            assert (await ask(here, "GET", f"/{large}"))[1]["payload"] == {"type": "x" * 60_000}

    run(test())


def test_filters_and_pages(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            quarantine = Quarantine(any_database)
            rows = [
                await quarantine.hold(
                    here.organisation,
                    here.device if number % 2 else uuid4(),
                    code="conflict" if number < 3 else "too_old",
                    request_id=f"request-{number}",
                    received_at=RECEIVED + timedelta(seconds=number // 2),
                )
                for number in range(7)
            ]
            newest = sorted(rows, key=lambda row: (rows.index(row) // 2, row), reverse=True)
            assert await listed(here) == newest
            assert set(await listed(here, code="conflict")) == set(rows[:3])
            assert set(await listed(here, device_id=here.device)) == {rows[1], rows[3], rows[5]}
            assert await listed(here, request_id="request-4") == [rows[4]]
            second = RECEIVED + timedelta(seconds=1)
            window = {"from_": second.isoformat(), "to": (second + timedelta(microseconds=1)).isoformat()}
            assert set(await listed(here, **window)) == {rows[2], rows[3]}
            await ask(here, "POST", f"/{rows[0]}/discard", body={"note": "gone"})
            assert await listed(here, state="discarded") == [rows[0]]
            assert set(await listed(here, state="held")) == set(rows[1:])
            assert await listed(here) == newest
            for limit in (1, 2, 6, 7):
                paged: list[UUID] = []
                cursor: dict[str, Any] = {}
                while True:
                    status, page = await ask(here, "GET", limit=limit, **cursor)
                    assert status == 200
                    assert len(page["data"]) <= limit
                    paged += [UUID(row["quarantine_id"]) for row in page["data"]]
                    if page["next_cursor"] is None:
                        break
                    cursor = {"cursor": page["next_cursor"]}
                assert paged == newest
            given = (await ask(here, "GET", limit=1))[1]["next_cursor"]
            assert await code(here, "GET", cursor=given, state="held") == (400, "invalid_parameter")

    run(test())


BAD_QUERIES: list[dict[str, str]] = [
    {"cod": "conflict"},
    {"state": "gone"},
    {"device_id": "fridge"},
    {"from_": "yesterday"},
    {"from_": "2026-11-02T00:00:01Z", "to": "2026-11-02T00:00:00Z"},
    {"limit": "0"},
    {"limit": "501"},
    {"cursor": "AAAA"},
    {"cursor": "A" * 600},
    {"attempts_max": "0"},
    {"request_id": "a\0b"},
]


def test_bad_requests_are_told_what_is_wrong(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            row = await Quarantine(database).hold(here.organisation, here.device)
            for query in BAD_QUERIES:
                assert await code(here, "GET", **query) == (400, "invalid_parameter"), query
            assert await code(here, "POST", f"/{row}/replay", state="held") == (400, "invalid_parameter")
            assert await code(here, "PUT", f"/{row}") == (405, "method_not_allowed")
            for method, path in (("PATCH", "/summary"), ("GET", "/discard"), ("PATCH", "/replay")):
                assert await code(here, method, path) == (405, "method_not_allowed")
            assert await code(here, "GET", "/fridge") == (404, "quarantine_not_found")
            assert await code(here, "POST", "/discard", body={"note": "all"}) == (400, "invalid_parameter")
            for body in ({}, {"note": 1}, {"note": "a", "more": 1}):
                assert await code(here, "POST", f"/{row}/discard", body=body) == (422, "invalid"), body
            for note in ("", "  ", "x" * 1_001):
                found = await code(here, "POST", f"/{row}/discard", body={"note": note})
                assert found == (400, "invalid_note"), note
            assert await code(here, "POST", f"/{row}/discard", raw=b"x" * 100_000) == (413, "body_too_large")
            assert (await Quarantine(database).row(row))["state"] == "held"

    run(test())


BAD_PAYLOADS: list[Any] = [
    None,
    7,
    [],
    [MENDED],
    {},
    {"type": "temperature"},
    {"value": 1},
    {"type": 5, "value": 1},
    {"type": "", "value": 1},
    {"type": "temperature", "value": None},
    {"type": "temperature", "value": [1]},
    {"type": "temperature", "value": 1, "unit": 5},
    {"type": "temperature", "value": 1, "label": {}},
    {"type": "temperature", "value": 1, "ts": True},
    {"type": "temperature", "value": 1, "vlaue": 2},
    {"type": "temperature", "value": "x" * 8_000},
]


def test_an_edit_is_one_measurement_and_the_first_payload_stays(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            quarantine = Quarantine(any_database)
            row = await quarantine.hold(here.organisation, here.device)
            for payload in BAD_PAYLOADS:
                found = await code(here, "PATCH", f"/{row}", body={"payload": payload})
                assert found == (400, "invalid_payload"), payload
            for raw in (b"", b"{", b'{"payload": {"type": "a", "value": NaN}}'):
                assert await code(here, "PATCH", f"/{row}", raw=raw) == (400, "invalid_body"), raw
            raw = b'{"payload": {}, "state": "held"}'
            assert await code(here, "PATCH", f"/{row}", raw=raw) == (422, "invalid")
            assert await code(here, "PATCH", f"/{row}", raw=b'{"payload": "\xff"}') == (400, "invalid_payload")
            assert not (await ask(here, "GET", f"/{row}"))[1]["edited"]
            for payload in (MENDED | {"value": 1}, MENDED | {"quality": 4}, MENDED):
                status, found = await ask(here, "PATCH", f"/{row}", body={"payload": payload})
                assert (status, found["payload"], found["original_payload"]) == (200, payload, BAD_UNIT)
                assert (found["edited"], found["state"]) == (True, "held")
                assert found["changed_at"]

    run(test())


def test_what_a_device_sent_besides_may_stand_in_an_edit(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            sent = b'{"type":"temperature","value":1e400,"value":2,"metadata":{"rssi":-60},"extra":1}'
            row = await Quarantine(database).hold(here.organisation, here.device, sent)
            headers = {"Authorization": f"Bearer {here.key}"}
            async with here.session.get(f"{here.url}{PATH}/{row}", headers=headers) as answer:
                assert sent in await answer.read()
            more = {"metadata": {"rssi": 1}}
            assert await code(here, "PATCH", f"/{row}", body={"payload": MENDED | more | {"extar": 1}}) == (
                400,
                "invalid_payload",
            )
            for payload in (MENDED, MENDED | more | {"extra": None}):
                status, found = await ask(here, "PATCH", f"/{row}", body={"payload": payload})
                assert (status, found["payload"]) == (200, payload)
            assert await code(here, "PATCH", f"/{row}", body={"payload": MENDED | {"vlaue": 1}}) == (
                400,
                "invalid_payload",
            )
            assert (await ask(here, "GET", f"/{row}"))[1]["payload"] == MENDED | more | {"extra": None}

    run(test())


def test_no_secret_is_kept_of_what_is_sent(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            quarantine = Quarantine(database)
            secrets = [make_token(DEVICE_PREFIX), make_token(API_KEY_PREFIX), "eyJhbGciOi.eyJzdWIi.c2ln"]
            for secret in secrets:
                row = await quarantine.hold(here.organisation, here.device)
                _, found = await ask(here, "PATCH", f"/{row}", body={"payload": MENDED | {"value": secret}})
                assert found["payload"]["value"] == "***"
                await ask(here, "POST", f"/{row}/discard", body={"note": f"it held {secret}"})
                kept = await quarantine.row(row)
                assert (kept["note"], secret in repr(kept)) == ("it held ***", False)

    run(test())


def test_a_replay_is_asked_for_once(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            quarantine = Quarantine(any_database)
            heard: list[str] = []
            listener = await asyncpg.connect(any_database.url)
            await listener.add_listener("sluice_replay", lambda *told: heard.append(str(told[2])))
            row = await quarantine.hold(here.organisation, here.device)
            status, found = await ask(here, "POST", f"/{row}/replay")
            assert (status, found["state"]) == (202, "replaying")
            assert found["replay_requested_at"]
            first = await quarantine.row(row)
            status, found = await ask(here, "POST", f"/{row}/replay")
            assert (status, found["state"]) == (202, "replaying")
            assert await quarantine.row(row) == first
            assert first["replay_id"]
            await listener.execute("SELECT 1")
            assert heard == ["sluice_replay"]
            await listener.close()
            for method, path, body in (
                ("PATCH", "", {"payload": MENDED}),
                ("POST", "/discard", {"note": "no"}),
            ):
                assert await code(here, method, f"/{row}{path}", body=body) == (409, "not_held")
            await quarantine.superuser("UPDATE quarantine SET state = 'released', payload = ''")
            status, found = await ask(here, "POST", f"/{row}/replay")
            assert (status, found["state"], found["payload"]) == (200, "released", None)

    run(test())


def test_what_is_discarded_leaves_its_payload_and_is_in_the_books(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            quarantine = Quarantine(any_database)
            rows = [await quarantine.hold(here.organisation, here.device) for _ in range(3)]
            earlier = await quarantine.hold(here.organisation, here.device, received_at=RECEIVED - timedelta(hours=5))
            await ask(here, "PATCH", f"/{rows[0]}", body={"payload": MENDED})
            for _ in range(2):
                status, found = await ask(here, "POST", f"/{rows[0]}/discard", body={"note": " a test "})
                assert (status, found["state"], found["note"]) == (200, "discarded", "a test")
                assert found["payload"] is found["original_payload"] is None
            assert await quarantine.books(here.organisation) == (4, 1, 0)
            kept = await quarantine.row(rows[0])
            assert (kept["payload"], kept["original_payload"]) == (b"", None)
            await ask(here, "POST", f"/{earlier}/discard", body={"note": "another hour"})
            hours = await quarantine.superuser(
                "SELECT hour, quarantined, discarded FROM ledger WHERE organisation_id = $1 ORDER BY 1",
                here.organisation,
            )
            assert [(quarantined, discarded) for _, quarantined, discarded in hours] == [(1, 1), (3, 1)]
            for method, path, body in (("PATCH", "", {"payload": MENDED}), ("POST", "/replay", None)):
                assert await code(here, method, f"/{rows[0]}{path}", body=body) == (409, "not_held")

    run(test())


def test_a_filter_s_worth_is_replayed_or_discarded_in_bounded_steps(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database, api_quarantine_changes_max=3) as here:
            quarantine = Quarantine(any_database)
            rows = [
                await quarantine.hold(
                    here.organisation,
                    here.device,
                    code="conflict" if number < 5 else "too_old",
                    received_at=RECEIVED + timedelta(seconds=number),
                )
                for number in range(9)
            ]
            assert await ask(here, "POST", "/replay", code="conflict", limit=2) == (
                202,
                {"requested": 2, "more": True},
            )
            assert await quarantine.states(*rows[:3]) == ["replaying", "replaying", "held"]
            assert await ask(here, "POST", "/replay", code="conflict") == (202, {"requested": 3, "more": True})
            assert await ask(here, "POST", "/replay", code="conflict") == (202, {"requested": 0, "more": False})
            assert await quarantine.states(*rows) == ["replaying"] * 5 + ["held"] * 4
            assert await code(here, "POST", "/replay", limit=4) == (400, "invalid_parameter")
            note = {"note": "too old to matter"}
            found = await ask(here, "POST", "/discard", body=note, device_id=here.device)
            assert found == (200, {"discarded": 3, "more": True})
            found = await ask(here, "POST", "/discard", body=note, device_id=here.device)
            assert found == (200, {"discarded": 1, "more": False})
            assert await quarantine.states(*rows[5:]) == ["discarded"] * 4
            assert await quarantine.books(here.organisation) == (9, 4, 0)

    run(test())


def test_what_came_back_from_a_replay_does_not_stop_the_rest(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            quarantine = Quarantine(database)
            rows = [await quarantine.hold(here.organisation, here.device) for _ in range(3)]
            await ask(here, "POST", "/replay", limit=1)
            (back,) = await listed(here, state="replaying")
            await quarantine.superuser(
                "UPDATE quarantine SET state = 'held', attempts = 2, changed_at = now() WHERE quarantine_id = $1",
                back,
            )
            assert await ask(here, "POST", "/replay", limit=2) == (202, {"requested": 2, "more": True})
            assert set(await listed(here, state="replaying")) == {*rows} - {back}
            assert await ask(here, "POST", "/replay", attempts_max=1) == (202, {"requested": 0, "more": False})

    run(test())


def test_the_summary_counts_by_code_and_device(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            quarantine = Quarantine(any_database)
            other = uuid4()
            for device, code_, count in ((here.device, "conflict", 3), (other, "conflict", 2), (other, "too_old", 1)):
                for number in range(count):
                    await quarantine.hold(
                        here.organisation, device, code=code_, received_at=RECEIVED + timedelta(seconds=number)
                    )
            status, found = await ask(here, "GET", "/summary")
            assert (status, found["total"]) == (200, 6)
            shown = [(row["code"], row["device_id"], row["rows"]) for row in found["data"]]
            assert shown == [
                ("conflict", str(here.device), 3),
                ("conflict", str(other), 2),
                ("too_old", str(other), 1),
            ]
            assert found["data"][0]["oldest"] < found["data"][0]["newest"]
            assert (await ask(here, "GET", "/summary", code="too_old"))[1]["total"] == 1
            assert (await ask(here, "GET", "/summary", state="released"))[1] == {"total": 0, "data": []}

    run(test())


def test_nobody_sees_or_changes_what_is_another_s(any_database: Database) -> None:
    async def test() -> None:
        async with world(any_database) as here:
            quarantine = Quarantine(any_database)
            theirs, _, device, _ = await tenant(any_database)
            rows = [await quarantine.hold(theirs, device), await quarantine.hold(None, None, b"junk")]
            for row in rows:
                for method, path, body in (
                    ("GET", "", None),
                    ("PATCH", "", {"payload": MENDED}),
                    ("POST", "/replay", None),
                    ("POST", "/discard", {"note": "theirs"}),
                ):
                    found = await code(here, method, f"/{row}{path}", body=body)
                    assert found == (404, "quarantine_not_found")
            assert await listed(here) == []
            assert (await ask(here, "GET", "/summary"))[1]["total"] == 0
            assert (await ask(here, "POST", "/replay"))[1]["requested"] == 0
            note = {"note": "theirs"}
            assert (await ask(here, "POST", "/discard", body=note, code="unknown_unit"))[1]["discarded"] == 0
            assert await quarantine.states(*rows) == ["held", "held"]

    run(test())


def test_changes_need_an_owner_s_key(database: Database) -> None:
    async def test() -> None:
        async with world(database) as here:
            quarantine = Quarantine(database)
            row = await quarantine.hold(here.organisation, here.device)
            for scopes, status in ((["readings:read"], 200), (["devices:read"], 403)):
                organisation, _, device, key = await tenant(database, scopes=scopes)
                own = await quarantine.hold(organisation, device)
                for path in ("", "/summary", f"/{own}"):
                    assert (await ask(here, "GET", path, key=key))[0] == status
                for method, path, body in (
                    ("PATCH", f"/{own}", {"payload": MENDED}),
                    ("POST", f"/{own}/replay", None),
                    ("POST", f"/{own}/discard", {"note": "a"}),
                    ("POST", "/replay", None),
                    ("POST", "/discard?code=a", {"note": "a"}),
                ):
                    assert await code(here, method, path, key=key, body=body) == (403, "scope_missing")
            assert await code(here, "GET", f"/{row}", key=make_token(API_KEY_PREFIX)) == (401, "token_invalid")
            assert await code(here, "GET", f"/{row}", key="none") == (401, "token_invalid")

    run(test())


def test_the_role_of_the_api_may_only_do_what_it_is_for(any_database: Database) -> None:
    """Whatever the code above it does: held rows only, and never out of the quarantine past the books."""

    async def test() -> None:
        quarantine = Quarantine(any_database)
        organisation, _, device, _ = await tenant(any_database)
        row = await quarantine.hold(organisation, device)
        connection = await connect(any_database.settings, role=None, application="test")
        for refused in (
            "UPDATE quarantine SET state = 'released'",
            "UPDATE quarantine SET code = 'fine'",
            "UPDATE quarantine SET organisation_id = organisation_id",
            "DELETE FROM quarantine",
            "INSERT INTO quarantine DEFAULT VALUES",
            "UPDATE ledger SET discarded = 0",
            f"SELECT leave_quarantine(ARRAY['{row}'::uuid], 'expired', '')",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with acting_for(connection, organisation):
                    await connection.execute(refused)
        await quarantine.superuser("UPDATE quarantine SET state = 'released'")
        async with acting_for(connection, organisation):
            assert await connection.execute("UPDATE quarantine SET state = 'held'") == "UPDATE 0"
        await connection.close()

    run(test())
