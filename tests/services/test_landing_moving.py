"""Readings whose time ingest made up, of processes that know nothing of each other: each is stored once.

Every interleaving of two records that meet on a real database. Left out: ingest, which makes up the times
(`tests/system`).
"""

import random
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from schemas.record import VERSION, Channel, Note, Quality, Record
from tests.databases import Database
from tests.landing_rig import DAY, NOW, Device, Rig, channel, count, open_rig, record, sqlite_url
from tests.support import run

STAMPED = Quality.TIME_STAMPED.value


def stamped(device: Device, *readings: tuple[int, float] | tuple[int, str], metric: str = "power") -> Record:
    """A record of readings that came without a time."""
    times = [(NOW + at, value) for at, value in readings]
    return record(device, channel(metric, times, quality=STAMPED))  # type: ignore[arg-type]


def timed(device: Device, *readings: tuple[int, float]) -> Record:
    return record(device, channel("power", [(NOW + at, value) for at, value in readings]))


async def rows(rig: Rig) -> list[tuple[int, float, int]]:
    """(time, value, quality), in the order of time."""
    return [(time - NOW, value, quality) for _, _, time, value, quality in await rig.readings()]


async def land_all(rig: Rig, records: Sequence[Record], apart: bool) -> None:
    """In one transaction, or each by a worker of its own that knows nothing of the others."""
    if not apart:
        await rig.land(*records)
        return
    for one in records:
        await rig.land(one)


in_one_batch_and_apart = pytest.mark.parametrize("apart", [False, True], ids=["one batch", "apart"])


@in_one_batch_and_apart
def test_equal_stamps_of_several_records_are_all_stored(any_database: Database, tmp_path: Path, apart: bool) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            records = [
                stamped(device, (0, 1.0), (1, 2.0)),
                stamped(device, (0, 1.0), (1, 2.0)),  # equal values
                stamped(device, (0, 5.0), (1, 6.0)),
                stamped(device, (5, 7.0)),
            ]
            await land_all(rig, records, apart)
            expected = [(0, 1.0), (1, 2.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, 7.0), (6, 6.0)]
            if not apart:  # what has a place of its own in the batch comes before what has to move
                assert [row[0] for row in await rows(rig)] == [0, 1, 2, 3, 4, 5, 6]
                assert sorted(row[1] for row in await rows(rig)) == sorted(value for _, value in expected)
            else:
                expected = [(0, 1.0), (1, 2.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, 6.0), (6, 7.0)]
                assert await rows(rig) == [(at, value, STAMPED) for at, value in expected]
            assert await rig.ledger() == (7, 7, 0, 0, 0)
            assert count(rig.metrics.retries.labels("contention")) == 0

    run(test())


@in_one_batch_and_apart
def test_a_stamp_makes_way_for_a_time_that_was_there_first(
    any_database: Database, tmp_path: Path, apart: bool
) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            records = [timed(device, (0, 1.0), (1, 2.0)), stamped(device, (0, 1.0)), stamped(device, (1, 9.0))]
            await land_all(rig, records, apart)
            assert await rows(rig) == [(0, 1.0, 0), (1, 2.0, 0), (2, 1.0, STAMPED), (3, 9.0, STAMPED)]
            assert await rig.ledger() == (4, 4, 0, 0, 0)

    run(test())


