"""A site erased on both databases, whatever happens meanwhile: nothing of it stays or comes back, all else does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from msgspec.structs import replace

from api.http.problems import Problem
from api.registry import devices, gateways, groups, sites
from api.registry.credentials import Credentials
from api.registry.limits import set_limits
from runtime.ids import uuid7
from runtime.secrets import TokenHasher, new_ring
from schemas.record import VERSION, Channel, Idempotency, Note, Origin, Quality, Record, Refused
from tests.databases import Database
from tests.erasure_rig import Estate, estate, moment
from tests.landing_rig import DAY, NOW, SECOND, Device, Rig, channel, count, open_rig, record, sqlite_url, until
from tests.support import run
from workers.erasure.eraser import Eraser
from workers.landing import books
from workers.landing.worker import LandingWorker

HOUR = 3_600 * SECOND
ALWAYS = -400 * DAY


@asynccontextmanager
async def place(database: Database, directory: Path, **settings: Any) -> AsyncIterator[tuple[Rig, Estate]]:
    async with (
        open_rig(database, sqlite_url(directory), keep_landed_h=1, **settings) as rig,
        estate(rig) as here,
    ):
        yield rig, here


def power(*readings: tuple[int, float], quality: int = 0) -> Channel:
    return channel("power", readings, quality=quality)


def every_hour(first: int, end: int) -> list[tuple[int, float]]:
    return [(at, float(number)) for number, at in enumerate(range(first, end, HOUR))]


# ---------------------------------------------------------------- what goes and what stays


def test_nothing_of_a_site_is_left_and_everything_else_is(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with place(any_database, tmp_path) as (rig, here), estate(rig) as others:
            site, stays = await here.site("plant"), await here.site("office")
            device, neighbour = await here.device((site, NOW - DAY)), await here.device((stays, NOW - DAY))
            stranger = await others.device((await others.site("plant-2"), NOW - DAY))
            gone = [site, device.device]
            await furnish(here, site, device)
            # From before it stood anywhere, over many weeks, with all that landing keeps of a reading.
            weeks = [(NOW - week * 7 * DAY, float(week)) for week in range(30, 0, -1)]
            texts = channel("mode", [(NOW - DAY, "eco"), (NOW, "off")], unit="")
            notes = [Note(0, 0, metadata=b'{"room": "cellar"}')]
            refused = [Refused(7, "not_finite", "no", b'{"type":"x","value":"NaN"}')]
            for one in (device, neighbour, stranger):
                await rig.land(
                    record(one, power(*weeks), texts, notes=notes, refused=refused),
                    record(one, power((weeks[0][0], 77.0), (NOW - 4_000 * DAY, 1.0))),
                )
            before = await kept(rig, device)
            assert await here.differences() == []
            await here.delete(site)
            assert await here.differences() == []
            assert await here.state(site) == "waiting"
            await here.erase(site)
            assert await here.traces(*gone) == {}
            assert await here.erased(site) == (30, 2, 1, 3, 1)
            assert await kept(rig, device) == before
            assert await here.differences() == []
            # One conflict, one too old and one refused have left the quarantine; what was stored is told elsewhere.
            assert await here.books() == (70, 64, 0, 1, 2, 3, 0)
            assert await rig.value("SELECT count(*) FROM erased_series") == 2
            assert await here.site("plant") != site
            assert count(here.metrics.rows.labels("readings")) == 30
            ((answer,),) = await rig.fetch("SELECT answer FROM repeats")
            assert answer == ""

    run(test())


async def furnish(here: Estate, site: UUID, device: Device) -> None:
    """Whatever a site and its device can have in the registry."""
    hasher = TokenHasher(new_ring())

    class Signer:
        async def sign(self, connection: Any, claims: dict[str, Any]) -> str:
            return f"token of {claims['jti']}"

    async with here.acting() as connection:
        credentials = Credentials(connection, hasher)
        machines = gateways.Gateways(connection, here.organisation, credentials, Signer())
        await machines.register_server(site, "hardware", "server.local", "1")
        await machines.register_edge(site, "edge-1", "edge", "1", 10)
        await credentials.add_gateway_token(here.organisation, site)
        await credentials.add_device_token(here.organisation, device.device)
        await set_limits(connection, here.organisation, {"requests_per_minute": 5}, site=site)
        await set_limits(connection, here.organisation, {"requests_per_minute": 5}, device=device.device)
        await groups.join(
            connection, here.organisation, await groups.create(connection, here.organisation, "g"), device.device
        )
        await connection.execute(
            "INSERT INTO repeats (organisation_id, caller_id, key, fingerprint, answer)"
            " VALUES ($1, $1, $2, $2, 'sealed: the name of the site')",
            here.organisation, bytes(16),
        )  # fmt: skip


async def kept(rig: Rig, but: Device) -> list[Any]:
    """Everything that is stored of other devices."""
    owned = "JOIN series s USING (series_id) WHERE s.device_id <> $1"
    return [
        await rig.fetch(f"SELECT r.* FROM {table} r {owned} ORDER BY r.series_id, r.ts", but.device)
        for table in ("readings", "text_readings", "reading_notes")
    ] + [
        await rig.fetch(f"SELECT * FROM {table} WHERE device_id <> $1 ORDER BY 1, 2, 3", but.device)
        for table in ("quarantine", "devices", "device_sites", "series")
    ]


def test_what_a_device_measured_before_and_after_stays_to_the_microsecond(
    any_database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with place(any_database, tmp_path) as (rig, here):
            first, site, last = [await here.site(name) for name in ("a", "s", "b")]
            came, left = NOW - 20 * DAY, NOW - 5 * DAY
            device = await here.device((first, NOW - 40 * DAY), (site, came), (last, left))
            readings = every_hour(NOW - 40 * DAY, NOW) + [(edge + by, 0.5) for edge in (came, left) for by in (-1, 1)]
            await rig.land(record(device, power(*sorted(readings))))
            texts = [(came - 1, "a"), (came, "s"), (left - 1, "s"), (left, "b")]
            await rig.land(record(device, channel("mode", texts, unit="")))
            before = {one: await here.shown(one) for one in (first, site, last)}
            assert len(before[site]) == 15 * 24 + 2 + 2
            await here.delete(site)
            await here.erase(site)
            assert {one: await here.shown(one) for one in (first, last)} == {
                one: before[one] for one in (first, last)
            }
            # As before, the first stay ends where the second began, and the device goes on.
            stood = await rig.fetch(
                "SELECT site_id, nullif(valid_from, '-infinity') FROM device_sites WHERE device_id = $1"
                " ORDER BY valid_from",
                device.device,
            )
            assert stood == [(first, None), (None, moment(came)), (last, moment(left))]
            assert await here.traces(site) == {}
            assert len(await rig.readings()) == len(readings) - 15 * 24 - 2
            await rig.land(record(device, power((came + 7, 1.0), (left - 7, 1.0), (left + 7, 1.0))))
            assert len(await here.shown(last)) == len(before[last]) + 1
            assert len(await here.shown(first)) == len(before[first])
            assert await here.differences() == []

    run(test())


def test_a_device_with_an_earlier_site_is_removed_and_what_it_measured_there_answers(
    any_database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with place(any_database, tmp_path) as (rig, here):
            first, site = await here.site("a"), await here.site("s")
            device = await here.device((first, NOW - 9 * DAY), (site, NOW - DAY))
            await rig.land(record(device, power(*every_hour(NOW - 9 * DAY, NOW))))
            before = await here.shown(first)
            await here.delete(site)
            await here.erase(site)
            assert (await here.shown(first), len(before)) == (before, 8 * 24)
            assert await rig.fetch("SELECT status, site_id FROM devices") == [("deleted", None)]
            # A late reading of its time there is none of the erased site's.
            late = NOW - 9 * DAY + 1
            await rig.land(record(device, power((late, 1.0), (NOW, 2.0))))
            assert (await here.shown(first))[1] == ("power", late, 1.0)
            assert await here.books() == (9 * 24 + 2, 9 * 24 + 1, 0, 0, 0, 1, 0)
            assert await here.differences() == []
            # Once its other site is erased too, nothing is left of it.
            await here.delete(first)
            await here.erase(first)
            assert await here.traces(first, site, device.device) == {}
            assert await here.differences() == []

    run(test())


def test_a_device_that_stood_there_more_than_once(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with place(any_database, tmp_path) as (rig, here):
            site, other = await here.site("s"), await here.site("b")
            device = await here.device(
                (site, NOW - 9 * DAY), (other, NOW - 6 * DAY), (site, NOW - 4 * DAY), (other, NOW - DAY)
            )
            await rig.land(record(device, power(*every_hour(NOW - 10 * DAY, NOW))))
            before = await here.shown(other)
            await here.delete(site)
            await here.erase(site)
            assert (await here.shown(other), len(before)) == (before, 3 * 24)
            assert len(await rig.readings()) == 3 * 24
            assert await here.differences() == []

    run(test())


def test_one_that_is_to_move_on_goes_on_and_one_that_is_to_come_never_stood_there(
    database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with place(database, tmp_path) as (rig, here):
            site, other = await here.site("s"), await here.site("b")
            leaves = NOW + DAY
            leaving = await here.device((site, NOW - DAY), (other, leaves))
            coming = await here.device((other, NOW - DAY), (site, leaves))
            hasher = TokenHasher(new_ring())
            async with here.acting() as connection:
                for one in (leaving, coming):
                    await Credentials(connection, hasher).add_device_token(here.organisation, one.device)
            readings = power(*every_hour(NOW - 2 * DAY, NOW))
            await rig.land(record(leaving, readings), record(coming, readings))
            await here.delete(site)
            await rig.land(record(leaving, power((NOW, 1.0))), record(coming, power((NOW, 1.0))))
            await here.erase(site)
            assert await rig.fetch("SELECT status FROM devices") == [("active",), ("active",)]
            assert await rig.value("SELECT count(*) FROM credentials WHERE revoked_at IS NULL") == 2
            assert await here.traces(site) == {}
            whose = "SELECT device_id, count(*)::int FROM readings JOIN series USING (series_id) GROUP BY 1"
            assert await rig.fetch(whose) == [(coming.device, 49)]
            # What it measures until it leaves is erased: so it cannot stand elsewhere before.
            async with here.acting() as connection:
                for at in (None, moment(leaves - 1), moment(NOW - DAY)):
                    with pytest.raises(Problem, match="effective_at"):
                        await devices.move(connection, leaving.device, None, other, at)
                await devices.move(connection, leaving.device, None, None, moment(leaves + 1))
                await devices.move(connection, coming.device, None, None, None)

    run(test())


def test_a_move_made_later_into_erased_times_brings_nothing_back(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with place(database, tmp_path) as (rig, here):
            site, other = await here.site("s"), await here.site("b")
            device = await here.device((site, NOW - 9 * DAY), (other, NOW - DAY))
            await rig.land(record(device, power(*every_hour(NOW - 9 * DAY, NOW))))
            await here.delete(site)
            async with here.acting() as connection:
                await devices.move(connection, device.device, None, other, moment(NOW - 5 * DAY))
            await here.erase(site)
            await rig.land(record(device, power((NOW - 4 * DAY, 1.0))))
            assert len(await here.shown(other)) == len(await rig.readings()) == 24
            assert await here.differences() == []

    run(test())


# ---------------------------------------------------------------- landing


def test_what_lands_later_is_counted_as_erased_and_leaves_no_trace(any_database: Database, tmp_path: Path) -> None:
    """In every way a reading can come: plain, refused, out of a spool, named, twice, and what cannot be stored."""

    async def test() -> None:
        async with place(any_database, tmp_path, partitions=1) as (rig, here):
            site, other = await here.site("s"), await here.site("b")
            device = await here.device((site, NOW - 9 * DAY))
            lives = await here.device((site, NOW - 9 * DAY), (other, NOW - DAY))
            await here.delete(site)
            refused = [
                Refused(0, "unknown_unit", "no", b'{"type":"power","value":1}'),
                Refused(1, "unknown_unit", "no", b'{"type":"power","value":1,"ts":"2024-11-02T00:00:00Z"}'),
            ]
            texts = channel("mode", [(NOW, "a"), (NOW, "b"), (NOW - 5_000 * DAY, "c")], unit="")
            spool = Origin(uuid7().bytes, 0, 0, 1)
            name = Idempotency(bytes(16), bytes(16), bytes(16))
            first = replace(record(device, power((NOW, 1.0))), version=VERSION, idempotency=name)
            nul = channel("mode", [(NOW, "a\0")], unit="")
            records: list[tuple[Record, int]] = [
                (record(device, power((NOW, 1.0)), texts, refused=refused), 6),
                (record(device, channel("nul\0", [(NOW, 1.0)]), nul, channel("x" * 3_000, [(NOW, 1.0)])), 3),
                (replace(record(device, power((NOW, 1.0))), version=VERSION, origin=spool), 1),
                (first, 1),
                (replace(first, idempotency=replace(name, fingerprint=bytes([1] * 16))), 1),
                (record(lives, power((NOW - 2 * DAY, 1.0), (NOW - DAY - 1, 1.0), (NOW - DAY, 2.0), (NOW, 3.0))), 2),
                (record(lives, channel("only_there", [(NOW - 2 * DAY, 1.0)], unit="kW")), 1),
                (record(lives, channel("power", [(NOW - 2 * DAY, 1.0), (NOW, 1.0)], unit="kW")), 1),
            ]  # fmt: skip
            for one, _ in records:
                await rig.land(one)
            assert [(metric, time) for metric, _, time, *_ in await rig.readings()] == [
                ("power", NOW - DAY), ("power", NOW),
            ]  # fmt: skip
            assert await rig.fetch("SELECT metric, device_id FROM series") == [("power", lives.device)]
            assert await rig.fetch("SELECT device_id, code FROM quarantine") == [(lives.device, "unit_mismatch")]
            erased = sum(number for _, number in records)
            assert await here.books() == (erased + 3, 2, 0, 0, 1, erased, 0)
            assert await rig.value("SELECT sum(erased)::int FROM outcomes") == erased - 2
            assert await here.differences() == []
            await here.erase(site)
            assert await here.differences() == []
            # All of it again, from the beginning.
            await rig.fetch("UPDATE log_positions SET position = 0 RETURNING 1")
            async with rig.worker():
                await rig.landed()
            assert len(await rig.readings()) == 2
            assert await here.traces(site, device.device) == {}

    run(test())


def test_a_reading_that_is_repeated_while_its_site_is_being_erased(database: Database, tmp_path: Path) -> None:
    """Some of it is stored, some a duplicate, some dropped, and the books add up at every moment."""

    async def test() -> None:
        async with place(database, tmp_path) as (rig, here):
            site = await here.site("s")
            device = await here.device((site, NOW - DAY))
            sent = record(device, power((NOW, 1.0), (NOW + 1, 2.0)))
            await rig.land(sent, replace(sent, record_id=uuid7().bytes))
            await rig.land(record(device, power((NOW, 9.0))))
            await here.delete(site)
            await rig.land(replace(sent, record_id=uuid7().bytes))
            assert await here.books() == (7, 2, 2, 1, 0, 2, 0)
            assert await here.differences() == []
            await here.erase(site)
            assert await here.books() == (7, 2, 2, 0, 0, 3, 0)
            assert await here.differences() == []

    run(test())


class Gated:
    """Lets landing go on when it is told to: before its transactions begin, or after their first statement."""

    def __init__(self) -> None:
        self.reached, self.open = asyncio.Event(), asyncio.Event()

    def around(self, work: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def gated(*arguments: Any) -> Any:
            self.reached.set()
            await self.open.wait()
            return await work(*arguments)

        return gated


def test_a_plan_made_before_and_landed_after_is_made_again(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with place(any_database, tmp_path) as (rig, here):
            site = await here.site("s")
            device, neighbour = await here.device((site, NOW - DAY)), await here.device((await here.site("b"), NOW))
            async with rig.worker() as worker:
                gate = gated_before(worker)
                await rig.append(*(record(one, power((NOW, 1.0))) for one in (device, neighbour)))
                await gate.reached.wait()
                await here.delete(site)
                gate.open.set()
                await rig.landed()
            assert count(rig.metrics.retries.labels("tombstones")) == 1
            owners = await rig.fetch("SELECT device_id FROM readings JOIN series USING (series_id)")
            assert owners == [(neighbour.device,)]
            assert await here.books() == (2, 1, 0, 0, 0, 1, 0)
            await here.erase(site)
            assert await here.traces(site, device.device) == {}
            assert await here.differences() == []

    run(test())


def gated_before(worker: LandingWorker) -> Gated:
    gate = Gated()
    worker._store.land = gate.around(worker._store.land)  # type: ignore[method-assign,assignment]
    return gate


def test_a_landing_under_way_is_waited_for(
    any_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has rows of the site that nobody sees yet, and read the tombstones before there were any."""

    async def test() -> None:
        async with place(any_database, tmp_path) as (rig, here):
            site = await here.site("s")
            device = await here.device((site, NOW - DAY))
            gate = Gated()
            monkeypatch.setattr(books, "write", gate.around(books.write))
            eraser = here.eraser()
            async with rig.worker():
                await rig.append(record(device, power((NOW, 1.0)), refused=[Refused(1, "x", "no", b"{}")]))
                await gate.reached.wait()
                await here.delete(site)
                for _ in range(3):
                    await eraser.keep()
                assert await here.state(site) == "waiting"
                assert eraser.doing is not None
                gate.open.set()
                await rig.landed()
            assert len(await rig.readings()) == 1
            await here.erase(site)
            assert await rig.readings() == []
            assert await here.traces(site, device.device) == {}
            assert await here.differences() == []

    run(test())


