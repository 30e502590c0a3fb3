"""Streams of readings on real databases and both logs: what is told, in which order, from where, and to whom."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from msgspec.structs import replace

from api.access.standing import still_let_in
from api.live import hub
from api.live.events import EventIds, Mark
from api.registry.organisations import acting_for
from runtime.ids import uuid7
from runtime.postgres import connect
from schemas.record import PG_EPOCH_US, VERSION, Idempotency, Origin, Quality, Record, Refused, device_in, encode
from tests.databases import Database
from tests.landing_rig import DAY, NOW, SECOND, Device, Rig, channel, open_rig, record, sqlite_url, until
from tests.live_rig import RING, Api, api_on
from tests.support import run


@pytest.fixture(params=["sqlite", "kafka"])
def log_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each engine in turn."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path)
    found: str = request.getfixturevalue("services")["SLUICE_LOG_URL"]
    return found


@asynccontextmanager
async def stage(database: Database, log_url: str, **limits: Any) -> AsyncIterator[tuple[Rig, Api]]:
    async with open_rig(database, log_url, partitions=4, keep_landed_h=1) as rig, api_on(rig, **limits) as api:
        yield rig, api


def power(*values: float, at: int = NOW, label: str = "", quality: int | bytes = 0) -> Any:
    readings = [(at + number * SECOND, value) for number, value in enumerate(values)]
    return channel("power", readings, label=label, quality=quality)


def values(rows: list[Any]) -> list[Any]:
    return [row["value"] for row in rows]


def test_readings_are_told_of_as_a_query_gives_them(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(any_database, sqlite_url(tmp_path)) as (rig, api):
            device, other = await rig.register(2)
            async with api.listening(device.organisation, device_id=device.device) as stream:
                headers = stream.answer.headers
                assert headers["Content-Type"] == "text/event-stream"
                assert (headers["Cache-Control"], headers["X-Accel-Buffering"]) == ("no-store", "no")
                assert "Content-Encoding" not in headers
                assert 1_000 <= stream.retry_ms <= 5_000
                state = channel("on", [(NOW, 1.0)], unit="", quality=Quality.BOOLEAN)
                texts = channel("mode", [(NOW, "eco\nor not")], unit="")
                flags = struct.pack(">2h", 0, Quality.UNIT_CONVERTED)
                await rig.land(
                    record(other, power(9.0)),
                    record(device, power(1.5, 2.5, label="L1", quality=flags), state, texts),
                )
                told = await stream.readings(4)
                key = {"Authorization": f"Bearer {await api.key(device.organisation)}"}
                url = f"{api.url}/api/v1/readings?device_id={device.device}"
                async with api.session.get(url, headers=key) as answer:
                    stored = (await answer.json())["data"]
                assert sorted(told, key=repr) == sorted(stored, key=repr)

    run(test())


@pytest.mark.parametrize("narrowed", [{}, {"metric": "power"}, {"label": "L1"}])
def test_only_what_is_chosen_is_told(database: Database, tmp_path: Path, narrowed: dict[str, str]) -> None:
    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path)) as (rig, api):
            (device,) = await rig.register()
            (foreign,) = await rig.register()
            async with api.listening(device.organisation, device_id=device.device, **narrowed) as stream:
                cold = channel("temperature", [(NOW, 2.0)], label="L2", unit="°C")
                await rig.land(record(foreign, power(7.0)), record(device, cold, power(1.0, label="L1")))
                expected = {1.0} if narrowed else {1.0, 2.0}
                assert set(values(await stream.readings(len(expected)))) == expected
            series = await rig.value("SELECT series_id FROM series WHERE metric = 'temperature'")
            async with api.listening(device.organisation, series_id=series) as stream:
                again = channel("temperature", [(NOW + SECOND, 4.0)], label="L2", unit="°C")
                await rig.land(record(device, power(3.0, at=NOW + SECOND, label="L1"), again))
                assert values(await stream.readings(1)) == [4.0]

    run(test())


def test_nothing_is_lost_or_doubled_under_load_with_resumes(database: Database, log_url: str) -> None:
    """Clients that leave at any moment and come back, to another process too, are told of everything once."""

    async def test() -> None:
        async with stage(database, log_url, live_heartbeat_s=0.3) as (rig, api), api_on(rig) as second:
            devices = await rig.register(6)
            total = 400

            async def send() -> None:
                for number in range(total):
                    at = NOW + number * SECOND
                    await rig.append(*(record(device, power(float(number), at=at)) for device in devices))
                    await asyncio.sleep(0.005)

            async def listen(device: Device, patience: int) -> list[float]:
                told: list[float] = []
                last_id, turn = begun[device], 0
                while len(told) < total:
                    turn += 1
                    one = (api, second)[turn % 2]
                    async with one.listening(device.organisation, last_id, device_id=device.device) as stream:
                        goal = min(total, len(told) + patience * turn)
                        while len(told) < goal:
                            told += values(await stream.readings(1))
                            last_id = stream.last_id
                return told

            begun = {}
            for device in devices:
                async with api.listening(device.organisation, device_id=device.device) as stream:
                    begun[device] = stream.last_id
            async with rig.worker(), asyncio.TaskGroup() as group:
                group.create_task(send())
                tasks = [group.create_task(listen(device, 3 + n)) for n, device in enumerate(devices)]
            for task in tasks:
                assert task.result() == [float(number) for number in range(total)]

    run(test())


def test_only_what_was_stored_is_told(database: Database, tmp_path: Path) -> None:
    """Sent twice, refused at the door, too old, in conflict, of a spool a second time, under one name."""

    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path)) as (rig, api):
            (device,) = await rig.register(partition=0)
            async with api.listening(device.organisation, device_id=device.device) as stream:
                first = record(device, power(1.0))
                refused = Refused(1, "invalid_value", "no", b"{}")
                old = channel("power", [(NOW - 500 * DAY, 5.0), (NOW + 5 * SECOND, 6.0)])
                spool = Origin(uuid4().bytes, 0, 0, 1)
                spooled = replace(record(device, power(7.0, at=NOW + 6 * SECOND)), version=VERSION, origin=spool)
                name = Idempotency(bytes(16), bytes(16), bytes(16))
                named = [
                    replace(record(device, power(8.0, at=NOW + 8 * SECOND)), version=VERSION, idempotency=name)
                    for _ in range(2)
                ]
                records = [
                    first, first, record(device, power(1.0)), record(device, power(99.0)),
                    record(device, power(2.0, at=NOW + SECOND), refused=[refused]),
                    record(device, power(98.0, 2.0, 3.0)), record(device, old), spooled, spooled, *named,
                    record(device, power(100.0, at=NOW + 20 * SECOND)),
                ]  # fmt: skip
                await rig.append(*records)
                await rig.append_raw(0, b"no record")
                async with rig.worker():
                    await rig.landed()
                told = values(await stream.readings(8))
                # The duplicate that came with a new reading is told of again, as README says.
                assert told == [1.0, 2.0, 2.0, 3.0, 6.0, 7.0, 8.0, 100.0]

    run(test())


def test_a_reading_that_made_way_is_told_where_it_stands(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path)) as (rig, api):
            (device,) = await rig.register()
            async with api.listening(device.organisation, device_id=device.device) as stream:
                stamped = [record(device, power(value, quality=Quality.TIME_STAMPED)) for value in (1.0, 2.0)]
                await rig.land(*stamped)
                told = await stream.readings(2)
                stored = await rig.fetch("SELECT value, ts FROM readings ORDER BY ts")
                assert [value for value, _ in stored] == values(told) == [1.0, 2.0]
                assert [row["ts"] for row in told] == [
                    ts.strftime("%Y-%m-%dT%H:%M:%S.%fZ").replace(".000000Z", "Z") for _, ts in stored
                ]

    run(test())


def test_what_stands_is_asked_of_one_s_own_alone(any_database: Database, tmp_path: Path) -> None:
    """The functions that act with the owner's rights."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,), (foreign,) = await rig.register(), await rig.register()
            mode = channel("mode", [(NOW, "eco")], unit="")
            await rig.land(
                *(record(device, power(value, quality=Quality.TIME_STAMPED), mode) for value in (1.0, 2.0))
            )
            rows = await rig.fetch(
                "SELECT series_id, ts, false FROM readings UNION ALL SELECT series_id, ts, true FROM text_readings"
            )
            keys = [list(column) for column in zip(*rows, strict=True)]
            records = [row[0] for row in await rig.fetch("SELECT record_id FROM moved_readings")]
            assert (len(rows), len(records)) == (3, 1)
            app = await connect(rig.postgres, role="sluice_app", application="test")
            for organisation, seen in ((device.organisation, (3, 1)), (foreign.organisation, (0, 0))):
                async with acting_for(app, organisation):
                    stored = await app.fetch("SELECT * FROM stored_readings($1, $2, $3)", *keys)
                    moved = await app.fetch("SELECT * FROM readings_moved($1)", records)
                    assert (len(stored), len(moved)) == seen
            await app.close()

    run(test())


