"""A site's MQTT password and its tray, over HTTP: who may, what is shown once, what is claimed, and bad input."""

import asyncio
import base64
import hashlib
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from runtime.ids import uuid7
from tests.databases import Database
from tests.people_rig import Answer, People, people
from tests.quarantine_rig import Quarantine
from tests.support import run

TRAY = "/api/v1/unassigned-devices"


@dataclass
class Place:
    """A site of an organisation, and people of it."""

    here: People
    organisation: UUID
    site: str
    owner: str

    @property
    def mqtt(self) -> str:
        return f"/api/organisations/{self.organisation}/sites/{self.site}/mqtt"

    async def ask(self, method: str, path: str, body: Any = None, token: str = "") -> Answer:
        return await self.here.ask(method, path, token or self.owner, body)

    async def token(self, role: str) -> str:
        person = await self.here.person(role, self.organisation)
        return await self.here.token(person, organisation_id=str(self.organisation))

    async def heard(self, name: str, readings: int = 0) -> str:
        """A device that publishes for the site: what it is in the tray."""
        sql = "SELECT note_unassigned($4, $1, $2, $3, 'shelly_gen1', 100)"
        ((unassigned,),) = await self.here.superuser(sql, self.organisation, UUID(self.site), name, uuid7())
        for number in range(readings):
            await Quarantine(self.here.database).hold(
                self.organisation, unassigned, {"type": "humidity", "value": number}, code="unassigned_device"
            )
        return str(unassigned)


async def place(here: People) -> Place:
    organisation, _ = await here.tenant()
    made = Place(here, organisation, "", "")
    made.owner = await made.token("owner")
    answer = await made.ask("POST", f"/api/organisations/{organisation}/sites", {"name": "Site"})
    made.site = answer.body["id"]
    return made


