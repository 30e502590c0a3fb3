"""Every declared operation, tried by one organisation with what is another's: as if it were not there at all.

Generated from the declarations: wherever an operation takes an id, a name or a cursor, it is called with the other
organisation's and with one that nobody has, and both have to be answered alike. A field that nobody has said what it
holds, or an operation without a right body here, fails. Left out: the database by itself (`test_tenants`).
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import UnionType
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin
from uuid import UUID

import msgspec
import pytest

from api.devices.shapes import FixedModel
from api.http.lists import CursorText
from api.http.operations import Audience, Nothing, Operation
from api.http.repeats import HEADER
from api.http.spelt import Moment, PrefixedId
from api.registry import texts
from runtime.ids import uuid7
from schemas.plants import AuthMethod
from tests.databases import Database
from tests.people_rig import PASSWORD, Answer, People, people
from tests.support import run
from tests.tenants_rig import Tenant, ids_in, ids_of, inhabited, rows_of

_number: Final = itertools.count(1)

#: By the name of a field that takes one, what it is the id of; `id` by its path.
IDS: Final = {
    "orgId": "organisation", "organisation_id": "organisation", "account_id": "organisation", "siteId": "site",
    "site_id": "site", "to_site_id": "site", "deviceId": "device", "device_id": "device", "userId": "user",
    "user_id": "user", "invitationId": "invitation", "credential_id": "key", "edgeId": "edge", "subject": "site",
    "email": "email", "group_id": "group", "series_id": "series", "channels": "device",
    "organizationId": "organisation", "templateId": "template", "plantId": "plant", "commandId": "command",
}  # fmt: skip
ID_UNDER: Final = {
    "/v1/devices/": "device",
    "/api/v1/devices/": "device",
    "/api/v1/device-groups/": "group",
    "/api/v1/api-keys/": "key",
    "/api/v1/auth/sessions/": "session",
    "/api/v1/admin/quarantine/": "held",
    "/api/v1/erasures/": "erasure",
    "/api/v1/device-templates/": "template",
    "/api/v1/plants/": "plant",
    "/api/v1/unassigned-devices/": "unassigned",
}
#: Of plants, by how a path ends for which they have to be in a certain state.
PLANT_FOR: Final = {"provision": "pending plant", "reactivate": "suspended plant", "mqtt-token": "token plant"}
#: Whoever has one of these is let in by it: there is no other's.
BEARERS: Final = {"token", "refresh_token"}
#: What things are called, of which each organisation has its own (`inhabited` gives all the same); texts that are of
#: the request alone; and what an organisation's own rows are narrowed by.
OTHER: Final = {
    "name", "slug", "local_id", "edgeId", "hardwareId", "hostname",
    "metric", "label", "code", "request_id", "action", "model", "note", "payload", "password", "current_password",
    "new_password", "notes", "timezone", "address", "version", "from", "to", "effective_at", "expires_at", "by",
    "order", "state", "limit", "online", "attempts_max", "latitude", "longitude", "processCount", "role", "scopes",
    "format", "bucket", "fn", "fill", "tz", "ref", "raw_retention_days", "rollups_5m_days", "rollups_1h_days",
    "rollups_1d_days", "last_event_id", "agg", "type", "deviceName", "csr", "serialNumber", "authMethod", "metadata",
    "page", "command", "target", "externalPlantId", "description", "tag", "capacityKwh", "fvePeakPowerKwp",
    "plantWithLoad", "configEnabled", "level", "bit", "field", "unit", "scale", "temperatureUnit",
}  # fmt: skip
NEUTRAL_TYPES: Final = {
    str,
    int,
    float,
    bool,
    dict,
    AuthMethod,
    datetime,
    type(None),
    msgspec.UnsetType,
    msgspec.Raw,
    Moment,
    FixedModel,
    Any,
}

#: A name that nothing has yet.
NEW: Final = "new"
#: A right body of each operation that takes one.
BODIES: Final[Mapping[str, Any]] = {
    "platform.discard_found": {"note": "gone"},
    "platform.batch_of_readings": {"queries": [{"from": "2026-11-01T00:00:00Z", "to": "2026-11-02T00:00:00Z"}]},
    "platform.discard_quarantined": {"note": "gone"},
    "platform.edit_quarantined": {"payload": {"type": "temperature", "value": 1}},
    "sites.create_site": {"name": "Site", "slug": NEW},
    "sites.update_site": {"name": "Site"},
    "sites.register_server": {"hardwareId": "server", "version": "1", "hostname": "server.local"},
    "sites.register_edge": {"edgeId": NEW, "hardwareId": "box", "version": "1"},
    "sites.update_site_mqtt": {"temperatureUnit": "C"},
    "platform.claim_unassigned_device": {"model": None},
    "platform.discard_unassigned_device": {"note": "gone"},
    "sites.heartbeat": {"version": "1", "processCount": 1},
    "devices.create_device": {"local_id": NEW, "name": "Device", "model": "diy_esp32"},
    "devices.update_device": {"name": "Device"},
    "devices.move_device": {"to_site_id": None},
    "platform.create_device_group": {"name": NEW},
    "platform.rename_device_group": {"name": NEW},
    "platform.login": {"email": "nobody@example.org", "password": "no such password"},
    "platform.refresh": {"refresh_token": "ds_live_none"},
    "platform.choose_organisation": {"organisation_id": None},
    "platform.change_password": {"current_password": PASSWORD, "new_password": PASSWORD},
    "platform.forget_password": {"email": "nobody@example.org"},
    "platform.reset_password": {"token": "none", "new_password": PASSWORD},
    "platform.accept_invitation": {"token": "none", "password": PASSWORD, "name": "New"},
    "platform.create_organisation": {"name": NEW},
    "platform.update_organisation": {"name": NEW},
    "platform.change_role": {"role": "viewer"},
    "platform.invite": {"email": "invited@example.org", "role": "viewer"},
    "platform.create_device_template": {"name": NEW, "level": "PLANT", "type": "CABINET"},
    "plants.create_plant": {"name": "Plant", "serialNumber": NEW, "type": "SENSOR"},
    "plants.update_plant": {"name": "Plant"},
    "plants.send_command": {"command": "reboot"},
    "platform.send_device_command": {"command": "reboot"},
    "platform.make_api_key": {"name": "Key", "scopes": ["devices:read"]},
    "platform.register_device": {"deviceId": None},
    "platform.provision_device": {"token": "none", "csr": "none"},
}
#: Queries without which an operation answers nothing, by the field they need.
QUERIES: Final = {
    "platform.readings": "device_id", "platform.list_series": "device_id", "platform.latest_readings": "device_id",
    "devices.list_devices": "account_id",
    "platform.discard_found": "device_id", "platform.aggregated_readings": "device_id",
    "platform.reading_statistics": "device_id", "platform.stream_readings": "device_id",
    "devices.channel_measurements": "channels", "plants.plant_telemetry": "plantId",
    "plants.latest_telemetry": "plantId",
}  # fmt: skip
SPAN: Final = {"from": "2026-11-01T00:00:00Z", "to": "2026-11-02T00:00:00Z"}
#: And what is nobody's, without which they answer nothing either.
PARAMETERS: Final = dict.fromkeys(
    ("platform.aggregated_readings", "platform.reading_statistics", "plants.plant_telemetry"), SPAN
)
#: How the paths of operations end after which something is not as it was found.
ENDS: Final = {
    "logout", "change", "replay", "discard", "claim", "register-server", "provision", "reactivate", "revoke",
    "suspend",
}  # fmt: skip
#: What a right request is answered where that is no success, and why.
NO_SUCCESS: Final = {
    "devices.identify_device": 409,  # no downlink exists
    "platform.stream_readings": 503,  # no log is read here: a stream never ends (test_live)
    "platform.login": 401,  # as who has no account
    "platform.refresh": 401,
    "platform.reset_password": 422,
    "platform.accept_invitation": 404,
    "platform.provision_device": 401,
}


# ---------------------------------------------------------------- what is declared


class Position(NamedTuple):
    """A field that takes what may be another's."""

    where: Literal["path", "query", "body"]
    name: str
    thing: str
    """What it is of, or `cursor`."""
    prefix: str


