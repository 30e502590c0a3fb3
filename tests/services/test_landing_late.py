"""Records that may come more than once: out of a spool, under a name, or as a replay. Each lands once."""

import json
import struct
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from msgspec.structs import replace

from deploy.spool import skip, standing
from ingest.admit import Admission
from ingest.replay import judge
from runtime.errors import ConfigurationError
from runtime.ids import uuid7
from runtime.postgres import connect
from schemas.record import (
    PG_EPOCH_US,
    VERSION,
    Channel,
    Idempotency,
    Note,
    Origin,
    Quality,
    Record,
    Refused,
    encode,
)
from tests.databases import Database
from tests.landing_rig import DAY, NOW, SECOND, Device, Rig, channel, open_rig, record, sqlite_url, until
from tests.support import run

SPOOL = uuid4().bytes
SCOPE, KEY = bytes(range(16)), bytes(range(16, 32))


def spooled(device: Device, sequence: int, *channels: Channel, partition: int = 0, **fields: Any) -> Record:
    origin = Origin(SPOOL, partition, sequence, sequence + 1)
    return replace(record(device, *channels), version=VERSION, origin=origin, **fields)


def gap(first: int, end: int, partition: int = 0) -> Record:
    nobody = Device(UUID(int=0), UUID(int=0))
    return replace(record(nobody), version=VERSION, origin=Origin(SPOOL, partition, first, end))


def named(device: Device, fingerprint: bytes, *channels: Channel, received_at: int = NOW, **fields: Any) -> Record:
    name = Idempotency(SCOPE, KEY, fingerprint * 16)
    return replace(record(device, *channels, received_at=received_at), version=VERSION, idempotency=name, **fields)


def power(*readings: tuple[int, float], quality: int = 0) -> Channel:
    return channel("power", readings, quality=quality)


async def in_partition_0(rig: Rig, *records: Record) -> None:
    """Whatever device they are of: a gap is of none."""
    for one in records:
        await rig.append_raw(0, encode(one))


async def spool_stands(rig: Rig) -> dict[int, int]:
    return dict(await rig.fetch("SELECT partition, next FROM spool_positions"))


# ---------------------------------------------------------------- spools