@in_one_batch_and_apart
def test_a_time_that_meets_a_stamp_is_a_duplicate_of_an_equal_one_and_else_a_conflict(
    any_database: Database, tmp_path: Path, apart: bool
) -> None:
    """It stands, or is in quarantine with its reason: what is stored is not moved again."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            records = [stamped(device, (0, 1.0), (1, 2.0)), timed(device, (0, 1.0), (1, 3.0), (2, 4.0))]
            await land_all(rig, records, apart)
            assert await rows(rig) == [(0, 1.0, STAMPED), (1, 2.0, STAMPED), (2, 4.0, 0)]
            assert await rig.ledger() == (5, 3, 1, 1, 0)
            assert await rig.fetch("SELECT code, position, item FROM quarantine") == [("conflict", 1, -2)]

    run(test())


def test_what_has_landed_is_known_when_it_is_landed_again(database: Database, services: dict[str, str]) -> None:
    """A position that was set back: what stands at its own time, what was moved, and what found no place."""

    async def test() -> None:
        async with open_rig(database, services["SLUICE_LOG_URL"], partitions=1) as rig:
            (device,) = await rig.register()
            records = [
                stamped(device, (0, 1.0), (1, 2.0)),
                stamped(device, (0, 1.0), (1, 3.0)),
                timed(device, (10, 1.0)),
                stamped(device, (0, 1.0)),
                stamped(device, (0, 1.0)),
                stamped(device, (0, "a"), metric="mode"),
                stamped(device, (0, "a"), metric="mode"),
                stamped(device, (0, "b"), metric="mode"),
            ]
            await rig.land(*records, landing_move_max_ms=0.003)
            found, texts = await rows(rig), await rig.fetch("SELECT ts, value FROM text_readings ORDER BY 1")
            assert [row[:2] for row in found] == [(0, 1.0), (1, 2.0), (2, 1.0), (3, 1.0), (4, 3.0), (10, 1.0)]
            assert [value for _, value in texts] == ["a", "a", "b"]
            assert await rig.ledger() == (10, 9, 0, 1, 0)
            for again in (1, 2):
                async with rig.superuser() as connection:
                    await connection.execute("UPDATE log_positions SET position = 0")
                await rig.land(landing_batch_records_max=again, landing_move_max_ms=0.003)
                assert await rows(rig) == found
                assert await rig.fetch("SELECT ts, value FROM text_readings ORDER BY 1") == texts
                assert await rig.value("SELECT count(*) FROM quarantine") == 1
            await rig.land(stamped(device, (0, 1.0)), landing_move_max_ms=1.0)
            assert (await rows(rig))[5] == (5, 1.0, STAMPED)

    run(test())


def test_the_very_record_that_was_moved_is_known_by_its_id(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            first, second = stamped(device, (0, 1.0)), stamped(device, (0, 1.0))
            third = stamped(device, (0, "on"), metric="mode")
            fourth = stamped(device, (0, "off"), metric="mode")
            await rig.land(first, second, third, fourth)
            await rig.land(second, fourth)
            await rig.land(second, second, fourth)
            assert await rows(rig) == [(0, 1.0, STAMPED), (1, 1.0, STAMPED)]
            assert await rig.value("SELECT count(*) FROM text_readings") == 2
            assert await rig.ledger() == (9, 4, 5, 0, 0)

    run(test())


@in_one_batch_and_apart
def test_a_record_that_may_stand_in_the_log_already_finds_its_own(
    any_database: Database, tmp_path: Path, apart: bool
) -> None:
    """An append of unknown outcome that was made again: the first one came through, or did not."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            first, moved = stamped(device, (0, 1.0), (1, 2.0)), stamped(device, (0, 3.0))
            again = [msgspec.structs.replace(one, version=VERSION, in_doubt=True) for one in (first, moved)]
            never_came = msgspec.structs.replace(stamped(device, (1, 9.0)), version=VERSION, in_doubt=True)
            await land_all(rig, [first, moved, *again, never_came], apart)
            assert [row[:2] for row in await rows(rig)] == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 9.0)]
            assert await rig.ledger() == (7, 4, 3, 0, 0)

    run(test())