def test_what_was_erased_meanwhile_is_not_told_of(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path)) as (rig, api):
            (device,) = await rig.register()
            async with api.listening(device.organisation, device_id=device.device) as stream:
                began = stream.last_id
            await rig.land(record(device, power(1.0, 2.0, 3.0)))
            async with rig.superuser() as connection:
                await connection.execute("DELETE FROM readings WHERE value = 2")
            async with api.listening(device.organisation, began, device_id=device.device) as stream:
                assert values(await stream.readings(2)) == [1.0, 3.0]

    run(test())


def test_a_site_s_and_a_group_s_devices_come_and_go(database: Database, tmp_path: Path) -> None:
    """A site's stream tells of what was read while the device stood there."""

    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path)) as (rig, api):
            device, other = await rig.register(2)
            owner, site, group = device.organisation, uuid7(), uuid7()
            moved = NOW + 10 * SECOND
            async with rig.superuser() as connection:
                await connection.execute(
                    "INSERT INTO sites (site_id, organisation_id, name, slug) VALUES ($1, $2, 'x', 'x')", site, owner
                )
                await connection.execute(
                    "INSERT INTO device_groups (group_id, organisation_id, name) VALUES ($1, $2, 'x')", group, owner
                )
            async with (
                api.listening(owner, site_id=site) as at_site,
                api.listening(owner, group_id=group) as in_group,
                rig.worker(),
            ):
                async with rig.superuser() as connection:
                    stays = (
                        "INSERT INTO device_sites (device_id, organisation_id, site_id, valid_from)"
                        " VALUES ($1, $2, $3, $4)"
                    )
                    await connection.execute(stays, device.device, owner, site, as_time(NOW))
                    await connection.execute(stays, device.device, owner, None, as_time(moved))
                    await connection.execute(
                        "INSERT INTO device_group_members (group_id, device_id, organisation_id) VALUES ($1, $2, $3)",
                        group, other.device, owner,
                    )  # fmt: skip

                async def follows() -> bool:
                    return {device.device.bytes, other.device.bytes} <= api.live._watches.by_device.keys()

                await until(follows)
                await rig.append(record(device, power(*map(float, range(20)), at=NOW - 5 * SECOND)))
                await rig.append(record(other, power(50.0)))
                assert values(await at_site.readings(10)) == [float(value) for value in range(5, 15)]
                assert values(await in_group.readings(1)) == [50.0]

    run(test())