def test_series_are_not_made_for_a_device_that_is_being_erased(any_database: Database, tmp_path: Path) -> None:
    """A worker that planned before the site was deleted makes its series only once nothing is left of the device."""

    async def test() -> None:
        async with place(any_database, tmp_path) as (rig, here):
            site = await here.site("s")
            device = await here.device((site, NOW - DAY))
            async with rig.worker() as worker:
                gate = Gated()
                resolve = worker._registry.resolve
                worker._registry.resolve = gate.around(resolve)  # type: ignore[method-assign,assignment]
                await rig.append(record(device, power((NOW, 1.0))))
                await gate.reached.wait()
                await here.delete(site)
                # As if all that stood in the log before had landed.
                await rig.fetch("UPDATE erasures SET state = 'erasing' RETURNING 1")
                await here.erase(site)
                gate.open.set()
                await rig.landed()
            assert await here.traces(site, device.device) == {}
            assert await here.books() == (1, 0, 0, 0, 0, 1, 0)

    run(test())


def test_a_series_that_is_being_made_goes_with_its_device(database: Database, tmp_path: Path) -> None:
    """Found to be there by landing, the device is held until its series stands, and both go."""

    async def test() -> None:
        async with place(database, tmp_path) as (rig, here):
            site = await here.site("s")
            device = await here.device((site, NOW - DAY))
            async with rig.worker() as worker:
                gate, registry = Gated(), worker._registry
                rooms = registry._rooms

                async def rooms_then_wait(devices: set[bytes]) -> Any:
                    found = await rooms(devices)
                    await gate.around(rooms)(devices)
                    return found

                registry._rooms = rooms_then_wait  # type: ignore[method-assign]
                await rig.append(record(device, power((NOW, 1.0))))
                await gate.reached.wait()
                await here.delete(site)
                await rig.fetch("UPDATE erasures SET state = 'erasing' RETURNING 1")
                erasing = asyncio.create_task(here.erase(site))
                await waits_for_a_lock(rig, "transactionid")
                gate.open.set()
                await erasing
                await rig.landed()
            assert await here.traces(site, device.device) == {}
            assert await rig.value("SELECT count(*) FROM erased_series") == 1
            assert count(rig.metrics.retries.labels("content")) == 0

    run(test())