def test_beyond_its_reach_a_reading_is_quarantined(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            records = [stamped(device, (0, float(number))) for number in (1, 1, 2, 1, 3)]
            await rig.land(*records, landing_move_max_ms=0.002)
            assert [row[:2] for row in await rows(rig)] == [(0, 1.0), (1, 1.0), (2, 2.0)]
            assert await rig.ledger() == (5, 3, 0, 2, 0)
            (row, _) = await rig.fetch("SELECT code, message, position FROM quarantine ORDER BY position")
            assert (row[0], row[2]) == ("conflict", 3)
            assert "as far beyond as it may move on" in row[1]

    run(test())


@pytest.mark.parametrize("flag", [Quality.TIME_REPLACED, Quality.TIME_SHIFTED])
def test_other_times_of_our_making_move_with_what_is_noted_of_them(
    any_database: Database, tmp_path: Path, flag: Quality
) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            for claimed in ("3.1", "4.1"):
                flags = flag | Quality.UNIT_CONVERTED
                claiming = channel("power", [(NOW, 1.0)], quality=flags)
                await rig.append(record(device, claiming, notes=[Note(0, 0, claimed, "kW")]))
            await rig.land()
            assert [row[:2] for row in await rows(rig)] == [(0, 1.0), (1, 1.0)]
            notes = await rig.fetch(
                "SELECT n.original_time FROM reading_notes n JOIN readings USING (series_id, ts) ORDER BY ts"
            )
            assert notes == [("3.1",), ("4.1",)]

    run(test())


def test_a_reading_moves_on_into_the_next_week(any_database: Database, tmp_path: Path) -> None:
    """Which begins a partition of the tables."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            last = -(NOW - 2 * DAY) % (7 * DAY) - 7 * DAY - 1
            records = [stamped(device, (last, 1.0)), stamped(device, (last, 1.0))]
            texts = [stamped(device, (last, "on"), metric="mode") for _ in range(2)]
            await rig.land(*records, *texts)
            assert [row[0] for row in await rows(rig)] == [last, last + 1]
            assert await rig.ledger() == (4, 4, 0, 0, 0)

    run(test())


@pytest.mark.parametrize("records_max", [1, 2, 50_000])
def test_large_requests_that_overlap_stay_in_order(any_database: Database, tmp_path: Path, records_max: int) -> None:
    """And what comes after them is not taken for fresh where they were moved to."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register()
            size = 3_000
            records = [
                stamped(device, *((start + at, float(number * size + at)) for at in range(size)))
                for number, start in enumerate((0, 100, 100, size + 50))
            ]
            await rig.land(*records, landing_batch_records_max=records_max)
            found = await rows(rig)
            assert await rig.ledger() == (4 * size, 4 * size, 0, 0, 0)
            assert [row[0] for row in found] == [*range(4 * size)]
            for number in range(4):
                own = [value for _, value, _ in found if number * size <= value < (number + 1) * size]
                assert sorted(own) == [float(number * size + at) for at in range(size)]
            assert count(rig.metrics.retries.labels("contention")) == 0

    run(test())


def test_stamps_and_times_of_every_kind_are_accounted_for(any_database: Database, tmp_path: Path) -> None:
    """Random records on few microseconds, in batches of random size: each stamp is stored, each time as it came."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            chance = random.Random(20261124)
            devices = await rig.register(3)
            stamps: list[float] = []
            received = 0
            for _ in range(8):
                records = []
                for _ in range(chance.randint(1, 40)):
                    one, values = _random_record(chance, chance.choice(devices))
                    records.append(one)
                    received += one.accepted
                    stamps += values
                await rig.land(*records, landing_batch_records_max=chance.choice([1, 5, 50_000]))
            found = await rig.readings()
            assert sorted(value for *_, value, quality in found if quality) == sorted(stamps)
            books = await rig.ledger()
            assert books[0] == received
            assert books[1] == len(found)

    run(test())


def _random_record(chance: random.Random, device: Device) -> tuple[Record, list[float]]:
    """A record with times of its own and of our making, and the values of the latter."""
    number = chance.randint(1, 6)
    times = [NOW + at for at in chance.sample(range(30), number)]
    values = [float(chance.randint(1, 3)) for _ in range(number)]
    flags = [chance.choice([0, STAMPED]) for _ in range(number)]
    packed = struct.pack(f">{number}q", *times), struct.pack(f">{number}d", *values)
    one = record(device, Channel("power", "", "W", *packed, struct.pack(f">{number}h", *flags)))
    return one, [value for value, flag in zip(values, flags, strict=True) if flag]
