"""Who is heard and who has fallen silent, in the database: on both, by one worker and by several."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from api.registry.devices import NewDevice, create, move
from api.registry.organisations import acting_for, add_organisation
from api.registry.sites import add_site
from runtime.clock import SystemClock
from runtime.ids import uuid7
from runtime.postgres import connect
from schemas.record import PG_EPOCH_US
from tests.databases import Database
from tests.landing_rig import NOW, SECOND, channel, microseconds, open_rig, record, sqlite_url
from tests.support import run
from workers.landing.worker import LandingWorker
from workers.presence import Presence
from workers.settings import PresenceSettings

MINUTE = 60.0
HOUR = 3600 * SECOND


class Fleet:
    """Devices of an organisation, a worker that hears them, and a clock that is the database's."""

    def __init__(self, database: Database, organisation: UUID, site: UUID, now: datetime) -> None:
        self.database = database
        self.organisation = organisation
        self.site = site
        self.now = now

    def worker(self, **settings: Any) -> Presence:
        return Presence(self.database.settings, PresenceSettings(**{"presence_steady_s": 0} | settings))

    async def device(self, name: str = "device", at: UUID | None = None) -> UUID:
        connection = await connect(self.database.settings, role=None, application="test")
        async with acting_for(connection, self.organisation):
            device = await create(connection, self.organisation, at, NewDevice(name, name))
        await connection.close()
        return device

    async def hear(self, device: UUID, *ago_s: float, worker: Presence | None = None) -> None:
        """It is heard so long ago each time, and each time that is written."""
        worker = worker or self.worker()
        for seconds in ago_s:
            worker.hear({device.bytes: self.received(seconds)})
            await worker.keep()

    def received(self, ago_s: float) -> int:
        return round((self.now.timestamp() - ago_s) * 1e6) - PG_EPOCH_US

    async def row(self, device: UUID) -> Any:
        return (await self.superuser("SELECT * FROM devices WHERE device_id = $1", device))[0]

    async def standing(self, device: UUID) -> tuple[float | None, float | None, bool]:
        """How long ago it was heard, how far apart, and whether it is online."""
        row = await self.row(device)
        seen = row["last_seen_at"] and (self.now - row["last_seen_at"]).total_seconds()
        return seen, row["cadence_s"] and round(row["cadence_s"], 3), row["online"]

    async def set_status(self, device: UUID, status: str) -> None:
        """As the registry does."""
        connection = await connect(self.database.settings, role="sluice_app", application="test")
        async with acting_for(connection, self.organisation):
            await connection.execute("UPDATE devices SET status = $2 WHERE device_id = $1", device, status)
        await connection.close()

    async def superuser(self, sql: str, *values: Any) -> list[Any]:
        connection = await asyncpg.connect(self.database.superuser_url)
        try:
            await connection.execute("SET session_replication_role = replica")
            return await connection.fetch(sql, *values)
        finally:
            await connection.close()


@asynccontextmanager
async def fleet(database: Database) -> AsyncIterator[Fleet]:
    connection = await connect(database.settings, role=None, application="test")
    organisation = uuid7()
    async with acting_for(connection, organisation):
        await add_organisation(connection, organisation, "Test")
        site = await add_site(connection, organisation, "Site")
        now = await connection.fetchval("SELECT date_trunc('second', now())")
    await connection.close()
    yield Fleet(database, organisation, site, now)


def test_a_device_is_online_for_twice_its_own_cadence_and_a_minute_at_least(any_database: Database) -> None:
    async def test() -> None:
        async with fleet(any_database) as here:
            quick, slow, gone = [await here.device(name) for name in ("quick", "slow", "gone")]
            await here.hear(quick, 20, 10, 0)
            await here.hear(slow, 100 * MINUTE, 50 * MINUTE)
            await here.hear(gone, 10 * MINUTE, 8 * MINUTE)
            assert await here.standing(quick) == (0, 10, True)
            assert await here.standing(slow) == (50 * MINUTE, 50 * MINUTE, True)
            assert await here.standing(gone) == (8 * MINUTE, 2 * MINUTE, False)
            assert (await here.row(quick))["online_until"] <= here.now + timedelta(seconds=60)

    run(test())