def as_time(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us + PG_EPOCH_US)


def test_a_listener_who_may_no_longer_is_let_go(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path)) as (rig, api):
            (device,) = await rig.register()
            owner = device.organisation
            doomed = await api.make_key(owner)
            async with (
                api.listening(owner, device_id=device.device) as kept,
                api.listening(owner, key=doomed, device_id=device.device) as ended,
            ):
                async with rig.superuser() as connection:
                    await connection.execute(
                        "UPDATE credentials SET revoked_at = now() WHERE credential_id ="
                        " (SELECT min(credential_id::text)::uuid FROM credentials WHERE organisation_id = $1)",
                        owner,
                    )
                event = await ended.next()
                assert event is not None
                assert (event.name, event.data) == ("end", {"reason": "revoked"})
                assert await ended.next() is None
                await rig.land(record(device, power(1.0)))
                assert values(await kept.readings(1)) == [1.0]
            assert api.sample("ended_total", reason="revoked") == 1
            async with api.asked(owner, key=doomed, device_id=device.device) as answer:
                assert answer.status == 401

    run(test())


def test_who_reads_too_slowly_is_let_go_and_goes_on_by_its_id(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path), live_queue_bytes_max=20_000) as (rig, api):
            (device,) = await rig.register(partition=0)
            began, sent = NOW - 10 * DAY, 0

            async def let_go() -> bool:
                ended = any(one.ended == "slow" for one in api.live._listeners)
                return ended or bool(api.sample("ended_total", reason="slow"))

            async def told_or_let_go() -> bool:
                one = api.live._live
                told = one is not None and one.mark.positions[0] == (await rig.log.bounds())[0].end
                return told or await let_go()

            async with api.listening(device.organisation, device_id=device.device) as slow, rig.worker():
                slow.answer.connection.transport.pause_reading()  # type: ignore[union-attr]
                # How much the sockets between take without being read is the system's.
                while not await let_go():
                    for _ in range(20):
                        some = [float(number) for number in range(sent, sent + 500)]
                        # An event repeats the label with every reading.
                        await rig.append(record(device, power(*some, at=began + sent * SECOND, label="L" * 250)))
                        sent += 500
                    await rig.landed()
                    await until(told_or_let_go)
                slow.answer.connection.transport.resume_reading()  # type: ignore[union-attr]
                told: list[float] = []
                last = None
                while (event := await slow.next()) is not None:
                    last = event
                    told += values(event.data) if event.name == "readings" else []
                assert last is not None
                assert (last.name, last.data) == ("end", {"reason": "slow"})
            assert api.sample("ended_total", reason="slow") == 1
            while len(told) < sent:
                async with api.listening(device.organisation, slow.last_id, device_id=device.device) as slow:
                    while len(told) < sent and (event := await slow.next()) is not None:
                        told += values(event.data) if event.name == "readings" else []
            assert told == [float(number) for number in range(sent)]

    run(test())


