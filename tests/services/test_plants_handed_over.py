"""A plant that a super-admin gives to another organisation: all that it measured answers there, and nowhere else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from schemas.record import Note, Refused
from tests.certificate_rig import people_with_authority
from tests.databases import Database
from tests.landing_rig import DAY, NOW, SECOND, Device, Rig, channel, open_rig, record, sqlite_url
from tests.people_rig import Answer, People
from tests.services.test_plants_face import PATH, error, made, step
from tests.services.test_verify import verify
from tests.support import run

#: Foreign keys to a device by whose it is: all of them have to follow it.
REFERRING = """
SELECT c.conrelid::regclass::text AS name, c.confupdtype = 'c' AS follows FROM pg_constraint c
WHERE c.contype = 'f' AND c.confrelid = 'devices'::regclass
"""


@dataclass
class Stage:
    """Two organisations, a plant of the first, a super-admin who acts for it, and a log."""

    here: People
    rig: Rig
    plant: str
    ours: UUID
    theirs: UUID
    their_key: str
    admin: str

    @property
    def device(self) -> Device:
        return Device(self.ours, UUID(self.plant))

    async def hand_over(self, **more: Any) -> Answer:
        body = {"organizationId": str(self.theirs)} | more
        return await self.here.ask("PATCH", f"{PATH}/{self.plant}", self.admin, body)

    async def readings(self, key: str) -> Any:
        """What an organisation is answered of the plant's readings; the code, if that is an error."""
        answer = await self.here.ask("GET", "/api/v1/readings", key, device_id=self.plant, limit=1_000)
        return answer.body["data"] if answer.status == 200 else answer.body["code"]

    async def statistics(self, key: str) -> Any:
        path = "/api/v1/readings/stats"
        start, end = "2020-01-01T00:00:00Z", "2100-01-01T00:00:00Z"
        answer = await self.here.ask("GET", path, key, device_id=self.plant, from_=start, to=end)
        return answer.body["data"] if answer.status == 200 else answer.body["code"]

    async def quarantined(self, key: str) -> list[str]:
        answer = await self.here.ask("GET", "/api/v1/admin/quarantine", key)
        assert answer.status == 200, answer.body
        return [row["code"] for row in answer.body["data"]]

    async def books(self, key: str) -> Any:
        answer = await self.here.ask("GET", "/api/v1/ledger", key, by="total")
        (row,) = answer.body["data"]
        assert row["adds_up"], row
        return row


@asynccontextmanager
async def stage(database: Database, directory: Path) -> AsyncIterator[Stage]:
    async with (
        people_with_authority(database) as here,
        open_rig(database, sqlite_url(directory), keep_landed_h=1) as rig,
    ):
        theirs, their_key = await here.tenant()
        somebody = await here.person(None, super_admin=True)
        admin = await here.token(somebody, organisation_id=str(here.organisation))
        yield Stage(here, rig, await made(here, "SN"), here.organisation, theirs, their_key, admin)


def power(*seconds: int) -> Any:
    return channel("power", [(NOW + at * SECOND, float(at)) for at in seconds])


