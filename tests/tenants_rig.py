"""What the tests of tenants share: organisations with one of everything, under the same names, and what is in them.

Left out: what one may see of another.
"""

import itertools
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

import asyncpg

from tests.certificate_rig import add_authority, request_for
from tests.databases import Database
from tests.people_rig import People, Person
from tests.quarantine_rig import RECEIVED, Quarantine

ROLES: Final = ("owner", "admin", "member", "viewer")
# Digits of something longer, such as a certificate's serial number, are none.
_UUID: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}(?![0-9a-f])")
_count: Final = itertools.count(1)

#: Rows that are an organisation's, or of somebody who is in it.
_TABLES: Final = """
SELECT c.relname AS name, array_agg(a.attname::text) AS columns FROM pg_class c
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
GROUP BY c.relname HAVING array_agg(a.attname::text) && '{organisation_id,user_id,series_id,chain}' ORDER BY 1
"""


@dataclass
class Tenant:
    """An organisation, people of every role, and its things by what they are called in requests."""

    organisation: UUID
    people: dict[str, Person]
    tokens: dict[str, str]
    things: dict[str, str]
    series: int

    @property
    def owner(self) -> str:
        return self.tokens["owner"]


def ids_in(text: str) -> set[UUID]:
    return {UUID(found) for found in _UUID.findall(text)}


async def inhabited(here: People) -> Tenant:
    """A new organisation with two of everything that is listed, named as those of every other are."""
    organisation, key = await here.tenant()
    found = {role: await here.person(role, organisation) for role in ROLES}
    await here.join(found["owner"], "owner", (await here.tenant())[0])
    tokens = {}
    for role, person in found.items():
        tokens[role] = await here.token(person, organisation_id=str(organisation))
    tokens["key"] = key
    return await _furnished(here, Tenant(organisation, found, tokens, {}, 0))


async def _furnished(here: People, tenant: Tenant) -> Tenant:
    async def make(method: str, path: str, body: Any = None) -> Any:
        answer = await here.ask(method, path, tenant.owner, body)
        assert answer.status < 300, (path, answer.body)
        return answer.body

    sites = f"/api/organisations/{tenant.organisation}/sites"
    people = f"/api/v1/organisations/{tenant.organisation}"
    places, devices, groups, keys, invitations = [], [], [], [], []
    for number in range(2):
        places.append((await make("POST", sites, {"name": f"Site {number}", "slug": f"site-{number}"}))["id"])
        new = {"site_id": places[0], "local_id": f"fridge{number}", "name": "Fridge", "model": "diy_esp32"}
        devices.append(await make("POST", "/v1/devices", new))
        groups.append((await make("POST", "/api/v1/device-groups", {"name": f"Group {number}"}))["group_id"])
        keys.append(await make("POST", "/api/v1/api-keys", {"name": "Key", "scopes": ["devices:read"]}))
        invited = {"email": f"new-{next(_count)}@example.org", "role": "viewer"}
        invitations.append(await make("POST", f"{people}/invitations", invited))
    server = {"hardwareId": "server", "version": "1", "hostname": "server.local"}
    gateway = await make("POST", f"{sites}/{places[0]}/register-server", server)
    edge = f"edge-{next(_count)}"
    box = {"edgeId": edge, "hardwareId": "box", "version": "1"}
    await make("POST", f"{sites}/{places[0]}/register-edge", box)
    await make("POST", f"{sites}/{places[0]}/mqtt/password")
    await _provisioned(here, make)
    signals = [{"name": "door_open", "bit": 0}]
    templates = [
        await make("POST", "/api/v1/device-templates",
                   {"name": f"Template {number}", "level": "PLANT", "type": "CABINET", "signals": signals})
        for number in range(2)
    ]  # fmt: skip
    plants = {name: await _plant(make, name, steps) for name, steps in PLANTS.items()}
    await make("PATCH", f"/api/v1/plants/{plants['plant']}", {"templateId": templates[0]["id"]})
    await make("POST", f"/api/v1/plants/{plants['plant']}/commands", {"command": "reboot"})
    asked = f"/api/v1/devices/{UUID(devices[0]['id'].removeprefix('dev_'))}/commands"
    command, _ = [await make("POST", asked, {"command": "reboot"}) for _ in range(2)]
    gone = [await _deleted_site(make, sites, number) for number in range(2)]
    uuids = [str(UUID(device["id"].removeprefix("dev_"))) for device in devices]
    for device in uuids:
        await make("PUT", f"/api/v1/device-groups/{groups[0]}/devices/{device}")
    tenant.things = {
        "organisation": str(tenant.organisation),
        "site": places[0],
        "device": uuids[0],
        "group": groups[0],
        "user": str(tenant.people["member"].user),
        "session": (await make("GET", "/api/v1/auth/me"))["session_id"],
        "key": keys[0]["credential_id"],
        "invitation": invitations[0]["invitation_id"],
        "edge": edge,
        "erasure": gone[0],
        "template": templates[0]["id"],
        "command": command["command_id"],
        **plants,
        "email": tenant.people["member"].email,
        "unassigned": await _in_tray(here, tenant.organisation, UUID(places[0])),
        "held": await _held(here.database, tenant.organisation, UUID(uuids[0])),
    }
    tenant.tokens |= {"scoped key": keys[0]["api_key"], "gateway": gateway["siteToken"]}
    tenant.series = await _measured(here, tenant.organisation, UUID(uuids[0]))
    tenant.things["series"] = str(tenant.series)
    return tenant