def test_nothing_goes_before_the_log_has_landed_and_a_closed_log_has(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with place(database, tmp_path) as (rig, here):
            site = await here.site("s")
            device = await here.device((site, NOW - DAY))
            await rig.land(record(device, power((NOW, 1.0))))
            await rig.append(record(device, power((NOW + 1, 1.0))))
            await here.delete(site)
            eraser = here.eraser()
            for _ in range(3):
                await eraser.keep()
            assert await here.state(site) == "waiting"
            assert len(await rig.readings()) == 1
            await rig.fetch("UPDATE log_generations SET closed_at = now() RETURNING 1")
            await eraser.keep()
            assert await here.state(site) == "done"
            assert await rig.readings() == []

    run(test())


# ---------------------------------------------------------------- quarantine


async def set_aside(rig: Rig, device: Device, *times: int) -> list[UUID]:
    refused = [
        Refused(at, "unknown_unit", "no", b'{"type":"power","value":%d,"ts":"%b"}' % (at, text(time)))
        for at, time in enumerate(times)
    ]
    await rig.land(record(device, refused=refused))
    return [row for (row,) in await rig.fetch("SELECT quarantine_id FROM quarantine ORDER BY item")]


def text(time: int) -> bytes:
    return moment(time).isoformat().encode()


def replaying(device: Device, row: UUID, replay: UUID, *channels: Channel) -> Record:
    return replace(record(device, *channels), version=VERSION, record_id=replay.bytes, replays=row.bytes)


ASK = "UPDATE quarantine SET state = 'replaying', replay_id = $2 WHERE quarantine_id = $1 RETURNING 1"


def test_the_quarantine_keeps_what_was_not_measured_there(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with place(any_database, tmp_path) as (rig, here):
            first, site = await here.site("a"), await here.site("s")
            device = await here.device((first, NOW - 9 * DAY), (site, NOW - DAY))
            times = [NOW - DAY - 1, NOW - DAY, NOW, NOW - 8 * DAY, NOW]
            rows = await set_aside(rig, device, *times)
            left = {2: "released", 4: "discarded"}
            for item, state in left.items():
                await rig.fetch(
                    "UPDATE quarantine SET state = $2, payload = '', note = 'the plant' WHERE item = $1 RETURNING 1",
                    item, state,
                )  # fmt: skip
            await rig.fetch("UPDATE ledger SET replayed = 1, discarded = 1 RETURNING 1")
            # Edited into the time there: it counts as what it came as.
            edited = b'{"type":"power","value":1,"ts":"%b"}' % text(NOW)
            await rig.fetch(
                "UPDATE quarantine SET original_payload = payload, payload = $1 WHERE item = 3 RETURNING 1", edited
            )
            await here.delete(site)
            await here.erase(site)
            assert await rig.fetch("SELECT item, state, note, message FROM quarantine ORDER BY item") == [
                (0, "held", None, "no"), (2, "released", None, ""), (3, "held", None, "no"),
                (4, "discarded", None, ""),
            ]  # fmt: skip
            assert await here.differences() == []
            # The edited one, replayed, is dropped.
            replay = uuid7()
            await rig.fetch(ASK, rows[3], replay)
            await rig.land(replaying(device, rows[3], replay, power((NOW, 1.0))))
            assert await rig.value("SELECT state FROM quarantine WHERE item = 3") == "released"
            assert await rig.readings() == []
            assert await here.books() == (6, 0, 0, 0, 4, 2, 2)
            assert await here.differences() == []

    run(test())


def test_a_replay_under_way_ends_without_a_reading(any_database: Database, tmp_path: Path) -> None:
    """Landed before the eraser comes to its row, and after."""

    async def test() -> None:
        async with place(any_database, tmp_path) as (rig, here):
            site = await here.site("s")
            device = await here.device((site, NOW - DAY))
            early, late = await set_aside(rig, device, NOW, NOW + 1)
            replays = {early: uuid7(), late: uuid7()}
            for row, replay in replays.items():
                await rig.fetch(ASK, row, replay)
            await here.delete(site)
            # Of another unit: it would be held again.
            unit = channel("power", [(NOW, 1.0)], unit="kW")
            await rig.land(replaying(device, early, replays[early], unit))
            assert await rig.fetch("SELECT state FROM quarantine ORDER BY item") == [("released",), ("replaying",)]
            assert await here.differences() == []
            await here.erase(site)
            await rig.land(replaying(device, late, replays[late], power((NOW + 1, 1.0))))
            assert await rig.fetch("SELECT state FROM quarantine") == [("released",)]
            assert await rig.readings() == []
            assert await here.books() == (3, 0, 0, 0, 1, 2, 1)
            assert await here.differences() == []

    run(test())


# ---------------------------------------------------------------- whoever is in the middle of something


class KilledError(Exception):
    """As SIGKILL: nothing of what was under way is done."""


class Doomed(Eraser):
    """One that is killed at a step, before its transaction, in it, or after."""

    def __init__(self, here: Estate, step: int, when: str) -> None:
        made = here.eraser()
        rollups = made._rollups_metrics
        super().__init__(made._postgres, made._settings, made._log, made._clock, made._metrics, rollups)
        self._left, self._when = step, when

    async def _step(self, connection: Any, site: UUID, statement: str, *arguments: Any) -> Any:
        self._left -= 1
        if self._left:
            return await super()._step(connection, site, statement, *arguments)
        if self._when == "in":
            await connection.execute("BEGIN")
            await connection.execute(statement, *arguments)
            connection.terminate()
        elif self._when == "after":
            await super()._step(connection, site, statement, *arguments)
        raise KilledError


@pytest.mark.parametrize("when", ["before", "in", "after"])
def test_an_eraser_that_is_killed_anywhere_costs_nothing(database: Database, tmp_path: Path, when: str) -> None:
    async def test() -> None:
        async with place(database, tmp_path) as (rig, here):
            first, site = await here.site("a"), await here.site("s")
            removed = [await here.device((site, NOW - DAY)) for _ in range(2)]
            lives = await here.device((first, NOW - 9 * DAY), (site, NOW - 8 * DAY), (first, NOW - DAY))
            await furnish(here, site, removed[0])
            for one in (*removed, lives):
                refused = [Refused(0, "x", "no", b'{"ts":"%b"}' % text(NOW - 2 * DAY))]
                await rig.land(
                    record(one, power(*every_hour(NOW - 9 * DAY, NOW - 8 * DAY + 10 * HOUR)), refused=refused)
                )
            before = await here.shown(first)
            await here.delete(site)
            kills, step = 0, 0
            while await here.state(site) != "done":
                step += 1
                try:
                    await Doomed(here, step % 7 + 1, when).keep()
                except KilledError:
                    kills += 1
                    assert await here.differences() == []
            assert kills >= 5
            assert await here.shown(first) == before
            assert await here.traces(site, *(one.device for one in removed)) == {}
            assert await here.erased(site) == (2 * 34 + 10, 0, 0, 3, 2)
            assert await here.differences() == []

    run(test(), 180)


def test_two_erasers_at_once(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with place(database, tmp_path) as (rig, here):
            site, other = await here.site("s"), await here.site("b")
            for one in (site, other):
                device = await here.device((one, NOW - DAY))
                await rig.land(record(device, power(*every_hour(NOW - 3 * DAY, NOW))))
                await here.delete(one)
            erasers = [here.eraser() for _ in range(3)]

            async def done() -> bool:
                await asyncio.gather(*(eraser.keep() for eraser in erasers))
                return {await here.state(one) for one in (site, other)} == {"done"}

            await until(done)
            assert [(await here.erased(one))[0] for one in (site, other)] == [72, 72]

    run(test())


def test_a_move_onto_a_site_and_its_deletion_are_one_after_the_other(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with place(database, tmp_path) as (rig, here):
            site, other, third = [await here.site(name) for name in ("s", "b", "c")]
            moving = await here.device((other, NOW - 9 * DAY))
            renamed = await here.device((site, NOW - 9 * DAY), name="old")
            async with here.acting() as connection:
                await devices.move(connection, moving.device, None, site, moment(NOW - DAY))
                await devices.change(connection, renamed.device, None, {"local_id": "new"})
                deleting = asyncio.create_task(here.delete(site))
                await waits_for_a_lock(rig)
            await deleting
            spans = "SELECT from_ts FROM tombstones WHERE device_id = $1"
            assert await rig.fetch(spans, moving.device) == [(moment(NOW - DAY),)]
            # The other way round, whoever comes later finds no site.
            staying = await here.device((third, NOW - 9 * DAY))
            async with here.acting() as connection:
                await sites.begin_erasure(connection, other)

                async def move() -> None:
                    async with here.acting() as another:
                        await devices.move(another, staying.device, None, other, None)

                late = asyncio.create_task(move())
                await waits_for_a_lock(rig)
            with pytest.raises(Problem, match="no such site"):
                await late
            assert await rig.value("SELECT status FROM devices WHERE device_id = $1", staying.device) == "active"

    run(test())


async def waits_for_a_lock(rig: Rig, kind: str = "advisory") -> None:
    waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = $1)"

    async def is_waiting() -> bool:
        return bool(await rig.value(waiting, kind))

    await until(is_waiting)


def test_a_site_of_many_devices_is_one_change_to_whoever_keeps_credentials(
    database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with place(database, tmp_path) as (rig, here):
            site = await here.site("s")
            hasher = TokenHasher(new_ring())
            for _ in range(5):
                device = await here.device((site, NOW - DAY))
                async with here.acting() as connection:
                    await Credentials(connection, hasher).add_device_token(here.organisation, device.device)
            epoch = await rig.value("SELECT epoch FROM credential_epoch")
            await here.delete(site)
            assert await rig.value("SELECT count(*) FROM credentials WHERE revoked_at IS NULL") == 0
            await here.erase(site)
            assert await rig.value("SELECT epoch FROM credential_epoch") == epoch + 1
            told = "SELECT organisation_id FROM credential_changes WHERE epoch > $1"
            assert await rig.fetch(told, epoch) == [(here.organisation,)]

    run(test())


# ---------------------------------------------------------------- verify


LEFT_OVERS = [
    "INSERT INTO readings SELECT s.series_id, 0, t.to_ts - interval '1 microsecond', 7 FROM tombstones t"
    " JOIN series s USING (device_id) WHERE t.to_ts <> 'infinity' LIMIT 1",
    "INSERT INTO text_readings SELECT s.series_id, 0, t.from_ts, 'x' FROM tombstones t"
    " JOIN series s USING (device_id) WHERE t.to_ts <> 'infinity' LIMIT 1",
    "INSERT INTO readings SELECT series_id, 0, now(), 7 FROM erased_series LIMIT 1",
    "INSERT INTO quarantine (quarantine_id, organisation_id, device_id, code, message, payload, received_at, source,"
    " partition, position, item) SELECT gen_random_uuid(), organisation_id, device_id, 'x', 'x', '', now(),"
    " gen_random_uuid(), 0, 0, 0 FROM erased_series LIMIT 1",
]


@pytest.mark.parametrize("statement", LEFT_OVERS)
def test_a_row_that_is_left_is_found_and_named(any_database: Database, tmp_path: Path, statement: str) -> None:
    async def test() -> None:
        async with place(any_database, tmp_path) as (rig, here):
            first, site = await here.site("a"), await here.site("s")
            lives = await here.device((first, NOW - 9 * DAY), (site, NOW - 5 * DAY), (first, NOW - DAY))
            removed = await here.device((site, NOW - 9 * DAY))
            for one in (lives, removed):
                await rig.land(record(one, power(*every_hour(NOW - 9 * DAY, NOW))))
            await here.delete(site)
            await here.erase(site)
            assert await here.differences() == []
            async with rig.superuser() as connection:
                assert await connection.execute(statement) == "INSERT 0 1"
            (found,) = [finding for finding in await here.differences() if finding.kind == "unerased"]
            assert found.device_id == (lives if "infinity" in statement else removed).device
            assert found.organisation_id == here.organisation
            assert "erased" in found.message

    run(test())


def test_what_is_erased_without_a_tombstone_is_lost(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with place(database, tmp_path) as (rig, here):
            site = await here.site("s")
            device = await here.device((site, NOW - 9 * DAY), (await here.site("b"), NOW - DAY))
            await rig.land(record(device, power(*every_hour(NOW - 2 * DAY, NOW))))
            await here.delete(site)
            await here.erase(site)
            await rig.fetch("DELETE FROM readings WHERE ts = $1 RETURNING 1", moment(NOW - HOUR))
            (found,) = await here.differences()
            assert (found.kind, found.device_id) == ("lost", device.device)
            await rig.fetch("UPDATE ledger SET stored = stored - 1, erased = erased + 25 RETURNING 1")
            assert [one.kind for one in await here.differences()] == ["lost", "ledger"]

    run(test())


@pytest.mark.parametrize("when", ["bounds", "reader"])
def test_a_deletion_and_an_erasure_beside_a_verification(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Once its positions are read, or between the log and the store: what goes meanwhile is no difference."""

    async def test() -> None:
        async with place(database, tmp_path) as (rig, here):
            first, site = await here.site("a"), await here.site("s")
            removed = await here.device((site, NOW - DAY))
            lives = await here.device((first, NOW - 9 * DAY), (site, NOW - DAY), (first, NOW - HOUR))
            readings = power(*every_hour(NOW - 2 * DAY, NOW), quality=Quality.UNIT_CONVERTED)
            for one in (removed, lives):
                refused = [Refused(9, "x", "no", b'{"ts":"%b"}' % text(NOW - 2 * HOUR))]
                await rig.land(
                    record(one, readings, notes=[Note(0, 40, metadata=b"{}")], refused=refused),
                    record(one, power((NOW - DAY, 77.0))),
                )

            async def erase() -> None:
                await here.delete(site)
                await here.erase(site)

            hook(rig, monkeypatch, when, erase)
            assert await here.differences() == []
            assert await here.state(site) == "done"
            assert await here.differences() == []

    run(test())


def hook(rig: Rig, monkeypatch: pytest.MonkeyPatch, when: str, erase: Callable[[], Awaitable[None]]) -> None:
    """Erase once, after the verification's first snapshot, or once it has read the log."""
    bounds, reader = rig.log.bounds, rig.log.reader
    asked = 0

    async def bounds_then_erase() -> Any:
        nonlocal asked
        asked += 1
        found = await bounds()
        if asked == 2:  # the first is asked for before the snapshot
            await erase()
        return found

    def reader_then_erase() -> Any:
        made = reader()
        close = made.close

        async def close_then_erase() -> None:
            await close()
            await erase()

        made.close = close_then_erase  # type: ignore[method-assign]
        monkeypatch.setattr(rig.log, "reader", reader)
        return made

    if when == "bounds":
        monkeypatch.setattr(rig.log, "bounds", bounds_then_erase)
    else:
        monkeypatch.setattr(rig.log, "reader", reader_then_erase)


def test_the_roles_that_serve_cannot_touch_what_is_erased(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with place(database, tmp_path) as (rig, here), estate(rig) as others:
            site = await here.site("s")
            await here.device((site, NOW - DAY))
            await here.delete(site)
            async with others.acting() as connection:
                for table in ("erasures", "tombstones"):
                    assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 0
            for statement in (
                "UPDATE erasures SET state = 'done'",
                "DELETE FROM tombstones",
                "SELECT erase_site_rows($1, $1, 1)",
                "UPDATE tombstone_epoch SET epoch = 0",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    async with here.acting() as connection:
                        await connection.execute(statement, *([site] if "$1" in statement else []))

    run(test())