def leaves(kind: Any) -> Iterator[Any]:
    """The types that a field may hold; those of nested structs are its own fields."""
    if kind is CursorText or get_origin(kind) is None:
        yield kind
    elif get_origin(kind) is Annotated:
        yield from leaves(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType, list):
        for one in get_args(kind):
            yield from leaves(one)
    elif get_origin(kind) is Literal:
        yield str
    elif get_origin(kind) is dict:
        yield dict
    else:
        raise AssertionError(f"nobody has said what {kind} is")


def positions(operation: Operation) -> Iterator[Position]:
    for where, struct in (
        ("path", operation.path_type), ("query", operation.query_type), ("body", operation.body_type),
    ):  # fmt: skip
        for one in fields_of(struct):
            position = position_of(operation, where, one)
            if position is not None:
                yield position


def fields_of(struct: Any) -> Iterator[Any]:
    for one in msgspec.structs.fields(struct):
        nested = [kind for kind in leaves(one.type) if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
        if not nested:
            yield one
        for kind in nested:
            yield from fields_of(kind)


def position_of(operation: Operation, where: Any, one: Any) -> Position | None:
    """None for a field that takes nothing of anybody's. Fails for one that nobody has said what it takes."""
    name, kinds = one.encode_name, list(leaves(one.type))
    what = f"{operation.name}: {where} {name}"
    if CursorText in kinds:
        return Position(where, name, "cursor", "")
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, PrefixedId):
            return Position(where, name, _thing(operation, name, what), kind.prefix)
        if kind is UUID or kind is texts.Email or (name in IDS and kind is not texts.EdgeId):
            return Position(where, name, _thing(operation, name, what), "")
    if name in BEARERS:
        return None
    if where == "path":
        assert operation.path == "/api/schemas/{name}", what
        return None
    assert name in OTHER, f"{what}: say whether it takes what is somebody's"
    assert all(kind in NEUTRAL_TYPES or kind.__module__ == texts.__name__ for kind in kinds), what
    return None