def test_a_gap_is_told(database: Database, tmp_path: Path) -> None:
    """Too far behind, of another generation, and what the log keeps no longer; an id made up is refused."""

    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path), live_resume_records_max=3) as (rig, api):
            (device,) = await rig.register(partition=1)
            owner = device.organisation
            chosen: dict[str, Any] = {"device_id": device.device}
            await rig.land(record(device, power(0.0)))
            async with api.listening(owner, **chosen) as stream:
                began = stream.last_id
            await rig.land(*(record(device, power(float(n), at=NOW + n * SECOND)) for n in range(1, 6)))
            mark = EventIds(RING).take(began)
            ids = EventIds(RING)
            other = ids.give(Mark(uuid4().bytes, mark.positions, mark.received_through))
            for last_id in (began, other):
                async with api.listening(owner, last_id, **chosen) as stream:
                    event = await stream.next()
                    assert event is not None
                    assert event.name == "gap"
                    assert event.data == {"from": spelt(NOW), "reason": "expired"}
                    assert ids.take(event.id).positions[1] == 6
            near = ids.give(Mark(mark.source, {**mark.positions, 1: 4}, mark.received_through))
            async with api.listening(owner, last_event_id=near, **chosen) as stream:
                assert values(await stream.readings(2)) == [4.0, 5.0]
            for bad in ("nonsense", began[:-2], "é"):
                async with api.asked(owner, last_event_id=bad, **chosen) as answer:
                    assert (answer.status, (await answer.json())["code"]) == (400, "invalid_parameter")

    run(test())


def spelt(us: int) -> str:
    return as_time(us).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def test_what_the_log_keeps_no_longer_is_a_gap(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path), partitions=2) as rig, api_on(rig) as api:
            (device,) = await rig.register(partition=0)
            await rig.land(record(device, power(0.0)))
            async with api.listening(device.organisation, device_id=device.device) as stream:
                began = stream.last_id
            await rig.land(*(record(device, power(float(n), at=NOW + n * SECOND)) for n in range(1, 6)))

            async def pruned() -> bool:
                await rig.log.landed({0: 6})
                return (await rig.log.bounds())[0].start > 1

            await until(pruned)
            async with api.listening(device.organisation, began, device_id=device.device) as stream:
                event = await stream.next()
                assert event is not None
                assert (event.name, event.data["reason"]) == ("gap", "expired")
                await rig.land(record(device, power(9.0, at=NOW + 9 * SECOND)))
                assert values(await stream.readings(1))[-1] == 9.0

    run(test())


def test_listeners_are_bounded(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        limits = {"live_listeners_max": 2, "live_listeners_per_organisation_max": 1}
        async with stage(database, sqlite_url(tmp_path), **limits) as (rig, api):
            first, second, third = [(await rig.register())[0] for _ in range(3)]
            async with (
                api.listening(first.organisation, device_id=first.device),
                api.asked(first.organisation, device_id=first.device) as own,
                api.listening(second.organisation, device_id=second.device),
                api.asked(third.organisation, device_id=third.device) as all_,
            ):
                assert (own.status, all_.status) == (429, 503)
                assert "Retry-After" in own.headers
                assert "Retry-After" in all_.headers
                assert api.sample("listeners") == 2
                assert [api.sample("refused_total", reason=one) for one in ("organisation", "process")] == [1, 1]

            async def left() -> bool:
                return api.sample("listeners") == 0 and not api.live._watches.by_device

            await until(left)
            async with api.listening(third.organisation, device_id=third.device):
                assert api.sample("listeners") == 1

    run(test())


def test_heartbeats_move_the_id_of_who_is_told_nothing(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path), live_heartbeat_s=0.1) as (rig, api):
            quiet, loud = await rig.register(2)
            async with api.listening(quiet.organisation, device_id=quiet.device) as stream:
                began = EventIds(RING).take(stream.last_id)
                await rig.land(record(loud, power(1.0)))

                async def moved() -> bool:
                    await stream.answer.content.readuntil(b"id: ")
                    told = (await stream.answer.content.readline()).decode().strip()
                    return EventIds(RING).take(told).positions != began.positions

                await until(moved)

    run(test())