def test_a_spool_is_taken_in_its_sequence_and_once(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            first, second, third = (spooled(device, n, power((NOW + n, float(n)))) for n in range(3))
            await rig.land(first, second, first, second, record(device, power((NOW + 10, 5.0))))
            assert await spool_stands(rig) == {0: 2}
            await rig.land(second, third, first, third)  # a drain that does not know how far it came
            assert [(time, value) for _, _, time, value, _ in await rig.readings()] == [
                (NOW, 0.0), (NOW + 1, 1.0), (NOW + 2, 2.0), (NOW + 10, 5.0),
            ]  # fmt: skip
            assert await rig.ledger() == (4, 4, 0, 0, 0)
            assert await spool_stands(rig) == {0: 3}
            assert await rig.fetch("SELECT source, received FROM ledger WHERE source <> $1", rig.log.source) == [
                (UUID(bytes=SPOOL), 3)
            ]

    run(test())


def test_a_repeat_whose_readings_are_stamped_is_not_moved_on(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            stamped = spooled(device, 0, power((NOW, 1.0), quality=Quality.TIME_STAMPED))
            await rig.land(stamped)
            await rig.land(stamped, spooled(device, 1, power((NOW, 1.0), quality=Quality.TIME_STAMPED)))
            assert [time for _, _, time, _, _ in await rig.readings()] == [NOW, NOW + 1]

    run(test())


def test_an_unknown_append_that_was_spooled_as_well_lands_once(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            direct = record(device, power((NOW, 1.0), (NOW + 1, 2.0), quality=Quality.TIME_STAMPED))
            origin = Origin(SPOOL, 0, 0, 1)
            again = replace(direct, version=VERSION, origin=origin, in_doubt=True)
            await rig.land(direct, again)
            assert [(time, value) for _, _, time, value, _ in await rig.readings()] == [(NOW, 1.0), (NOW + 1, 2.0)]
            assert await rig.ledger() == (4, 2, 2, 0, 0)

    run(test())


def test_the_original_may_come_after_its_spooled_copy(any_database: Database, tmp_path: Path) -> None:
    """Its sender was killed, and what it had sent reached the log late."""

    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            readings = power((NOW, 1.0), (NOW + 1, 2.0), quality=Quality.TIME_STAMPED)
            texts = channel("mode", [(NOW, "eco")], unit="", quality=Quality.TIME_STAMPED)
            direct = record(device, readings, texts)
            copy = replace(direct, version=VERSION, origin=Origin(SPOOL, 0, 0, 1), in_doubt=True)
            await rig.land(copy)
            await rig.land(direct)
            assert [(time, value) for _, _, time, value, _ in await rig.readings()] == [(NOW, 1.0), (NOW + 1, 2.0)]
            assert await rig.ledger() == (6, 3, 3, 0, 0)

    run(test())


def test_a_declared_gap_is_counted_and_passed_over(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            await in_partition_0(rig, spooled(device, 0, power((NOW, 1.0))), gap(0, 3), gap(1, 4), gap(1, 4))
            await rig.land(spooled(device, 4, power((NOW + 4, 4.0))))
            assert [time for _, _, time, _, _ in await rig.readings()] == [NOW, NOW + 4]
            losses = await rig.fetch("SELECT first_sequence, end_sequence FROM spool_losses ORDER BY 1")
            assert losses == [(1, 3), (3, 4)]
            assert await spool_stands(rig) == {0: 5}
            assert await rig.ledger() == (2, 2, 0, 0, 0)

    run(test())


def test_a_jump_stops_its_partition_until_an_operator_says_what_is_lost(
    any_database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            (other,) = await rig.register(partition=1)
            await rig.append(spooled(device, 0, power((NOW, 1.0))), spooled(device, 2, power((NOW + 2, 2.0))))
            await rig.append(record(other, power((NOW, 7.0))))
            async with rig.worker() as worker:
                await until(lambda: _counted(rig, 2))
                await until(lambda: _says(worker, "sluice spool skip"))
                assert await spool_stands(rig) == {0: 1}
                assert await spool_skipped(rig, 2) == 1
                await rig.landed()
            assert await rig.fetch("SELECT first_sequence, end_sequence FROM spool_losses") == [(1, 2)]
            assert len(await rig.readings()) == 3

    run(test())


async def spool_skipped(rig: Rig, sequence: int) -> int:
    connection = await connect(rig.postgres, role=None, application="test")
    try:
        with pytest.raises(ConfigurationError, match="stands at 1 already"):
            await skip(connection, UUID(bytes=SPOOL), 0, 1)
        lost = await skip(connection, UUID(bytes=SPOOL), 0, sequence)
        (row,) = await standing(connection)
        assert (row["next"], row["lost"]) == (sequence, lost)
        return lost
    finally:
        await connection.close()


async def _counted(rig: Rig, readings: int) -> bool:
    return bool(await rig.value("SELECT count(*) FROM readings") == readings)


async def _says(worker: Any, words: str) -> bool:
    return words in (worker.trouble or "")


def test_what_the_log_lost_may_have_been_a_spools(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            await rig.land(spooled(device, 0, power((NOW, 1.0))))
            await rig.fetch("UPDATE log_positions SET lost = 1 WHERE partition = 0 RETURNING 1")
            await rig.land(spooled(device, 5, power((NOW + 5, 5.0))))
            assert await rig.fetch("SELECT first_sequence, end_sequence FROM spool_losses") == [(1, 5)]
            assert len(await rig.readings()) == 2

    run(test())


def test_exceptions_of_spooled_records_are_told_by_their_place_in_the_spool(
    any_database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            await rig.land(record(device, power((NOW, 1.0))))
            refused = [Refused(0, "not_finite", "no number", b"{}")]
            await rig.land(spooled(device, 0, power((NOW, 1.0), (NOW, 9.0)), partition=4, refused=refused))
            places = "source, partition, position"
            where = (UUID(bytes=SPOOL), 4, 0)
            assert await rig.fetch(f"SELECT {places}, duplicates, conflicts, refused FROM outcomes") == [
                (*where, 1, 1, 1)
            ]
            assert await rig.fetch(f"SELECT DISTINCT {places} FROM quarantine") == [where]
            assert await rig.ledger() == (4, 1, 1, 1, 1)

    run(test())


# ---------------------------------------------------------------- named requests


def test_a_named_request_lands_once_whichever_process_got_it(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device, other) = await rig.register(2, partition=0)
            refused = [Refused(1, "not_finite", "no number", b"{}")]

            def sent(stamp: int, of: Device = device) -> Record:
                readings = power((stamp, 1.0), quality=Quality.TIME_STAMPED)
                return named(of, b"a", readings, received_at=stamp, refused=refused)

            await rig.land(sent(NOW), sent(NOW + 1), sent(NOW + 2, other))
            await rig.land(sent(NOW + 3 * SECOND))
            assert [time for _, _, time, _, _ in await rig.readings()] == [NOW, NOW + 2]
            # Refused readings of a repeat stand in the quarantine already.
            assert await rig.ledger() == (6, 2, 2, 0, 2)
            assert sorted(await rig.fetch("SELECT duplicates, refused FROM outcomes")) == [
                (0, 1), (0, 1), (1, 0), (1, 0),
            ]  # fmt: skip

    run(test())


def test_the_same_name_with_another_content_stands_in_quarantine(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            await rig.land(named(device, b"a", power((NOW, 1.0))), named(device, b"b", power((NOW + 1, 2.0))))
            assert len(await rig.readings()) == 1
            assert await rig.fetch("SELECT code FROM quarantine") == [("idempotency_conflict",)]
            assert await rig.ledger() == (2, 1, 0, 0, 1)

    run(test())


def test_after_a_day_a_name_is_free_again_and_late_copies_still_meet_their_own(
    any_database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            old = NOW - 2 * DAY
            first = named(device, b"a", power((old, 1.0)), received_at=old)
            await rig.land(first, named(device, b"b", power((NOW, 2.0))))
            await rig.land(first)
            assert len(await rig.readings()) == 2
            assert await rig.ledger() == (3, 2, 1, 0, 0)

    run(test())


# ---------------------------------------------------------------- replays


async def quarantined(rig: Rig, device: Device, code: str = "unit_mismatch") -> tuple[UUID, UUID]:
    """A row that waits for its replay, and the id that the replaying record must have."""
    await rig.land(record(device, refused=[Refused(0, code, "no", b'{"type":"power","value":1}')]))
    replay = uuid7()
    ((row,),) = await rig.fetch(
        "UPDATE quarantine SET state = 'replaying', replay_id = $1 WHERE state = 'held' RETURNING quarantine_id",
        replay,
    )
    return row, replay


async def asked_again(rig: Rig, row: UUID) -> UUID:
    replay = uuid7()
    query = "UPDATE quarantine SET state = 'replaying', replay_id = $1 WHERE quarantine_id = $2 RETURNING 1"
    await rig.fetch(query, replay, row)
    return replay


def replaying(device: Device, row: UUID, replay: UUID, *channels: Channel) -> Record:
    return replace(
        record(device, *channels), version=VERSION, record_id=replay.bytes, replays=row.bytes, way="replay"
    )


def test_a_replay_releases_its_row_and_lands_once(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            row, replay = await quarantined(rig, device)
            again = replaying(device, row, replay, power((NOW, 3.0)))
            stale = replaying(device, row, uuid7(), power((NOW + 1, 99.0)))
            await rig.land(stale, again, again)
            await rig.land(again)
            assert [value for _, _, _, value, _ in await rig.readings()] == [3.0]
            assert await rig.fetch("SELECT state, payload FROM quarantine") == [("released", b"")]
            books = "sum(received)::int, sum(stored)::int, sum(quarantined)::int, sum(replayed)::int"
            assert await rig.fetch(f"SELECT {books} FROM ledger") == [(2, 1, 1, 1)]

    run(test())


def test_a_replay_lands_with_the_flags_and_the_note_that_the_reading_came_with(
    any_database: Database, tmp_path: Path
) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            flags = Quality.UNIT_CONVERTED | Quality.TIME_SHIFTED
            note = Note(0, 0, "63.1", "°F", b'{"rssi": -60}')
            temperature = channel("temperature", [(NOW, 20.0)], unit="°C", quality=flags.value)
            too_old = replace(temperature, times=struct.pack(">q", NOW - 4000 * DAY))
            await rig.land(record(device, too_old, notes=[note]))
            await rig.fetch("UPDATE organisations SET raw_retention_days = 36500")
            replay = uuid7()
            query = "UPDATE quarantine SET state = 'replaying', replay_id = $1 RETURNING *"
            async with rig.superuser() as connection:
                row = dict(await connection.fetchrow(query, replay))
            assert json.loads(row["payload"])["value"] == 68
            row |= {"edited": False, "status": "active", "raw_retention_days": 36_500}
            again = judge(Admission(future_us=0, year_floor=1980), row, NOW + PG_EPOCH_US)
            assert isinstance(again, Record), again
            await rig.land(again)
            assert await rig.readings() == [("temperature", "", NOW - 4000 * DAY, 20.0, flags.value)]
            kept = "SELECT original_time, original_unit, metadata::text FROM reading_notes"
            assert await rig.fetch(kept) == [("63.1", "°F", '{"rssi": -60}')]
            assert await rig.value("SELECT state FROM quarantine") == "released"

    run(test())


def test_a_replay_that_is_refused_again_stays_where_it_was(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            await rig.land(record(device, power((NOW, 1.0))))
            query = "SELECT state, code, attempts, payload <> '' FROM quarantine"
            row, replay = await quarantined(rig, device)
            await rig.land(replaying(device, row, replay, channel("power", [(NOW + 1, 1.0)], unit="kW")))
            assert await rig.fetch(query) == [("held", "unit_mismatch", 2, True)]
            replay = await asked_again(rig, row)
            await rig.land(replaying(device, row, replay, power((NOW, 8.0))))
            assert await rig.fetch(query) == [("held", "conflict", 3, True)]
            books = "sum(received)::int, sum(stored)::int, sum(quarantined)::int, sum(replayed)::int"
            assert await rig.fetch(f"SELECT {books} FROM ledger") == [(2, 1, 1, 0)]

    run(test())


def test_a_replay_of_what_is_stored_by_now_is_a_duplicate(any_database: Database, tmp_path: Path) -> None:
    async def test() -> None:
        async with open_rig(any_database, sqlite_url(tmp_path)) as rig:
            (device,) = await rig.register(partition=0)
            await rig.land(record(device, power((NOW, 3.0))))
            row, replay = await quarantined(rig, device)
            await rig.land(replaying(device, row, replay, power((NOW, 3.0))))
            assert await rig.fetch("SELECT state FROM quarantine") == [("released",)]
            books = "sum(received)::int, sum(stored)::int, sum(duplicates)::int, sum(replayed)::int"
            assert await rig.fetch(f"SELECT {books} FROM ledger") == [(3, 1, 1, 1)]

    run(test())