def _thing(operation: Operation, name: str, what: str) -> str:
    if name == "id" and operation.face.name == "plants":
        return PLANT_FOR.get(operation.path.rpartition("/")[2], "plant")
    if name == "id":
        return next(thing for prefix, thing in ID_UNDER.items() if operation.path.startswith(prefix))
    assert name in IDS, f"{what}: say what it is the id of"
    return IDS[name]


# ---------------------------------------------------------------- requests


@dataclass
class Request:
    """A request of an operation that is right in everything, of a tenant's own things."""

    operation: Operation
    path: dict[str, str] = field(default_factory=dict)
    query: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None

    def with_(self, position: Position, value: str) -> "Request":
        spelt = f"{position.prefix}{UUID(value).hex}" if position.prefix else value
        changed = replace(self, path=dict(self.path), query=dict(self.query), body=dict(self.body or {}) or None)
        if position.where == "body" and "queries" in (self.body or {}):
            changed.body = {"queries": [{**BODIES[self.operation.name]["queries"][0], position.name: spelt}]}
        elif position.where == "body":
            changed.body = {**(self.body or {}), position.name: spelt}
        else:
            (changed.path if position.where == "path" else changed.query)[position.name] = spelt
        return changed

    async def send(self, here: People, token: str | None, **headers: str) -> Answer:
        path = self.operation.path
        for name, value in self.path.items():
            path = path.replace(f"{{{name}}}", value)
        sent = {**headers} | ({} if token is None else {"Authorization": f"Bearer {token}"})
        async with here.session.request(
            self.operation.method, f"{here.url}{path}", json=self.body, params=self.query, headers=sent
        ) as answer:
            raw = await answer.read()
            content = json.loads(raw) if raw and "json" in answer.content_type else raw.decode()
            return Answer(answer.status, content, answer.headers)