def test_silence_is_found_from_the_newest_word_not_from_the_first(any_database: Database) -> None:
    async def test() -> None:
        async with fleet(any_database) as here:
            device = await here.device()
            await here.hear(device, 30, 20, 10)
            first = (await here.row(device))["online_until"]
            await here.hear(device, 0)
            assert (await here.row(device))["online_until"] == first  # indexed, so it stays until it has passed
            await here.superuser("UPDATE devices SET online_until = now() - interval '1 second'")
            await here.worker().keep()
            row = await here.row(device)
            assert (row["online"], row["online_until"]) == (True, here.now + timedelta(seconds=60))
            await here.superuser(
                "UPDATE devices SET online_until = now(), last_seen_at = now() - interval '61 seconds'"
            )
            await here.worker().keep()
            assert not (await here.row(device))["online"]
            await here.hear(device, 0)
            assert (await here.row(device))["online"]

    run(test())


def test_bursts_and_outages_leave_the_cadence_about_what_it_is(any_database: Database) -> None:
    async def test() -> None:
        async with fleet(any_database) as here:
            hourly, frequent = [await here.device(name) for name in ("hourly", "frequent")]
            hours = [[3600 * number + offset for offset in (20.0, 10.0, 0.0)] for number in range(6, 0, -1)]
            await here.hear(hourly, *(ago for burst in hours for ago in burst))
            _, cadence, online = await here.standing(hourly)
            assert online
            assert 0.7 * 3600 < (cadence or 0) < 1.1 * 3600
            await here.hear(frequent, *(86_400 + 10 * number for number in range(5, 0, -1)))
            await here.hear(frequent, *(10.0 * number for number in range(20, -1, -1)))
            _, cadence, _ = await here.standing(frequent)
            assert cadence == 10

    run(test())


def test_it_never_goes_back_in_time_nor_ahead_of_it(any_database: Database) -> None:
    async def test() -> None:
        async with fleet(any_database) as here:
            device, wrong = await here.device("device"), await here.device("wrong")
            await here.hear(device, 50, 10, 40, 10)
            assert await here.standing(device) == (10, 40, True)
            await here.hear(wrong, -86_400)
            seen = (await here.row(wrong))["last_seen_at"]
            assert seen - here.now < timedelta(hours=1)

    run(test())


@pytest.mark.parametrize("status", ["suspended", "deleted"])
def test_who_is_cut_off_is_gone_at_once_and_stays_so_whatever_was_on_its_way(
    any_database: Database, status: str
) -> None:
    async def test() -> None:
        async with fleet(any_database) as here:
            device, silent = await here.device("device"), await here.device("silent")
            for one, ago_s in ((device, 10), (silent, 10 * MINUTE)):
                await here.hear(one, ago_s)
                await here.set_status(one, status)
            row = await here.row(device)
            assert (row["online"], row["online_changed_at"]) == (False, row["offline_at"])
            assert row["offline_at"] >= here.now
            # Silent since before: it did not go at this moment.
            assert (await here.row(silent))["online_changed_at"] == here.now - timedelta(minutes=9)
            changed_at = row["online_changed_at"]
            await here.superuser("UPDATE devices SET offline_at = now() - interval '1 second'")
            await here.hear(device, -1)  # taken after the step, by one who had not heard of it
            row = await here.row(device)
            assert (row["online"], row["online_changed_at"]) == (False, changed_at)

    run(test())


def test_who_is_let_in_again_is_there_once_it_is_heard_from_then_on(any_database: Database) -> None:
    async def test() -> None:
        async with fleet(any_database) as here:
            device = await here.device()
            await here.hear(device, 10)
            await here.set_status(device, "suspended")
            since = (await here.row(device))["online_changed_at"]
            await here.set_status(device, "active")
            await here.hear(device, 5)  # of before, landed late
            row = await here.row(device)
            assert (row["online"], row["online_changed_at"]) == (False, since)
            await here.superuser("UPDATE devices SET offline_at = now() - interval '1 second'")
            await here.hear(device, -1)
            row = await here.row(device)
            assert (row["online"], row["offline_at"]) == (True, None)
            assert row["online_changed_at"] == row["last_seen_at"]

    run(test())


def test_a_device_that_goes_on_sending_is_written_now_and_then_and_a_new_one_at_once(any_database: Database) -> None:
    async def test() -> None:
        async with fleet(any_database) as here:
            steady, new = await here.device("steady"), await here.device("new")
            worker = here.worker(presence_flush_s=5, presence_steady_s=15)
            seen = []
            for ago_s in (30, 25, 20, 15, 10, 5):
                await here.hear(steady, ago_s, worker=worker)
                seen.append((await here.standing(steady))[0])
            assert seen == [30, 30, 30, 15, 15, 15]
            await here.hear(new, 5, worker=worker)
            assert [(await here.standing(device))[0] for device in (steady, new)] == [5, 5]
            await here.hear(steady, 0, worker=worker)
            for _ in range(3):
                await worker.keep()
            assert (await here.standing(steady))[0] == 0  # the last word is never lost

    run(test())