async def _provisioned(here: People, make: Callable[..., Awaitable[Any]]) -> None:
    """A device with a certificate, and a token that waits for another."""
    if not await here.superuser("SELECT FROM certificate_authorities"):
        await add_authority(here.database)
    for number in range(2):
        made = await make("POST", "/api/v1/devices/registration/tokens", {"deviceName": f"Box {number}"})
        if number == 0:
            await make("POST", "/api/v1/devices/provision", {"token": made["token"], "csr": request_for()})


#: A plant in each state that an operation may need, by what it is called in requests.
PLANTS: Final = {
    "plant": ("provision",),
    "pending plant": (),
    "suspended plant": ("provision", "suspend"),
    "token plant": ("provision",),
}


async def _plant(make: Callable[..., Awaitable[Any]], name: str, steps: tuple[str, ...]) -> str:
    method = "TOKEN" if name.startswith("token") else "MTLS"
    new = {"name": "Plant", "serialNumber": name, "type": "GATEWAY", "authMethod": method}
    plant = str((await make("POST", "/api/v1/plants", new))["id"])
    for step in steps:
        await make("POST", f"/api/v1/plants/{plant}/{step}")
    return plant


async def _deleted_site(make: Callable[..., Awaitable[Any]], sites: str, number: int) -> str:
    """A site that is being erased, and the device that stood there."""
    site = str((await make("POST", sites, {"name": "Gone", "slug": f"gone-{number}"}))["id"])
    await make("POST", "/v1/devices", {"site_id": site, "local_id": "gone", "name": "Gone", "model": "diy_esp32"})
    await make("DELETE", f"{sites}/{site}")
    return site


async def _held(database: Database, organisation: UUID, device: UUID) -> str:
    """A row in quarantine, and one of another hour."""
    quarantine = Quarantine(database)
    await quarantine.hold(organisation, device, received_at=RECEIVED - timedelta(hours=2))
    return str(await quarantine.hold(organisation, device))


async def _in_tray(here: People, organisation: UUID, site: UUID) -> str:
    """Two names of devices that nobody has claimed, and a reading of one."""
    found = []
    for name in ("new", "newer"):
        sql = "SELECT note_unassigned(gen_random_uuid(), $1, $2, $3, 'json', 10)"
        found += await here.superuser(sql, organisation, site, name)
    ((unassigned,), _) = found
    await Quarantine(here.database).hold(organisation, unassigned, code="unassigned_device")
    return str(unassigned)


async def _measured(here: People, organisation: UUID, device: UUID) -> int:
    await here.superuser("SELECT ensure_week(now())")
    sql = "INSERT INTO series (organisation_id, device_id, metric) VALUES ($1, $2, 'temperature') RETURNING series_id"
    ((series,),) = await here.superuser(sql, organisation, device)
    rows = "INSERT INTO {} SELECT $1, 0, now() - i * interval '1 second', {} FROM generate_series(1, 2) i"
    await here.superuser(rows.format("readings", "i"), series)
    await here.superuser(rows.format("text_readings", "'open'"), series)
    return int(series)


async def rows_of(database: Database, tenant: Tenant) -> dict[str, list[str]]:
    """Everything in the database that is the tenant's, or of those who are in it."""
    users = [person.user for person in tenant.people.values()]
    connection = await asyncpg.connect(database.superuser_url)
    try:
        found = {}
        for table in await connection.fetch(_TABLES):
            name, columns = table["name"], set(table["columns"])
            own = [
                condition
                for column, condition in (
                    ("organisation_id", "t.organisation_id = $1"),
                    ("user_id", "t.user_id = ANY ($2)"),
                    ("series_id", "t.series_id = $3"),
                    ("chain", "t.chain = $1"),
                )
                if column in columns
            ]
            sql = (
                f"WITH given AS (SELECT $1::uuid, $2::uuid[], $3::int)"
                f" SELECT to_jsonb(t)::text FROM {name} t WHERE {' OR '.join(own)} ORDER BY 1"
            )
            found[name] = [row[0] for row in await connection.fetch(sql, tenant.organisation, users, tenant.series)]
        return found
    finally:
        await connection.close()


def ids_of(rows: dict[str, list[str]]) -> set[UUID]:
    return ids_in(json.dumps(rows))