def right(operation: Operation, own: Tenant) -> Request:
    request = Request(operation, query=dict(PARAMETERS.get(operation.name, {})))
    if operation.body_type is not Nothing:
        assert operation.name in BODIES, f"{operation.name}: say what a right body of it is"
        request.body = {
            name: f"new-{next(_number)}" if value == NEW else value for name, value in BODIES[operation.name].items()
        }
    for position in positions(operation):
        needed = position.where == "path" or position.name == QUERIES.get(operation.name)
        if needed or (request.body is not None and request.body.get(position.name, "") is None):
            request = request.with_(position, own.things[position.thing])
    if operation.path_type is not Nothing and operation.path == "/api/schemas/{name}":
        request.path = {"name": "Readings"}
    return request


def token_of(operation: Operation, caller: str, tenant: Tenant) -> str | None:
    if operation.needs.audience is Audience.PUBLIC:
        return None
    return tenant.tokens["gateway" if operation.needs.audience is Audience.SITE else caller]


def alike(answer: Answer, *ids: str) -> Any:
    """What was answered, without the ids that were asked for and the request's own."""
    text = json.dumps(answer.body)
    for one in ids:
        if one.isdigit():
            continue  # a series: no answer repeats it, and its digits stand in times
        spellings = {one, UUID(one).hex} if ids_in(one) else {one}
        for spelling in spellings:
            text = text.replace(spelling, "…")
    body = json.loads(text)
    if answer.status in (201, 202, 200) and not isinstance(answer.body, str):
        return answer.status, shape(body)
    for holder in (body, body.get("error") if isinstance(body, dict) else None):
        if isinstance(holder, dict):
            holder.pop("request_id", None)
    kept = {name for name in answer.headers if name not in ("X-Request-Id", "Date", "Content-Length")}
    return answer.status, body, sorted(kept)


def shape(value: Any) -> Any:
    """What was done twice has two ids: of success count the fields and how many there are of each."""
    if isinstance(value, dict):
        return {name: shape(one) for name, one in value.items()}
    if isinstance(value, list):
        return [shape(one) for one in value]
    return type(value).__name__


# ---------------------------------------------------------------- tests

CALLERS: Final = ("owner", "admin", "member", "viewer", "key", "scoped key")


async def cursor_of(here: People, operation: Operation, tenant: Tenant) -> str:
    """A cursor of the tenant's own list: two of everything make two pages."""
    request = right(operation, tenant)
    request.query["limit"] = "1"
    answer = await request.send(here, token_of(operation, "owner", tenant))
    found = answer.body.get("next_cursor") or answer.body.get("nextCursor")
    assert answer.status == 200, (operation.name, answer.body)
    assert found, f"{operation.name}: make two of what it lists"
    return str(found)


async def theirs_of(here: People, operation: Operation, position: Position, theirs: Tenant) -> str:
    if position.thing == "cursor":
        return await cursor_of(here, operation, theirs)
    return theirs.things[position.thing]


def nobodys_of(position: Position) -> str:
    if position.thing == "email":
        return f"stranger-{next(_number)}@example.org"
    if position.thing == "series":
        return str(2**31 - 1)
    return f"nobody-{next(_number)}" if position.thing in ("cursor", "edge") else str(uuid7())


def generous(database: Database) -> Any:
    """One address makes more attempts here than anybody may."""
    return people(
        database, auth_logins_per_minute=10**6, auth_guesses_per_minute=10**6, auth_login_failures_max=1_000
    )


def test_what_is_another_s_is_answered_as_what_is_nobody_s(database: Database) -> None:
    async def test() -> None:
        async with generous(database) as here:
            theirs, ours = await inhabited(here), await inhabited(here)
            before = await rows_of(database, theirs)
            secret_ids = ids_of(before) - ids_of(await rows_of(database, ours))
            tried = 0
            for operation in here.operations:
                for position in positions(operation):
                    other = await theirs_of(here, operation, position, theirs)
                    for caller in CALLERS:
                        token = token_of(operation, caller, ours)
                        nobodys = nobodys_of(position)
                        answers = [
                            await right(operation, ours).with_(position, value).send(here, token)
                            for value in (other, nobodys)
                        ]
                        what = (operation.name, position, caller)
                        assert alike(answers[0], other, nobodys) == alike(answers[1], other, nobodys), what
                        assert all(answer.status < 500 for answer in answers), what
                        leaked = (ids_in(json.dumps(answers[0].body)) & secret_ids) - ids_in(other)
                        assert not leaked, what
                        tried += 1
            assert tried > len(here.operations) * 6
            assert await rows_of(database, theirs) == before

    run(test(), 300)


