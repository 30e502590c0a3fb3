"""Landing on a real database and a real log: what is stored, what is told of the rest, and that the books add up."""

import random
from pathlib import Path
from uuid import UUID

import pytest

from schemas.record import VERSION, Note, Quality, Record, Refused
from tests.databases import Database
from tests.landing_rig import DAY, NOW, SECOND, Device, Rig, channel, count, open_rig, record, sqlite_url, until
from tests.support import run
from workers.landing.failures import PoisonFloodError

EXPECTED = dict[tuple[UUID, str, int], float]


def test_readings_land_with_their_exact_values(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            values = [0.1, -1.5, 1e308, 5e-324, -0.0]
            power = [(NOW - 10 * SECOND + at, value) for at, value in enumerate(values)]
            state = channel("on", [(NOW, 1.0)], unit="", quality=Quality.BOOLEAN)
            await rig.land(record(device, channel("power", power, label="L1"), state))
            expected = [("on", "", NOW, 1.0, 16), *(("power", "L1", time, value, 0) for time, value in power)]
            assert await rig.readings() == expected
            assert await rig.ledger() == (6, 6, 0, 0, 0)
            assert await rig.value("SELECT count(*) FROM outcomes") == 0

    run(test())


def test_times_from_many_weeks_land(any_database: Database, tmp_path: Path) -> None:
    """Among them the first and the last moment of a week, which begins a partition of the tables."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            monday = NOW - NOW % (7 * DAY) + 2 * DAY
            times = sorted(
                {monday - week * 7 * DAY + at for week in range(40) for at in (0, 7 * DAY - 1) if week > 1}
            )
            readings = [(time, float(number)) for number, time in enumerate(times)]
            late = [(time + 5, 0.5) for time in times[::7]]
            await rig.land(record(device, channel("power", readings)), record(device, channel("power", late)))
            assert [(time, value) for _, _, time, value, _ in await rig.readings()] == sorted(readings + late)

    run(test())


def test_texts_and_integers_beyond_the_floats(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            big = channel("total", [(NOW, str(2**53 + 1))], unit="Wh", quality=Quality.INTEGER)
            await rig.land(record(device, big, channel("mode", [(NOW, "eco"), (NOW + 1, "été")], unit="")))
            again = channel("mode", [(NOW, "eco"), (NOW + 1, "Eco"), (NOW + 2, "off"), (NOW + 2, "off")], unit="")
            await rig.land(record(device, again))
            rows = await rig.fetch("SELECT value, quality FROM text_readings ORDER BY quality DESC, ts")
            assert rows == [("9007199254740993", 32), ("eco", 0), ("été", 0), ("off", 0)]
            assert await rig.ledger() == (7, 4, 2, 1, 0)

    run(test())


def test_what_a_reading_brought_along_is_kept_once(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            readings = channel("power", [(NOW, 1.0), (NOW + 1, 2.0)], quality=Quality.TIME_REPLACED)
            notes = [Note(0, 1, original_time="3.1", original_unit="kW", metadata=b'{"room": "cellar"}')]
            await rig.land(record(device, readings, notes=notes))
            other = channel("power", [(NOW, 1.0), (NOW + 1, 3.0)])
            notes = [Note(0, 0, metadata=b'{"of": "a duplicate"}'), Note(0, 1, metadata=b'{"of": "a conflict"}')]
            await rig.land(record(device, other, notes=notes))
            rows = await rig.fetch(
                "SELECT original_time, original_unit, metadata, organisation_id FROM reading_notes"
            )
            assert rows == [("3.1", "kW", '{"room": "cellar"}', device.organisation)]

    run(test())


def test_duplicates_and_conflicts_in_one_batch_and_after_a_restart(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            first = record(device, channel("power", [(NOW, 100.0), (NOW + 1, 0.0)]))
            same = record(device, channel("power", [(NOW, 100.0 * (1 + 9e-10)), (NOW + 1, 0.0)]))
            other = record(device, channel("power", [(NOW, 100.0 * (1 + 2e-9)), (NOW + 1, 1e-300), (NOW + 2, 7.0)]))
            await rig.land(first, same, other)
            assert await rig.ledger() == (7, 3, 2, 2, 0)
            late = record(device, channel("power", [(NOW - 5, 1.0), (NOW, -100.0), (NOW + 2, 7.0), (NOW + 3, 8.0)]))
            await rig.land(late, late)
            assert await rig.ledger() == (15, 5, 6, 4, 0)
            values = [(time - NOW, value) for _, _, time, value, _ in await rig.readings()]
            assert values == [(-5, 1.0), (0, 100.0), (1, 0.0), (2, 7.0), (3, 8.0)]
            rows = await rig.fetch("SELECT position, item FROM quarantine WHERE code = 'conflict' ORDER BY 1, 2")
            assert rows == [(2, -2), (2, -1), (3, -2), (4, -2)]

    run(test())


def test_values_at_the_edges_of_float8_are_compared(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            edges = [1.7976931348623157e308, -1.7976931348623157e308, 5e-324, -5e-324, 0.0, 1.0]
            await rig.land(record(device, channel("power", [(NOW + at, value) for at, value in enumerate(edges)])))
            for shift in range(1, len(edges)):
                moved = edges[shift:] + edges[:shift]
                await rig.append(record(device, channel("power", [(NOW + at, v) for at, v in enumerate(moved)])))
            await rig.land(record(device, channel("power", [(NOW + at, value) for at, value in enumerate(edges)])))
            assert await rig.ledger() == (42, 6, 6, 30, 0)

    run(test())


def test_a_unit_too_many_series_and_an_unknown_device(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            (foreign,) = await rig.register()
            stranger = Device(device.organisation, foreign.device)
            await rig.land(record(foreign, channel("a", [(NOW, 1.0)])))
            await rig.land(
                record(device, channel("a", [(NOW, 1.0)], unit="W"), channel("a", [(NOW + 1, 1.0)], unit="kW")),
                record(device, *(channel(name, [(NOW, 1.0)]) for name in "bcd")),
                record(stranger, channel("a", [(NOW, 1.0), (NOW + 1, 1.0)])),
                record(device, channel("a" * 3000, [(NOW, 1.0)]), channel("nul\0", [(NOW, 1.0)])),
                record(device, channel("a", [(NOW + 2, 1.0)], unit="kW"), channel("a", [(NOW + 2, 1.0)])),
                landing_series_per_device_max=3,
            )
            rows = await rig.fetch("SELECT code, count(*)::int FROM quarantine GROUP BY 1 ORDER BY 1")
            expected = [("rejected_by_store", 2), ("series_limit", 1), ("unit_mismatch", 2), ("unknown_device", 2)]
            assert rows == expected
            assert await rig.ledger() == (12, 5, 0, 0, 7)

    run(test())


def test_an_organisation_has_a_limit_of_its_own(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            devices = await rig.register(3, partition=0, series_max=4)
            await rig.land(
                *(record(device, channel("a", [(NOW, 1.0)]), channel("b", [(NOW, 1.0)])) for device in devices)
            )
            assert await rig.ledger() == (6, 4, 0, 0, 2)
            await rig.land(record(devices[0], channel("a", [(NOW + 1, 1.0)]), channel("c", [(NOW + 1, 1.0)])))
            assert await rig.ledger() == (8, 5, 0, 0, 3)

    run(test())


def test_too_old_is_told_from_late(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(raw_retention_days=30)
            readings = [(NOW - 30 * DAY - 1, 1.0), (NOW - 30 * DAY, 2.0), (NOW, 3.0)]
            refused = [Refused(3, "bad_value", "a value must be finite", b'{"value":"NaN"}')]
            await rig.land(record(device, channel("power", readings), refused=refused))
            assert [value for *_, value, _ in await rig.readings()] == [2.0, 3.0]
            rows = await rig.fetch("SELECT code, item, device_id, request_id FROM quarantine ORDER BY item")
            assert rows == [
                ("too_old", -1, device.device, "request-1"),
                ("bad_value", 3, device.device, "request-1"),
            ]
            assert await rig.fetch("SELECT quarantined, refused FROM outcomes") == [(1, 1)]
            assert await rig.ledger() == (4, 2, 0, 0, 2)

    run(test())


def test_a_record_that_cannot_be_read_is_quarantined_alone(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=1)
            await rig.append(record(device, channel("power", [(NOW, 1.0)])))
            await rig.append_raw(1, b"rubbish" * 20_000)
            await rig.land(record(device, channel("power", [(NOW + 1, 2.0)])))
            columns = "code, organisation_id, partition, position, length(payload)"
            assert await rig.fetch(f"SELECT {columns} FROM quarantine") == [("undecodable", None, 1, 1, 65536)]
            told = await rig.fetch("SELECT partition, position, organisation_id, unreadable FROM outcomes")
            assert told == [(1, 1, None, True)]
            assert await rig.ledger() == (2, 2, 0, 0, 0)

    run(test())


def test_a_record_that_the_database_refuses_stands_alone_in_quarantine(
    any_database: Database, tmp_path: Path
) -> None:
    """A time that no timestamptz can hold, among good records of the same and of other devices."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            devices = await rig.register(5)
            records = [
                record(device, channel("power", [(NOW + at, float(at))])) for at in range(20) for device in devices
            ]
            poison = record(devices[2], channel("power", [(NOW + 100, 1.0), (2**63 - 10, 2.0)]))
            records[57:57] = [poison]
            records[33:33] = [poison]
            await rig.land(*records)
            rows = await rig.fetch("SELECT code, device_id, count(*)::int FROM quarantine GROUP BY 1, 2")
            assert rows == [("rejected_by_store", devices[2].device, 4)]
            assert await rig.ledger() == (104, 100, 0, 0, 4)

    run(test())


def test_readings_that_another_way_has_put_there_are_no_poison(any_database: Database, tmp_path: Path) -> None:
    """What the cache takes for fresh meets a row: the batch is landed again with every reading checked."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            async with rig.worker():
                await rig.append(record(device, channel("power", [(NOW, 1.0)])))
                await rig.landed()
                insert = "INSERT INTO readings SELECT series_id, 0, ts + interval '1 s', 2.0 FROM readings"
                async with rig.superuser() as connection:
                    await connection.execute(insert)
                readings = [(NOW + SECOND, 2.0), (NOW + 2 * SECOND, 3.0)]
                await rig.append(record(device, channel("power", readings)))
                await rig.landed()
            assert [value for *_, value, _ in await rig.readings()] == [1.0, 2.0, 3.0]
            sums = await rig.fetch("SELECT received::int, stored::int, duplicates::int FROM ledger")
            assert sums == [(3, 2, 1)]
            assert count(rig.metrics.retries.labels("contention")) == 1

    run(test())


def test_small_batches_and_large_ones_end_the_same(any_database: Database, tmp_path: Path) -> None:
    """Random records with repeated, late, equal and conflicting times, against a dictionary that keeps the first."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path), partitions=3) as rig:
            chance = random.Random(20261121)
            devices = await rig.register(6)
            expected: EXPECTED = {}
            counts = [0, 0, 0, 0]
            for _ in range(12):
                records = [_random_record(chance, devices, expected, counts) for _ in range(chance.randint(1, 60))]
                limits = {"landing_batch_records_max": chance.choice([1, 7, 50_000])}
                await rig.land(*records, **limits)
            rows = await rig.fetch(
                "SELECT device_id, metric, extract(epoch FROM ts - '2000-01-01Z'::timestamptz) * 1000000, value"
                " FROM readings JOIN series USING (series_id)"
            )
            assert {(device, metric, int(time)): value for device, metric, time, value in rows} == expected
            assert await rig.ledger() == (*counts, 0)

    run(test())


def _random_record(chance: random.Random, devices: list[Device], expected: EXPECTED, counts: list[int]) -> Record:
    """A record; `expected` and `counts` (received, stored, duplicates, conflicts) get what landing it adds."""
    device = chance.choice(devices)
    channels = []
    for metric in chance.sample("abc", chance.randint(1, 3)):
        start = NOW - chance.choice([0, 0, 0, DAY, 8 * DAY])
        readings = [
            (start + chance.randint(0, 300), float(chance.randint(1, 2))) for _ in range(chance.randint(1, 9))
        ]
        if chance.random() < 0.5:
            readings.sort()
        for time, value in readings:
            stood = expected.setdefault((device.device, metric, time), value)
            counts[0] += 1
            counts[2 if stood == value else 3] += 1
        channels.append(channel(metric, readings))
    new = len(expected) - counts[1]
    counts[1] += new
    counts[2] -= new
    return record(device, *channels)


def test_undecodable_records_in_number_stop_the_worker(database: Database, tmp_path: Path) -> None:
    """Also one that is started again: it remembers what it let pass."""

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            for _ in range(2):
                await rig.append_raw(0, b"rubbish")
            await rig.land(landing_undecodable_max=2)
            await rig.append_raw(1, b"rubbish")
            with pytest.RaisesGroup(pytest.RaisesExc(PoisonFloodError, match="SLUICE_LANDING_UNDECODABLE_MAX")):
                await rig.land(landing_undecodable_max=2)
            assert await rig.value("SELECT count(*) FROM quarantine") == 2
            await rig.land(landing_undecodable_max=3)
            assert await rig.value("SELECT count(*) FROM quarantine") == 3

    run(test())


def test_workers_count_undecodable_records_together(database: Database, tmp_path: Path) -> None:
    another = """
        INSERT INTO quarantine (quarantine_id, code, message, payload, received_at, source, partition, position, item)
        SELECT gen_random_uuid(), code, message, payload, received_at, source, partition, 1000, item FROM quarantine
    """

    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            await rig.append_raw(0, b"rubbish")
            with pytest.RaisesGroup(pytest.RaisesExc(PoisonFloodError)):
                async with rig.worker(landing_undecodable_max=2):
                    await rig.landed()
                    async with rig.superuser() as connection:
                        await connection.execute(another)
                    await rig.append_raw(1, b"rubbish")
                    await rig.landed()
            assert await rig.value("SELECT count(*) FROM quarantine") == 2

    run(test())


def test_a_newer_version_makes_its_partition_wait(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            (ours,) = await rig.register(partition=0)
            (theirs,) = await rig.register(partition=1)
            await rig.append(record(theirs, channel("power", [(NOW, 1.0)])))
            await rig.append_raw(1, bytes((0x9A, VERSION + 1)) + b"whatever comes")
            await rig.append(record(theirs, channel("power", [(NOW + 1, 2.0)])))
            async with rig.worker() as worker:
                for at in range(3):
                    await rig.append(record(ours, channel("power", [(NOW + at, 5.0)])))
                await until(lambda: _stands(rig, {0: 3, 1: 1}))
                await until(lambda: _gauge_is(rig, 1.0))
                assert worker.trouble == (
                    f"partition 1 waits at 1: a record of version {VERSION + 1} needs a newer worker"
                )
            assert await rig.ledger() == (4, 4, 0, 0, 0)
            assert await rig.value("SELECT count(*) FROM quarantine") == 0

    run(test())


def test_what_the_log_has_deleted_is_counted_as_lost(database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            await rig.land(record(device, channel("power", [(NOW, 1.0)])))
            for at in range(1, 6):  # one by one, for the log deletes what was written together together
                await rig.append(record(device, channel("power", [(NOW + at, 2.0)])))
            await rig.log.landed({0: 4})
            await until(lambda: _log_starts_at(rig, 4))
            async with rig.worker():
                await rig.landed()
            assert [time - NOW for _, _, time, _, _ in await rig.readings()] == [0, 4, 5]
            assert await rig.value("SELECT lost FROM log_positions WHERE partition = 0") == 3
            assert await rig.fetch("SELECT partition, first_position, end_position FROM log_losses") == [(0, 1, 4)]
            assert count(rig.metrics.lost) == 3

    run(test())


async def _stands(rig: Rig, positions: dict[int, int]) -> bool:
    return dict(await rig.fetch("SELECT partition, position FROM log_positions")) == positions


async def _gauge_is(rig: Rig, value: float) -> bool:
    return count(rig.metrics.waiting_for_upgrade) == value


async def _log_starts_at(rig: Rig, position: int) -> bool:
    return (await rig.log.bounds())[0].start == position