def test_a_password_is_shown_once_rotated_and_revoked_and_the_prefix_stays(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            ours = await place(here)
            assert (await ours.ask("GET", ours.mqtt)).status == 404
            first = (await ours.ask("POST", f"{ours.mqtt}/password")).body
            prefix, password = first["prefix"], first.pop("password")
            assert first["shellyPrefix"] == f"shellies/{prefix}/"
            assert first["shellyGen1Prefix"] == f"{prefix}/"
            assert first["tasmotaFullTopic"] == f"%prefix%/{prefix}/%topic%/"
            assert (await ours.ask("GET", ours.mqtt)).body == first
            query = "SELECT user_name, hash, kind, subject_id, enabled FROM broker_clients"
            ((user, hashed, kind, subject, enabled),) = await here.superuser(query)
            assert (user, kind, str(subject), enabled) == (prefix, "SITE", ours.site, True)
            assert is_of(hashed, password)
            second = (await ours.ask("POST", f"{ours.mqtt}/password")).body
            assert second["prefix"] == prefix
            ((_, hashed, *_),) = await here.superuser(query)
            assert is_of(hashed, second["password"])
            assert not is_of(hashed, password)
            changed = await ours.ask("PATCH", ours.mqtt, {"temperatureUnit": "F"})
            assert (changed.status, changed.body["temperatureUnit"]) == (200, "F")
            assert (await ours.ask("DELETE", f"{ours.mqtt}/password")).status == 204
            assert (await ours.ask("DELETE", f"{ours.mqtt}/password")).status == 404
            assert (await ours.ask("GET", ours.mqtt)).body["revokedAt"] is not None
            ((*_, enabled),) = await here.superuser(query)
            assert not enabled
            ((told,),) = await here.superuser("SELECT count(*) FROM audit_log WHERE action LIKE 'site.mqtt%'")
            assert told == 4
            ((leaked,),) = await here.superuser(
                "SELECT count(*) FROM audit_log a WHERE strpos(to_jsonb(a)::text, $1) > 0", second["password"]
            )
            assert leaked == 0

    run(test())


def is_of(hashed: str, password: str) -> bool:
    """Whether Mosquitto would let it in."""
    _, kind, rounds, salt, made = hashed.split("$")
    assert kind == "7"
    found = hashlib.pbkdf2_hmac("sha512", password.encode(), base64.b64decode(salt), int(rounds))
    return found == base64.b64decode(made)


def test_who_may_not_is_refused(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            ours = await place(here)
            unassigned = await ours.heard("new")
            member, viewer = await ours.token("member"), await ours.token("viewer")
            assert (await ours.ask("POST", f"{ours.mqtt}/password", token=member)).status == 403
            assert (await ours.ask("GET", TRAY, token=viewer)).status == 200
            for what, body in (("claim", {}), ("discard", {"note": "x"})):
                refused = await ours.ask("POST", f"{TRAY}/{unassigned}/{what}", body, token=viewer)
                assert refused.status == 403

    run(test())


def test_a_tray_is_listed_claimed_and_emptied(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            ours, theirs = await place(here), await place(here)
            first, second = await ours.heard("plug", 3), await ours.heard("lamp", 2)
            page = (await ours.ask("GET", f"{TRAY}?limit=1&site_id={ours.site}")).body
            (row,) = page["data"]
            assert (row["unassigned_id"], row["name"], row["format"], row["held"]) == (
                first,
                "plug",
                "shelly_gen1",
                3,
            )
            assert row["last_payload"]["value"] in (0, 1, 2)
            following = f"{TRAY}?limit=1&site_id={ours.site}&cursor={page['next_cursor']}"
            (row,) = (await ours.ask("GET", following)).body["data"]
            assert row["name"] == "lamp"
            assert (await theirs.ask("GET", TRAY)).body == {"data": [], "next_cursor": None}
            assert (await theirs.ask("POST", f"{TRAY}/{first}/claim", {})).status == 404

            claimed = await ours.ask("POST", f"{TRAY}/{first}/claim", {"name": "Plug", "model": "shelly-1pm"})
            assert (claimed.status, claimed.body) == (200, {"device_id": first, "replaying": 3})
            device = (await ours.ask("GET", f"/v1/devices/{first}")).body
            assert (device["local_id"], device["name"], device["model"]) == ("plug", "Plug", "shelly-1pm")
            assert device["site_id"] == f"site_{UUID(ours.site).hex}"
            assert (await ours.ask("POST", f"{TRAY}/{first}/claim", {})).status == 404
            states = "SELECT DISTINCT state FROM quarantine WHERE device_id = $1"
            assert await here.superuser(states, UUID(first)) == [("replaying",)]

            gone = await ours.ask("POST", f"{TRAY}/{second}/discard", {"note": "a neighbour's"})
            assert (gone.status, gone.body) == (200, {"discarded": 2})
            assert await here.superuser(states, UUID(second)) == [("discarded",)]
            assert (await ours.ask("GET", TRAY)).body["data"] == []
            actions = "SELECT action FROM audit_log WHERE action LIKE 'unassigned.%' ORDER BY action"
            assert await here.superuser(actions) == [("unassigned.claimed",), ("unassigned.discarded",)]

    run(test())


def test_who_claims_a_name_at_the_same_time_finds_it_gone(database: Database) -> None:
    async def test() -> None:
        async with people(database) as here:
            ours = await place(here)
            for number in range(5):
                path = f"{TRAY}/{await ours.heard(f'plug-{number}', 2)}/claim"
                answers = await asyncio.gather(*(ours.ask("POST", path, {"name": "Plug"}) for _ in range(4)))
                assert sorted(answer.status for answer in answers) == [200, 404, 404, 404]
            ((waiting, made),) = await here.superuser(
                "SELECT count(*) FILTER (WHERE device_id IS NULL), count(device_id) FROM unassigned_devices"
            )
            assert (waiting, made) == (0, 5)

    run(test())


def test_a_device_that_takes_a_name_stands_at_the_same_site(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            ours, theirs = await place(here), await place(here)
            new = {"name": "Old", "model": "shelly-1pm"}
            here_now = (
                await ours.ask("POST", "/v1/devices", new | {"local_id": "a", "site_id": f"site_{ours.site}"})
            ).body
            nowhere = (await ours.ask("POST", "/v1/devices", new | {"local_id": "b", "site_id": None})).body
            foreign = (await theirs.ask("POST", "/v1/devices", new | {"local_id": "c", "site_id": None})).body
            unassigned = await ours.heard("plug", 2)
            path = f"{TRAY}/{unassigned}/claim"
            for device, status in ((nowhere["id"], 409), (foreign["id"], 404), (f"dev_{uuid4().hex}", 404)):
                answer = await ours.ask("POST", path, {"device_id": str(UUID(device.removeprefix("dev_")))})
                assert answer.status == status, answer.body
            device = str(UUID(here_now["id"].removeprefix("dev_")))
            both = await ours.ask("POST", path, {"device_id": device, "name": "x"})
            assert both.status == 422
            assert (await ours.ask("POST", path, {"model": "no such"})).status == 422
            claimed = await ours.ask("POST", path, {"device_id": device})
            assert (claimed.status, claimed.body) == (200, {"device_id": device, "replaying": 2})
            assert (await ours.ask("GET", f"/v1/devices/{device}")).body["local_id"] == "plug"
            rows = await here.superuser("SELECT DISTINCT device_id::text, state FROM quarantine")
            assert rows == [(device, "replaying")]

    run(test())


def test_a_name_that_another_device_has_by_now_is_not_given_twice(any_database: Database) -> None:
    async def test() -> None:
        async with people(any_database) as here:
            ours = await place(here)
            unassigned = await ours.heard("plug", 1)
            new = {"name": "Plug", "model": "shelly-1pm", "local_id": "plug", "site_id": f"site_{ours.site}"}
            assert (await ours.ask("POST", "/v1/devices", new)).status == 201
            assert (await ours.ask("POST", f"{TRAY}/{unassigned}/claim", {})).status == 409

    run(test())