def test_what_is_one_s_own_is_answered(database: Database) -> None:
    """Otherwise the test above would compare requests that nobody is answered."""

    async def test() -> None:
        async with generous(database) as here:
            ours = await inhabited(here)
            for operation in here.operations:
                takes_away = operation.method == "DELETE" or operation.path.rpartition("/")[2] in ENDS
                own = await inhabited(here) if takes_away else ours
                answer = await right(operation, own).send(here, token_of(operation, "owner", own))
                expected = NO_SUCCESS.get(operation.name, operation.status)
                assert answer.status == expected, (operation.name, answer.body)

    run(test(), 300)


#: What of an organisation's a super-admin may call who acts for none, about what belongs to none.
UNOWNED: Final = {"platform.audit"}


def test_who_acts_for_no_organisation_is_let_into_none(database: Database) -> None:
    """But where the path names one, a super-admin into each, and others into none that is there."""

    async def test() -> None:
        async with generous(database) as here:
            ours = await inhabited(here)
            super_admin = await here.token(await here.person(None, super_admin=True))
            nobody = await here.token(await here.person(None))
            for operation in here.operations:
                if operation.needs.audience is not Audience.ORGANISATION:
                    continue
                request = right(operation, ours)
                is_named = "{orgId}" in operation.path
                assert (await request.send(here, nobody)).status == (404 if is_named else 403), operation.name
                if not is_named:
                    expected = operation.status if operation.name in UNOWNED else 403
                    assert (await request.send(here, super_admin)).status == expected, operation.name
            assert {operation.name for operation in here.operations if operation.needs.unowned} == UNOWNED

    run(test(), 300)


@pytest.mark.parametrize("caller", ["gateway", "owner"])
def test_a_token_opens_nothing_of_another_s(database: Database, caller: str) -> None:
    """Every operation about another's organisation, site or things, all its ids at once."""

    async def test() -> None:
        async with generous(database) as here:
            theirs, ours = await inhabited(here), await inhabited(here)
            before = await rows_of(database, theirs)
            nobody = replace(theirs, things={name: str(uuid7()) for name in theirs.things})
            nobody.things |= {"edge": "nobody", "email": "nobody@example.org"}
            for operation in here.operations:
                if not {position.thing for position in positions(operation)} - {"cursor", "email"}:
                    continue
                token = token_of(operation, caller, ours)
                answers = [await right(operation, whose).send(here, token) for whose in (theirs, nobody)]
                every = [*theirs.things.values(), *nobody.things.values()]
                assert alike(answers[0], *every) == alike(answers[1], *every), operation.name
            assert await rows_of(database, theirs) == before

    run(test(), 300)


def test_a_name_that_another_gave_a_request_is_free(database: Database) -> None:
    async def test() -> None:
        async with generous(database) as here:
            repeatable = [operation for operation in here.operations if operation.repeatable]
            assert len(repeatable) > 5
            theirs, ours, alone = [await inhabited(here) for _ in range(3)]
            for operation in repeatable:
                name, other_name = {HEADER: operation.name}, {HEADER: f"not {operation.name}"}
                first = await right(operation, theirs).send(here, theirs.owner, **name)
                kept = await rows_of(database, theirs)
                answer = await right(operation, ours).send(here, ours.owner, **name)
                other = await right(operation, alone).send(here, alone.owner, **other_name)
                assert first.status == answer.status == operation.status, operation.name
                assert alike(answer) == alike(other), operation.name
                assert not ids_in(json.dumps(answer.body)) & ids_in(json.dumps(kept["repeats"])), operation.name
                assert answer.body != first.body, operation.name
                assert await rows_of(database, theirs) == kept, operation.name

    run(test(), 300)