def test_several_workers_write_each_device_s_newest_word_in_steps(any_database: Database) -> None:
    async def test() -> None:
        async with fleet(any_database) as here:
            devices = [await here.device(f"d{number}") for number in range(7)]
            workers = [here.worker(presence_step_rows=2) for _ in range(3)]
            for number, worker in enumerate(workers):
                worker.hear({device.bytes: here.received(30 - 10 * number) for device in devices})
                worker.hear({device.bytes: here.received(35) for device in devices})
                worker.hear({uuid4().bytes: here.received(0)})  # of a device that is nobody's any more
            results = await asyncio.gather(*(worker.keep() for worker in workers), return_exceptions=True)
            for worker, result in zip(workers, results, strict=True):
                if result is not None:  # it met another: what it had is not lost
                    await worker.keep()
            assert {(await here.standing(device))[0] for device in devices} == {10}

    run(test())


def test_what_could_not_be_written_is_written_the_next_time(database: Database) -> None:
    async def test() -> None:
        async with fleet(database) as here:
            device, deleted = await here.device("device"), await here.device("deleted")
            await here.superuser("UPDATE devices SET status = 'deleted' WHERE device_id = $1", deleted)
            worker = here.worker()
            worker.hear({device.bytes: here.received(5), deleted.bytes: here.received(5)})
            await here.superuser("ALTER TABLE devices RENAME TO away")
            with_error = await asyncio.gather(worker.keep(), return_exceptions=True)
            assert isinstance(with_error[0], asyncpg.UndefinedTableError)
            await here.superuser("ALTER TABLE away RENAME TO devices")
            await worker.keep()
            assert (await here.standing(device))[0] == 5
            assert (await here.standing(deleted))[0] is None

    run(test())


def test_a_worker_tells_of_whom_it_has_landed(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            first, second = await rig.register(2)
            times = [NOW - 3 * HOUR, NOW - 2 * HOUR, NOW - HOUR]
            records = [record(first, channel("a", [(time, 1.0)]), received_at=time) for time in times]
            presence = Presence(rig.postgres, PresenceSettings())
            await rig.append(*records, record(second, channel("a", [(NOW, 1.0)]), received_at=NOW))
            stop = asyncio.Event()
            worker = LandingWorker(
                rig.postgres, rig.settings, rig.log, clock=SystemClock(), metrics=rig.metrics, heard=presence.hear
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(worker.run(stop))
                await rig.landed()
                stop.set()
            await presence.keep()
            seen = dict(await rig.fetch("SELECT device_id, last_seen_at FROM devices"))
            assert {device: microseconds(moment) for device, moment in seen.items()} == {
                first.device: NOW - HOUR,
                second.device: NOW,
            }

    run(test())


def test_due_moves_are_settled_and_day_old_answers_forgotten(any_database: Database) -> None:
    async def test() -> None:
        async with fleet(any_database) as here:
            devices = [await here.device(f"d{number}") for number in range(3)]
            connection = await connect(here.database.settings, role=None, application="test")
            async with acting_for(connection, here.organisation):
                for device in devices:
                    await move(connection, device, None, here.site, here.now + timedelta(hours=1))
                await connection.execute(
                    "INSERT INTO repeats (organisation_id, caller_id, key, fingerprint, made_at)"
                    " SELECT $1, $1, decode(md5(n::text), 'hex'), decode(md5(''), 'hex'),"
                    " now() - n * interval '10 hours' FROM generate_series(1, 5) n",
                    here.organisation,
                )
            await connection.close()
            worker = here.worker(presence_step_rows=2)
            await worker.keep()
            assert {(await here.row(device))["site_id"] for device in devices} == {None}
            await here.superuser("UPDATE device_sites SET valid_from = valid_from - interval '61 minutes'")
            await here.superuser("UPDATE devices SET site_until = site_until - interval '61 minutes'")
            await worker.keep()
            rows = [await here.row(device) for device in devices]
            assert {(row["site_id"], row["site_until"]) for row in rows} == {(here.site, None)}
            assert len(await here.superuser("SELECT FROM repeats")) == 2

    run(test())