def test_the_database_comes_back(database: Database, tmp_path: Path) -> None:
    """Sessions are cut again and again while readings land: nothing is lost or doubled, no stream ends."""

    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path)) as (rig, api):
            (device,) = await rig.register()
            async with api.listening(device.organisation, device_id=device.device) as stream, rig.worker():
                told: list[float] = []
                for number in range(6):
                    async with rig.superuser() as connection:
                        await connection.execute(
                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                            " WHERE application_name = 'test' AND datname = current_database()"
                        )
                    batch = [
                        record(device, power(number + part / 10, at=NOW + (10 * number + part) * SECOND))
                        for part in range(5)
                    ]
                    await rig.append(*batch)
                    while len(told) < 5 * (number + 1):
                        told += values(await stream.readings(1))
                assert told == [number + part / 10 for number in range(6) for part in range(5)]

    run(test())


def test_an_end_is_at_once(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path)) as (rig, api):
            (device,) = await rig.register()
            async with api.listening(device.organisation, device_id=device.device) as stream:
                api.live.end()
                event = await stream.next()
                assert event is not None
                assert (event.name, event.data) == ("end", {"reason": "shutdown"})
                assert await stream.next() is None
            async with api.asked(device.organisation, device_id=device.device) as answer:
                assert answer.status == 503
            assert api.sample("refused_total", reason="unavailable") == 1

    run(test())


def test_how_far_streams_are_behind_what_landed_is_counted(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path)) as (rig, api):
            (device,) = await rig.register()
            async with api.listening(device.organisation, device_id=device.device) as stream:
                async with rig.superuser() as other, other.transaction():
                    # What is asked of each turn; landing writes there only what was not stored.
                    await other.execute("LOCK TABLE outcomes IN ACCESS EXCLUSIVE MODE")
                    await rig.land(*(record(device, power(float(n), at=NOW + n * SECOND)) for n in range(3)))

                    async def behind() -> bool:
                        return api.sample("lag_records") == 3

                    await until(behind)
                await stream.readings(3)

                async def caught_up() -> bool:
                    return api.sample("lag_records") == 0

                await until(caught_up)

    run(test())


def test_who_comes_while_others_rights_are_looked_at_stays(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a key that was not asked about, to what others listen to already."""
    asked, gate = asyncio.Event(), asyncio.Event()

    async def held(*arguments: Any) -> Any:
        found = await still_let_in(*arguments)
        asked.set()
        await gate.wait()
        return found

    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path)) as (rig, api):
            (device,) = await rig.register()
            owner, other = device.organisation, await api.make_key(device.organisation)
            monkeypatch.setattr(hub, "still_let_in", held)
            async with api.listening(owner, device_id=device.device):
                await asked.wait()
                async with api.listening(owner, key=other, device_id=device.device) as late:
                    gate.set()
                    await rig.land(record(device, power(1.0)))
                    assert values(await late.readings(1)) == [1.0]
                    asked.clear()
                    await asked.wait()
                    await rig.land(record(device, power(2.0, at=NOW + SECOND)))
                    assert values(await late.readings(1)) == [2.0]
            assert api.sample("ended_total", reason="revoked") == 0

    run(test())


def test_a_head_request_listens_to_nothing(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with stage(database, sqlite_url(tmp_path)) as (rig, api):
            (device,) = await rig.register()
            headers = {"Authorization": f"Bearer {await api.key(device.organisation)}"}
            url = f"{api.url}/api/v1/readings/stream?device_id={device.device}"
            async with api.session.head(url, headers=headers) as answer:
                assert answer.status == 200
            assert not api.live._listeners

    run(test())


def test_a_device_is_found_in_a_record_without_decoding_it() -> None:
    device = Device(uuid7(), uuid7())
    plain: Record = record(device, power(1.0))
    assert device_in(encode(plain)) == device.device.bytes
    assert device_in(encode(replace(plain, version=VERSION, in_doubt=True))) == device.device.bytes
    assert device_in(b"no record") is None
    assert device_in(encode(replace(plain, record_id=b"short"))) is None