def test_everything_that_was_measured_goes_along(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(any_database, tmp_path) as at:
            here, rig, key = at.here, at.rig, at.here.key
            note = Note(0, 0, original_unit="kW")
            bad = Refused(3, "not_finite", "a value is a finite number", b"{}")
            await rig.land(
                record(at.device, power(*range(-100, -50)), notes=[note]),
                record(at.device, channel("mode", [(NOW, "eco")], unit=""), refused=[bad]),
                record(at.device, channel("power", [(NOW - 100 * SECOND, 7.0), (NOW - 500 * DAY, 1.0)])),
            )
            assert (await verify(rig))[1] == []
            held = await at.quarantined(key)
            assert sorted(held) == ["conflict", "not_finite", "too_old"]
            before, statistics, books = await at.readings(key), await at.statistics(key), await at.books(key)
            assert (len(before), books["in_quarantine"]) == (51, 3)
            await here.ask("POST", f"/v1/devices/{at.plant}/rotate-token", key)
            await step(here, at.plant, "provision")
            await here.ask("POST", f"{PATH}/{at.plant}/commands", key, {"command": "x"})

            # Under way: of a series that there is, and of a new one.
            await rig.append(record(at.device, power(-10)), record(at.device, channel("voltage", [(NOW, 230.0)])))
            answer = await at.hand_over(name="Theirs now")
            assert answer.status == 200, answer.body
            assert (answer.body["organizationId"], answer.body["name"]) == (str(at.theirs), "Theirs now")

            assert await at.readings(key) == await at.statistics(key) == "device_not_found"
            assert error(await here.ask("GET", f"{PATH}/{at.plant}", key)) == (404, "PLANT_NOT_FOUND")
            assert await at.readings(at.their_key) == before
            assert await at.statistics(at.their_key) == statistics
            assert (await at.quarantined(key), sorted(await at.quarantined(at.their_key))) == ([], sorted(held))
            ours, theirs = await at.books(key), await at.books(at.their_key)
            assert (ours["received"], ours["handed_over"], ours["in_quarantine"]) == (books["received"], 3, 0)
            assert (theirs["received"], theirs["taken_over"], theirs["in_quarantine"]) == (0, 3, 3)
            commands = await here.ask("GET", f"{PATH}/{at.plant}/commands", at.their_key)
            assert commands.body["meta"]["total"] == 1
            assert (await here.ask("GET", f"{PATH}/{at.plant}/provision/download", at.their_key)).status == 200
            rows = await here.superuser("SELECT DISTINCT organisation_id FROM credentials WHERE device_id = $1",
                                        UUID(at.plant))  # fmt: skip
            assert [row[0] for row in rows] == [at.theirs]
            assert (await verify(rig))[1] == []

            # What was under way, what comes again, and what comes from now on.
            await rig.land(
                record(at.device, power(-100)),
                record(Device(at.theirs, UUID(at.plant)), power(-9, -100), channel("current", [(NOW, 1.0)])),
            )
            found = await at.readings(at.their_key)
            assert len(found) == 51 + 4
            assert {one["metric"] for one in found} == {"power", "mode", "voltage", "current"}
            assert (await at.quarantined(key), len(await at.quarantined(at.their_key))) == ([], 3)
            assert (await verify(rig))[1] == []

            ids = [row["quarantine_id"] for row in (
                await here.ask("GET", "/api/v1/admin/quarantine", at.their_key)).body["data"]]  # fmt: skip
            gone = await here.ask("POST", f"/api/v1/admin/quarantine/{ids[0]}/discard", at.their_key, {"note": "x"})
            assert gone.status < 300, gone.body
            assert (await at.books(at.their_key))["in_quarantine"] == 2
            assert (await verify(rig))[1] == []

            # And back again.
            somebody = await here.person(None, super_admin=True)
            at.admin = await here.token(somebody, organisation_id=str(at.theirs))
            back = await here.ask("PATCH", f"{PATH}/{at.plant}", at.admin, {"organizationId": str(at.ours)})
            assert back.status == 200, back.body
            assert (await at.readings(at.their_key), len(await at.readings(key))) == ("device_not_found", 55)
            assert (await at.books(key))["in_quarantine"] == 2
            assert (await verify(rig))[1] == []
            for organisation, first in ((at.ours, "plant.handed_over"), (at.theirs, "plant.taken_over")):
                actions = [action for action, _ in await here.audited(organisation) if "over" in action]
                assert actions == [first, {"plant.handed_over": "plant.taken_over"}.get(first, "plant.handed_over")]

    run(test(), 120)


def test_where_it_stood_and_with_whom_stays_behind(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(any_database, tmp_path) as at:
            here, key = at.here, at.here.key
            sites = f"/api/organisations/{at.ours}/sites"
            site = (await here.ask("POST", sites, key, {"name": "Roof"})).body["id"]
            moved = {"to_site_id": f"site_{UUID(site).hex}", "effective_at": "2026-01-01T00:00:00Z"}
            assert (await here.ask("POST", f"/v1/devices/{at.plant}/move", key, moved)).status == 200
            group = (await here.ask("POST", "/api/v1/device-groups", key, {"name": "Roofs"})).body["group_id"]
            await here.ask("PUT", f"/api/v1/device-groups/{group}/devices/{at.plant}", key)
            assert (await at.hand_over()).status == 200
            found = (await here.ask("GET", f"{PATH}/{at.plant}", at.their_key)).body
            assert found["plantGroups"] == []
            device = (await here.ask("GET", f"/v1/devices/{at.plant}", at.their_key)).body
            assert device["site_id"] is None
            stays = await here.superuser("SELECT organisation_id, site_id, valid_from FROM device_sites")
            assert [tuple(stay)[:2] for stay in stays] == [(at.theirs, None)]
            assert (await here.ask("DELETE", f"{sites}/{site}", key)).status == 202
            assert (await here.ask("GET", f"{PATH}/{at.plant}", at.their_key)).status == 200

    run(test(), 60)


def test_who_may_and_what_is_in_the_way(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(any_database, tmp_path) as at:
            here, key, url = at.here, at.here.key, f"{PATH}/{at.plant}"
            owner = await here.token_as("owner")
            for token in (key, owner):
                refused = await here.ask("PATCH", url, token, {"organizationId": str(at.theirs)})
                assert error(refused) == (403, "FORBIDDEN")
            nobody_s = await here.ask("PATCH", url, at.admin, {"organizationId": str(UUID(int=7))})
            assert error(nobody_s) == (404, "PLANT_NOT_FOUND")
            same = await here.ask("PATCH", url, at.admin, {"organizationId": str(at.ours)})
            assert same.status == 200

            await here.ask("POST", PATH, at.their_key, {"name": "x", "serialNumber": "SN", "type": "SENSOR"})
            assert error(await at.hand_over()) == (400, "BAD_REQUEST")
            signals = {"name": "Ours", "level": "PLANT", "type": "CABINET"}
            template = (await here.ask("POST", "/api/v1/device-templates", key, signals)).body["id"]
            await here.ask("PATCH", url, key, {"serialNumber": "SN 2", "templateId": template})
            refused = await at.hand_over(name="Other")
            assert (error(refused), set(refused.body["details"])) == ((400, "BAD_REQUEST"), {"organizationId"})
            assert (await here.ask("GET", url, key)).body["name"] == "Plant"

            sites = f"/api/organisations/{at.ours}/sites"
            site = (await here.ask("POST", sites, key, {"name": "Roof"})).body["id"]
            for target in (f"site_{UUID(site).hex}", None):
                await here.ask("POST", f"/v1/devices/{at.plant}/move", key, {"to_site_id": target})
            await here.ask("DELETE", f"{sites}/{site}", key)
            assert error(await at.hand_over(templateId=None)) == (400, "BAD_REQUEST")
            await here.superuser("UPDATE erasures SET state = 'done'")

            await at.rig.land(record(at.device, power(-1)))
            columns = "organisation_id, tier, refused_through, dropped_through, epoch"
            horizon = f"INSERT INTO retention_horizons ({columns}) VALUES ($1, 'raw', $2, $2, 1)"
            later = datetime.fromisoformat("2100-01-01T00:00:00Z")
            await here.superuser(horizon, at.ours, later)
            assert error(await at.hand_over(templateId=None)) == (400, "BAD_REQUEST")
            await here.superuser(horizon, at.theirs, later)
            assert (await at.hand_over(templateId=None)).status == 200

    run(test(), 60)


def test_whatever_refers_to_a_device_follows_it(any_database: Database) -> None:
    async def test() -> None:
        async with people_with_authority(any_database) as here:
            found = await here.superuser(REFERRING)
            assert len(found) > 8
            assert [row["name"] for row in found if not row["follows"]] == []

    run(test())
